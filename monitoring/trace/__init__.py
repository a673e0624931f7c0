"""The flight recorder: one line per forward pass, written and read."""
