"""Runs that compute only what their fault can have changed, bit for bit the plain pair."""
