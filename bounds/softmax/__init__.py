"""Weights that sum to one, are a distribution, and are that of the logits."""
