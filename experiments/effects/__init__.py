"""How two answers of a model differ."""
