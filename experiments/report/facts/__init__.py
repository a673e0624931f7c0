"""The contents of the report, as numbers and words, before they become a page."""
