"""What a detector is: the call it reads, the rows it judges, and the verdict it gives."""
