"""Taps that watch or repair a pass while it runs."""
