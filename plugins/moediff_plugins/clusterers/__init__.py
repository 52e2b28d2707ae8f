"""Clusterers: how the timesteps are split."""
