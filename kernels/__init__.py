"""Attention and fused kernels, each beside its PyTorch reference; import them as `gensample.kernels`."""
