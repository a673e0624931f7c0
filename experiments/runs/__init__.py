"""One run: draw its fault, and make a row from its measurements."""
