"""The instrumented attention: cores found, probed and shown to taps."""
