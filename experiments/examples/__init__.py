"""Examples that run as they are, from the repository."""
