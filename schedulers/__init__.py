"""Diffusers schedulers of gensample; import them as `gensample.schedulers`."""
