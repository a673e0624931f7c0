"""The score product and the value product, checked by sums and element by element."""
