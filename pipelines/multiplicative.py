"""Class-conditional multiplicative diffusion: positive images by geometric Brownian motion, as a Diffusers pipeline.

Shapes: B = images; latents u (B, C, H, W), the standardised logarithm; x = exp(...) > 0; images (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gensample.denoisers.multiplicative import ExponentReport, MultiplicativeDenoiser
from gensample.denoisers.multiplicative import from_pipeline as denoiser_of
from gensample.models.dit import DiT
from gensample.pipelines.class_conditional import ClassConditionalPipeline
from gensample.schedulers.multiplicative import GBMScheduler


class MultiplicativeDiffusionPipeline(ClassConditionalPipeline):
    """Draws images of given classes with a DiT trained on multiplicative noise (arXiv 2510.02730).

    Calls, streams, guidance, noise and files are those of :class:`ClassConditionalPipeline`; latents are logarithms.

    Args:
        transformer: the network; its null label is index ``num_classes``.
        scheduler: a :class:`~gensample.schedulers.multiplicative.GBMScheduler`, which holds the process, what the
            network sees and answers, and the sampler.
        class_names: one name per class, usable as labels; None for indices only.

    Raises TypeError for another scheduler, ValueError as ``ClassConditionalPipeline``.
    """

    def __init__(self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None) -> None:
        """See the class."""
        if not isinstance(scheduler, GBMScheduler):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}; multiplicative diffusion needs a GBMScheduler, such as "
                "GBMScheduler.recommended()"
            )
        super().__init__(transformer, scheduler, class_names)

    def positive(self, latents: Tensor) -> Tensor:
        """Finished latents (``output_type="latent"``) as x > 0: images before the shift and the clamp to [0, 1]."""
        return self._denoiser().positive(latents)

    def report(self, latents: Tensor) -> ExponentReport:
        """How many values of finished latents the exponential clamped, and how many lie outside the data's range."""
        return self._denoiser().report(latents)

    def _denoiser(self) -> MultiplicativeDenoiser:
        return denoiser_of(self, class_labels=0)
