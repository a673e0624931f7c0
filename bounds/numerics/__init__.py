"""The arithmetic behind the proofs: rounding errors, sums in a fixed order, the epsilon chain in real numbers."""
