"""Log-probability of one class, or of any of a set, under a classifier of clean images.

    r(x) = log sum_{c in S} p(c | x) = logsumexp_{c in S} log p(c | x)

Shapes: B = rows, K = classes; images (B, C, H, W) in [0, 1]; logits (B, K); rewards (B,) float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gensample.denoisers import Conditioning


@dataclass(frozen=True, eq=False)
class ClassLogProbability:
    """The log-probability of class ``classes`` (an index), or of the set ``classes`` (indices).

    classifier: images to logits (B, K): a module in eval mode, or any callable; its parameters are used in place, and
    differentiably.  classes: None is every row's own label, the field "class_labels" of its conditioning.
    temperature: divides the logits.

    Raises ValueError for a module in training mode, an empty or repeating set, or a temperature that is not positive.
    """

    classifier: Callable[[Tensor], Any]
    classes: int | Sequence[int] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.classifier, nn.Module) and self.classifier.training:
            raise ValueError("classifier is in training mode; call classifier.eval() first")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if self.classes is None:
            return
        members = (self.classes,) if isinstance(self.classes, int) else tuple(self.classes)
        if not members or len(set(members)) != len(members) or min(members) < 0:
            raise ValueError(f"classes={self.classes!r} must be different indices, at least one, from 0")
        object.__setattr__(self, "classes", members)

    @property
    def description(self) -> str:
        """The classes and the temperature."""
        return f"ClassLogProbability(classes={self.classes}, temperature={self.temperature:g})"

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Rewards (B,); ValueError for logits of another shape or a class the classifier does not have."""
        logits = torch.as_tensor(self.classifier(images))
        if logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(
                f"the classifier answered shape {tuple(logits.shape)}; expected logits ({len(images)}, K)"
            )
        log_p = (logits.float() / self.temperature).log_softmax(1)
        if self.classes is None:
            return log_p.gather(1, _own_labels(cond, log_p)[:, None])[:, 0]
        assert not isinstance(self.classes, int)
        if max(self.classes) >= logits.shape[1]:
            raise ValueError(f"classes={self.classes} are beyond the classifier's {logits.shape[1]} classes")
        return log_p[:, list(self.classes)].logsumexp(1)


def _own_labels(cond: Conditioning | None, log_p: Tensor) -> Tensor:
    labels = None if cond is None else cond.batched.get("class_labels")
    if labels is None:
        raise ValueError("these rows have no class_labels of their own; give classes=")
    if int(labels.max()) >= log_p.shape[1]:
        raise ValueError(f"the rows' labels {labels.tolist()[:8]} are beyond the {log_p.shape[1]} classes")
    return labels.to(log_p.device)
