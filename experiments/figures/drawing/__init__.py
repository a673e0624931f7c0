"""What the figures share: style, colours, populations, files."""
