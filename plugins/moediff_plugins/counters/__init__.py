"""Counters: what a denoiser costs."""
