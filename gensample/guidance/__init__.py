"""Guidance rules: pure functions that change the answer of a denoiser."""
