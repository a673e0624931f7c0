"""Faults: specifications, sites, drawing and injection."""
