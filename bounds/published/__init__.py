"""Published methods to compare with: thresholds, no proofs."""
