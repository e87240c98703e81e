"""A denoiser, a guidance rule and a transition law as a :class:`~gensample.trees.chain.Chain`.

Shapes: B = rows, ... = latent shape; x: (B, ...); level, sample: (B,) int64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.denoisers import Conditioning, Denoiser
from gensample.guidance import DenoiserCalls, Guidance
from gensample.interpolants import axpby, convert
from gensample.noise import NoiseStream
from gensample.schedulers.transitions import law_of
from gensample.solvers import Solver
from gensample.transitions import Transition
from gensample.trees.chain import Answer, Chain, Int64

Law = Callable[..., Transition]


class DenoiserChain(Chain):
    """The guided denoiser under a one-stage law: the policy itself, guidance included.

    denoiser: with its conditioning bound, one row per prompt; ``sample`` picks among them.
    law: ``law(i, x, output, output_type=..., [variance=...]) -> Transition`` for steps i (B,) long, as
        ``MarkovSolver.transition`` and ``law_of(scheduler)`` are.
    times: the N + 1 canonical times of the levels.
    guidance: a rule without memory; None is the plain conditional model.
    micro_batch: rows of one network call.
    on_evaluations: called with ``evaluations`` after every network call, for progress bars; raising in it cancels.

    Raises ValueError for guidance that carries state from step to step, or a grid of fewer than two times.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        law: Law,
        times: Sequence[float],
        *,
        guidance: Guidance | None = None,
        micro_batch: int = 64,
        initial: Callable[[Tensor], Tensor] = lambda noise: noise,
        on_evaluations: Callable[[int], None] | None = None,
    ) -> None:
        if guidance is not None and guidance.has_memory:
            raise ValueError(
                f"guidance={guidance!r} carries state from step to step, which a tree node does not keep; use its "
                "form without memory (for GFCG: lagged=False)"
            )
        if len(times) < 2:
            raise ValueError(f"times={list(times)!r} must hold at least two times")
        if micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch} must be at least 1")
        self.denoiser, self.law, self.guidance = denoiser, law, guidance
        self.times = np.asarray(times, dtype=np.float64)
        self.num_steps = len(times) - 1
        self.shape = denoiser.latent_shape
        self.micro_batch = micro_batch
        self.rows_per_answer = _rows_of(guidance)
        self._initial, self._on_evaluations = initial, on_evaluations
        self._before = denoiser.evaluations
        variance_type = getattr(getattr(law, "config", None), "variance_type", "")
        # DDPM's law alone reads the network's variance; DDIM's has an eta.
        self._reads_variance = "learned" in variance_type and getattr(law, "eta", 0.0) is None
        blank = torch.zeros(1, *self.shape)
        probe = self._variance_of(Answer(blank, blank))
        steps = range(self.num_steps)
        self._stochastic = [not law(i, blank, blank, **probe).is_deterministic for i in steps]

    @classmethod
    def from_solver(cls, denoiser: Denoiser, solver: Solver, **options: Any) -> DenoiserChain:
        """Under one of our one-stage solvers, such as ``make_solver("exp", ...)``.

        Raises ValueError for a solver that is not Markov in x alone, or a deterministic one.
        """
        if not solver.is_markov:
            raise ValueError(
                f"solver={solver.name!r} carries history from step to step, so a state alone has no future law; "
                "use solver='exp'"
            )
        chain = cls(denoiser, solver.transition, solver.times, initial=solver.initial, **options)
        return chain._checked(f"solver={solver.name!r}", "solver='exp' with a positive diffusion scale")

    @classmethod
    def from_scheduler(
        cls,
        denoiser: Denoiser,
        num_inference_steps: int,
        *,
        law: dict[str, Any] | None = None,
        **options: Any,
    ) -> DenoiserChain:
        """Under the pipeline's own scheduler: DDPM, DDIM (eta 1), FlowMatchEuler (``flow`` kernel) or ours.

        law: keyword arguments of ``gensample.schedulers.law_of``, such as {"eta": 0.5}.
        """
        scheduler = denoiser.prepared_scheduler(num_inference_steps)
        times = denoiser.times(num_inference_steps)
        chain = cls(denoiser, law_of(scheduler, **(law or {})), times, **options)
        return chain._checked(type(scheduler).__name__, "eta=1 (DDIM) or a positive scale (flow)")

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Denoiser evaluations since the chain was made."""
        return self.denoiser.evaluations - self._before

    def initial(self, noise: NoiseStream) -> Tensor:
        """Standard normal states at level 0, from the streams' "init" draws."""
        return self._initial(noise.normal(self.shape, purpose="init").to(self.denoiser.device))

    def answer(self, x: Tensor, level: Int64, sample: Int64, *, grad: bool = False) -> Answer:
        """One guided evaluation a row, ``micro_batch`` rows a call."""
        spans = [slice(i, i + self.micro_batch) for i in range(0, len(x), self.micro_batch)]
        parts = []
        with torch.set_grad_enabled(grad):
            for s in spans:
                parts.append(self._call(x[s], self.times[level[s]], sample[s], grad))
                if self._on_evaluations is not None:
                    self._on_evaluations(self.evaluations)
        return Answer.cat(parts)

    def transition(self, x: Tensor, level: Int64, answer: Answer) -> Transition:
        """The law of step ``level`` of every row."""
        return self.law(torch.from_numpy(level), x, answer.output, **self._variance_of(answer))

    def x0(self, x: Tensor, level: Int64, answer: Answer) -> Tensor:
        """The predicted clean sample (B, ...); ValueError for an epsilon model at zero signal-to-noise ratio."""
        c = self.denoiser.path.coefficients(self.times[level])
        return convert(answer.output, x.to(answer.output), c, self.denoiser.prediction_type, "x0")

    def decode(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """Images (B, C, H, W) in [0, 1], in the denoiser's micro-batches."""
        return self.denoiser.decode(x, grad=grad)

    def is_stochastic(self, step: int) -> bool:
        """Whether step ``step`` draws noise."""
        return self._stochastic[step]

    def renoise(self, x: Tensor, start: Int64, stop: Int64, noise: Tensor) -> Tensor:
        """x' = c x + sqrt(alpha'^2 - c^2 alpha^2) noise with c = beta'/beta: the forward process from x."""
        here = self.denoiser.path.coefficients(self.times[start])
        there = self.denoiser.path.coefficients(self.times[stop])
        c = np.asarray(there.beta) / np.asarray(here.beta)
        std = np.sqrt(np.maximum(np.asarray(there.alpha) ** 2 - (c * np.asarray(here.alpha)) ** 2, 0.0))
        return axpby(c, x, std, noise.to(x))

    def conditioning(self, sample: Int64) -> Conditioning:
        """The rows' conditioning."""
        return self.denoiser.conditioning.rows(sample.tolist())

    def _call(self, x: Tensor, t: np.ndarray, sample: Int64, grad: bool) -> Answer:
        cond = self.conditioning(sample)
        times = torch.from_numpy(t)
        if self.guidance is not None:
            return Answer(self.guidance(x, times, DenoiserCalls(self.denoiser, grad), cond, None).output)
        native = self.denoiser.denoise(x, times, cond, grad=grad)
        return Answer(native.output, native.variance)

    def _variance_of(self, answer: Answer) -> dict[str, Tensor]:
        """The variance argument, where the law reads one and the network gave one."""
        if not self._reads_variance or answer.variance is None:
            return {}
        return {"variance": answer.variance}

    def _checked(self, name: str, fix: str) -> DenoiserChain:
        if not any(self._stochastic):
            raise ValueError(f"{name} is deterministic: every child would equal its sibling; use {fix}")
        return self


def _rows_of(guidance: Guidance | None) -> int:
    """Network rows that one guided row takes at most: the plain answer, and one for every contrast."""
    if guidance is None or getattr(guidance, "scale", None) == 1.0:
        return 1
    adds = getattr(guidance, "combine", None) == "add" and getattr(guidance, "base", None) is not None
    return 3 if adds else 2
