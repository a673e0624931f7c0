"""What the report says, as numbers and words, before it is a page."""
