"""Floating-point numbers as bit patterns: formats, rewrites, comparison."""
