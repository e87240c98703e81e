"""Exponentiated gradient: multiplicative updates of weights, which keep every sign (Dale's law).

    w' = w exp(-eta sign(w) g),     that is     log|w'| = log|w| - eta sign(w) g

It is mirror descent with phi(w) = sum |w| log|w| - |w| (Kivinen and Warmuth, Information and Computation 132, 1997);
with Gaussian noise in g it is the Dale-Langevin update.  Changes add up in log|w|, so weights end log-normal where
gradient descent leaves them normal (Pogodin et al., arXiv 2305.19394).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_LARGEST_LOG_STEP = 1.0  # no update multiplies a weight by more than e


class ExponentiatedGradient(torch.optim.Optimizer):
    """Exponentiated gradient on tensors of two or more dimensions, gradient descent on biases and gains.

    lr: eta; momentum: of the gradients, an average with weight 1 - momentum on the newest; weight_decay: an entropic
    pull of log|w| towards 0, that is of |w| towards 1, per unit of lr (0 is off).

    Raises ValueError for options out of range, or a weight that is zero: no multiplicative update could move it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr={lr} must be positive")
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                f"momentum={momentum} must lie in [0, 1) and weight_decay={weight_decay} not be negative"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim >= 2 and bool((p == 0).any()):
                    raise ValueError(
                        f"{int((p == 0).sum())} of the {p.numel()} weights of a {tuple(p.shape)} tensor are zero, and "
                        "multiplicative updates never move them; initialise it differently, or use AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; a ``closure`` that evaluates the loss again is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient, momentum = p.grad, group["momentum"]
        assert gradient is not None
        if momentum > 0:
            average = self.state[p].setdefault("momentum", torch.zeros_like(p))
            gradient = average.lerp_(gradient, 1.0 - momentum)
        if p.ndim < 2:
            p.sub_(group["lr"] * gradient)
            return
        log_step = -p.sign() * gradient
        if group["weight_decay"]:
            log_step = log_step - group["weight_decay"] * p.abs().log()
        p.mul_((group["lr"] * log_step).clamp_(-_LARGEST_LOG_STEP, _LARGEST_LOG_STEP).exp_())
