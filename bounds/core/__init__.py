"""The detector: the call it reads, the rows it judges, and the verdict it returns."""
