"""Files and columns: what a row holds, and how rows are written and read."""
