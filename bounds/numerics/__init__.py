"""Arithmetic that proofs rest on: rounding errors, sums in a fixed order, the epsilon chain in real numbers."""
