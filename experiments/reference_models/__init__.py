"""The two models that ship with the project, and how they are made."""
