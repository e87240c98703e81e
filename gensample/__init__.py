"""gensample: training, sampling, search and alignment of diffusion and flow models, beside Diffusers."""

__version__ = "0.1.0"
