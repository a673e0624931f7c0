"""Files and columns: the contents of a row, and how to write and read rows."""
