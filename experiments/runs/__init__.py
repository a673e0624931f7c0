"""One run: its fault drawn, its measurements made into a row."""
