"""Code that all figures share: style, colours, populations, files."""
