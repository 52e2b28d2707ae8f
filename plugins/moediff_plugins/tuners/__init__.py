"""Tuners: training before and after the pruning."""
