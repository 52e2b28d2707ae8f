"""Anatomies: what models are made of."""
