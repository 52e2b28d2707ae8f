"""Metrics: how good and how fast the result is."""
