"""Where class probabilities come from: a clean-image classifier on x0, or a noise-aware one on x_t; and its checks.

Shapes: B rows, K classes; log-probabilities (B, K) float64; images (B, C, H, W) in [0, 1]; labels (B,) long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gensample.denoisers import Conditioning
from gensample.guidance.base import Denoise, denoiser_calls

Classifier = Callable[[Tensor], Any]


class Posterior(Protocol):
    """Class probabilities of the samples in flight."""

    def __call__(self, x: Tensor, t: float | Tensor, output: Tensor, denoise: Denoise) -> Tensor:
        """log p(k | x_t), (B, K) float64, given the conditional native ``output`` at (x, t)."""


@dataclass(frozen=True)
class ClassifierPosterior:
    """softmax(classifier(images of x0) / temperature), in inference mode: no gradient is ever formed.

    classifier: images (B, C, H, W) in [0, 1] to logits (B, K), a tensor or an array; modules in eval mode.
    micro_batch: images decoded at a time.  Raises ValueError for a module in training mode and a temperature that is
    not positive.
    """

    classifier: Classifier
    temperature: float = 1.0
    micro_batch: int = 16

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if isinstance(self.classifier, nn.Module) and self.classifier.training:
            raise ValueError("classifier is in training mode; call classifier.eval() first")

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float | Tensor, output: Tensor, denoise: Denoise) -> Tensor:
        """log p(k | x0), (B, K); ValueError for an epsilon model at zero signal-to-noise ratio."""
        calls = denoiser_calls(denoise, "ClassifierPosterior")
        x0 = calls.x0(x, t, output.detach())
        images = calls.denoiser.decode(x0, micro_batch=self.micro_batch)
        return log_probabilities(self.classifier(images), self.temperature, len(x))


@dataclass(frozen=True)
class NoiseAwarePosterior:
    """softmax(logits(x_t, t)): a classifier trained on noisy samples, or the exact posterior of a toy."""

    logits: Callable[[Tensor, float | Tensor], Any]

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float | Tensor, output: Tensor, denoise: Denoise) -> Tensor:
        """log p(k | x_t), (B, K)."""
        return log_probabilities(self.logits(x.detach(), t), 1.0, len(x))


def log_probabilities(logits: Any, temperature: float, rows: int) -> Tensor:
    """Normalised log-probabilities (B, K) in float64 of logits of any float type, an array or a tensor.

    Raises ValueError for another shape or one class, FloatingPointError naming the sample for NaN.
    """
    values = torch.as_tensor(logits).detach().double()
    if values.ndim != 2 or values.shape[0] != rows or values.shape[1] < 2:
        raise ValueError(
            f"the classifier answered shape {tuple(values.shape)}; expected logits ({rows}, K) with K >= 2"
        )
    if bool(values.isnan().any()):
        sample = int(values.isnan().any(1).nonzero()[0])
        raise FloatingPointError(f"the classifier's logits are NaN for sample {sample}")
    return (values / temperature).log_softmax(1)


def target_classes(cond: Conditioning, *, tolerance: float = 1e-3) -> Tensor:
    """The entry c (B,) long of the reference table that each row is conditioned on.

    Encoded prompts match within a relative ``tolerance``, because encoders round differently in other batches.
    Raises ValueError where no table is bound, or a row's condition is not in it.
    """
    if cond.num_references == 0:
        raise ValueError(
            "GFCG needs a reference table; use reference_prompts= or Conditioning.bind_references"
        )
    distance = torch.zeros(cond.batch_size, cond.num_references, dtype=torch.float64)
    for name, table in cond.references.items():
        entries = table.reshape(len(table), -1).double().cpu()
        rows = cond.batched[name].reshape(cond.batch_size, -1).double().cpu()
        scale = entries.norm(dim=1).clamp_min(1.0) if table.is_floating_point() else 1e-9
        apart = torch.cdist(rows, entries, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.maximum(distance, apart / scale)
    nearest, target = distance.min(1)
    if bool((nearest > tolerance).any()):
        row = int((nearest > tolerance).nonzero()[0])
        raise ValueError(
            f"the condition of sample {row} is not in the reference table; add its prompt to reference_prompts"
        )
    return target


@torch.no_grad()
def check_label_map(classifier: Classifier, images: Tensor, labels: Tensor, *, minimum: float = 0.5) -> float:
    """The accuracy of ``classifier`` on labelled images, refused below ``minimum``.

    Guidance by a classifier that orders its classes otherwise drives samples out of their class.  Run this once on a
    few images of every class, real ones or unguided samples.

    Raises ValueError below ``minimum``; the message tells a permutation from a classifier that knows nothing.
    """
    log_p = log_probabilities(classifier(images), 1.0, len(images))
    labels = labels.to(log_p.device)
    accuracy = float((log_p.argmax(1) == labels).double().mean())
    if accuracy >= minimum:
        return accuracy
    classes = labels.unique()
    mode = torch.stack([log_p[labels == k].argmax(1).mode().values for k in classes])
    consistent = float(torch.cat([log_p[labels == k].argmax(1) == m for k, m in zip(classes, mode, strict=True)])
                       .double().mean())  # fmt: skip
    pairs = {int(k): int(m) for k, m in zip(classes, mode, strict=True) if k != m}
    hint = "it does not recognise these images"
    if consistent >= minimum and len(mode.unique()) == len(mode):
        hint = f"its classes are in another order (label: its answer {pairs}); permute its logits"
    raise ValueError(
        f"the classifier agrees with {accuracy:.0%} of the labels (minimum {minimum:.0%}): {hint}"
    )
