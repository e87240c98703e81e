"""Classifier guidance with gradients (Dhariwal & Nichol, arXiv 2105.05233), through x0: what GFCG replaces.

    score' = score + scale grad_x log p(c | x0(x_t))        x0' = x0 + (alpha^2 / beta) scale grad_x log p(c | x0(x_t))

The gradient runs through classifier, decoder and network, so an evaluation costs one network row forward and one
backward; ``Denoiser.evaluations`` counts the forward row alone.

Shapes: B rows; x, output, gradient (B, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, Guided, denoiser_calls
from gensample.guidance.posterior import ClassifierPosterior, target_classes
from gensample.guidance.terms import Interval, checked_interval, inside
from gensample.interpolants import affine, convert
from gensample.interpolants.fields import per_row


@dataclass(frozen=True)
class ClassifierGuidance:
    """Classifier guidance with ``scale`` (0 is the conditional model, 1 the Bayes rule for a noise-aware posterior).

    posterior: the differentiable clean-image classifier.  interval: as CFG.  At beta = 0 (pure noise) the class is
    independent of x_t, and the rule does nothing.
    """

    posterior: ClassifierPosterior
    scale: float
    interval: Interval | None = None
    has_memory = False

    def __post_init__(self) -> None:
        """Refuse a scale that is not finite."""
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite (0 switches classifier guidance off)")
        checked_interval(self.interval)

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object = None
    ) -> Guided:
        """One network row forward and backward per sample."""
        calls = denoiser_calls(denoise, "ClassifierGuidance")
        c, kind = calls.coefficients(t), calls.denoiser.prediction_type
        active = inside(t, self.interval, len(x)).numpy() & (np.asarray(c.beta) > 0)
        if self.scale == 0.0 or not active.any():
            return Guided(denoise(x, t, cond))
        target = target_classes(cond)
        with torch.enable_grad():
            at = x.detach().requires_grad_(True)
            output = calls.denoiser.denoise(at, t, cond, grad=True).output
            x0 = convert(output, at.to(output), c, kind, "x0")
            images = calls.denoiser.decode(x0, micro_batch=self.posterior.micro_batch, grad=True)
            logits = self.posterior.classifier(images) / self.posterior.temperature
            log_p = logits.log_softmax(1).gather(1, target.to(logits.device)[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(log_p.sum(), at)
        slope = np.asarray(affine(c, kind, "x0")[1])
        beta = np.where(active, np.asarray(c.beta), 1.0)
        factor = np.where(active, self.scale * np.asarray(c.alpha) ** 2 / (beta * slope), 0.0)
        delta = per_row(np.broadcast_to(factor, len(x)).copy(), output) * gradient.to(output)
        return Guided(output.detach() + delta, None, {"confidence": log_p.detach().exp()})
