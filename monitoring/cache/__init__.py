"""The forward cache: exact keys, owned values, counted and traced passes."""
