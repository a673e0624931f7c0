"""Where the queries, keys and values of a core come from."""
