"""The Markov chain that search and policy gradients walk: from noise (level 0) to data (level N), a step at a time.

A *level* i = 0, ..., N is where a state stands; *step* i leads from level i to i + 1.  Rows may stand at different
levels of one batch.  An :class:`Answer` is what one network evaluation said at a state: all children of the state
share it, and so does whatever scores the state by its predicted clean sample.

Shapes: B = rows, ... = latent shape; x: (B, ...); level, start, stop: (B,) int64 on the host; sample: (B,) int64, the
row's prompt (a row of the bound conditioning).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gensample.denoisers import Conditioning
from gensample.noise import NoiseStream
from gensample.transitions import Transition

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """One network evaluation a row: the (guided) native output (B, ...), and its learned variance, if any."""

    output: Tensor
    variance: Tensor | None = None

    def rows(self, index: Int64 | Tensor) -> Answer:
        """Some rows, in any order, repeats allowed: how children share their parent's evaluation."""
        index = torch.as_tensor(index, device=self.output.device)
        return Answer(self.output[index], None if self.variance is None else self.variance[index])

    def placed(self, index: Tensor, rows: int, others: Answer | None = None) -> Answer:
        """``rows`` answers with these at ``index`` (B,), and elsewhere those of ``others``, or zeros."""

        def place(values: Tensor, into: Tensor | None) -> Tensor:
            if into is None:
                into = values.new_zeros(rows, *values.shape[1:])
            return into.index_copy(0, index.to(values.device), values)

        if len(self.output) == rows:
            return self
        rest = (None, None) if others is None else (others.output, others.variance)
        variance = None if self.variance is None else place(self.variance, rest[1])
        return Answer(place(self.output, rest[0]), variance)

    @classmethod
    def cat(cls, parts: list[Answer]) -> Answer:
        """The rows of all ``parts``."""
        variances = [p.variance for p in parts if p.variance is not None]
        return cls(torch.cat([p.output for p in parts]), torch.cat(variances) if variances else None)


class Chain(ABC):
    """A sampler as a Markov chain: its prior, its steps, its predicted clean samples, and what it has cost.

    Attributes:
        num_steps: N.
        shape: the latent shape of one state.
        evaluations: denoiser evaluations so far, a row counting one (every network of the guidance counts).
        rows_per_answer: denoiser evaluations that one row of an answer takes at most.
    """

    num_steps: int
    shape: tuple[int, ...]
    evaluations: int
    rows_per_answer: int = 1

    @abstractmethod
    def initial(self, noise: NoiseStream) -> Tensor:
        """States at level 0 (B, ...) from the rows' own streams, purpose "init"."""

    @abstractmethod
    def answer(self, x: Tensor, level: Int64, sample: Int64, *, grad: bool = False) -> Answer:
        """One evaluation of every row (level < N), in micro-batches; ``grad=True`` keeps the graph to x."""

    @abstractmethod
    def transition(self, x: Tensor, level: Int64, answer: Answer) -> Transition:
        """The law of step ``level`` of every row."""

    @abstractmethod
    def x0(self, x: Tensor, level: Int64, answer: Answer) -> Tensor:
        """The predicted clean sample E[x_N | x] (B, ...) that ``answer`` means at x."""

    @abstractmethod
    def decode(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """Clean states (B, ...) as what rewards read: images (B, C, H, W) in [0, 1], or the states themselves."""

    @abstractmethod
    def is_stochastic(self, step: int) -> bool:
        """Whether step ``step`` draws noise, so that two children of one state differ."""

    def renoise(self, x: Tensor, start: Int64, stop: Int64, noise: Tensor) -> Tensor:
        """States at the noisier levels stop < start, from x and standard normal ``noise`` (B, ...) of its shape.

        Raises ValueError for a chain that cannot go back.
        """
        raise ValueError(f"{type(self).__name__} has no forward process to go back along")

    def conditioning(self, sample: Int64) -> Conditioning | None:
        """The rows' conditioning, for rewards; None where the model has none."""
        return None

    def propagate(
        self,
        x: Tensor,
        start: Int64,
        stop: Int64,
        noise: NoiseStream,
        sample: Int64,
        *,
        first: Answer | None = None,
    ) -> Tensor:
        """States (B, ...) at levels ``stop``, each row walked from its own ``start``.

        Step i of row r draws from its stream at path (i,), purpose "step", so the result depends on the row's
        stream only.  ``first``: answers at the start, which children of one parent share; without it they are
        evaluated.

        Raises ValueError unless 0 <= start < stop <= N, FloatingPointError where a state stops being finite.
        """
        start, stop = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
        if len(x) and not (start.min() >= 0 and (start < stop).all() and stop.max() <= self.num_steps):
            raise ValueError(
                f"edges {start.tolist()} -> {stop.tolist()} must rise within 0..{self.num_steps}"
            )
        x, level = x.clone(), start.copy()
        known, is_stale = first, np.full(len(x), first is None)
        while (rows := np.flatnonzero(level < stop)).size:
            at = torch.from_numpy(rows)
            here, levels, samples = x[at], level[rows], sample[rows]
            answer = self._answers(known, is_stale[rows], rows, here, levels, samples)
            law = self.transition(here, levels, answer)
            there = law.sample(law.draw_noise(noise.select(rows.tolist()).extend(levels), path=())).to(
                x.dtype
            )
            _require_finite(there, levels, samples)
            x[at] = there
            level[rows] += 1
            holds = self.answer_holds(here, there)
            is_stale[rows] = ~holds
            if holds.any():
                known = answer.placed(at, len(x), known)
        return x

    def answer_holds(self, before: Tensor, after: Tensor) -> NDArray[np.bool_]:
        """Rows (B,) whose answer at ``before`` is also that one step later, at ``after``: none, where the network sees
        the level."""
        return np.zeros(len(after), dtype=bool)

    def _answers(
        self,
        known: Answer | None,
        is_stale: NDArray[np.bool_],
        rows: Int64,
        x: Tensor,
        level: Int64,
        sample: Int64,
    ) -> Answer:
        """The answers of ``rows``, standing at x: those of ``known`` (all rows), and where stale, new ones."""
        if known is None or is_stale.all():
            return self.answer(x, level, sample)
        kept = known.rows(rows)
        if not is_stale.any():
            return kept
        asked = torch.from_numpy(np.flatnonzero(is_stale))
        fresh = self.answer(x[asked], level[is_stale], sample[is_stale])
        return fresh.placed(asked, len(rows), kept)


def _require_finite(x: Tensor, level: Int64, sample: Int64) -> None:
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
        raise FloatingPointError(
            f"step {level[row]} left sample {sample[row]} with values that are not finite"
        )
