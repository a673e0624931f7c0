"""Values that no input can produce, from the weights alone."""
