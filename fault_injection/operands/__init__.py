"""The origin of a core's queries, keys and values."""
