"""The atlas of a model: every single-bit flip of its attention, ranked without running any."""
