"""Scorers: what an expert needs."""
