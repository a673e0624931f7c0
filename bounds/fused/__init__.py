"""Detectors for fused kernels, which show neither scores nor weights."""
