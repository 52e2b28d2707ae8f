"""Pruners: what may be removed, and the removal."""
