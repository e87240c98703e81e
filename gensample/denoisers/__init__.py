"""Denoisers: one interface over the networks of every supported model family."""
