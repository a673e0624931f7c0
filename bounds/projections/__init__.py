"""Queries, keys and values against the weights and the input that they come from."""
