"""Masked (absorbing-state) discrete diffusion as a chain: tokens appear one step after another.

With m_i the chance that a token is still masked at level i (m_0 = 1, m_N = 0), step i keeps a masked position masked
with probability m_{i+1}/m_i and otherwise draws its token from the network's p(v | x); what is unmasked stays
(Sahoo et al., MDLM, arXiv 2406.07524, equation 7).  The network sees no time, so where a step unmasks nothing its
answer still holds and no evaluation is spent: with as many steps as positions that is (1 - 1/L)^L = 37 % of them.

Shapes: B = rows, L = positions, K = tokens; x: (B, L) int64 in 0..K, K being the mask; logits: (B, L, K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gensample.noise import NoiseStream
from gensample.transitions import CategoricalTransition
from gensample.trees.chain import Answer, Chain, Int64


def masking_schedule(num_steps: int) -> list[float]:
    """The log-linear schedule m_i = 1 - i/N for N steps: every step unmasks as many positions on average."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    return [1.0 - i / num_steps for i in range(num_steps + 1)]


class MaskedChain(Chain):
    """A time-free masked language model as a sampler.

    logits: tokens (B, L) int64, the mask being K, to logits (B, L, K) of the clean tokens.
    num_tokens: K.  length: L.
    masked: m_0, ..., m_N, falling strictly from 1 to 0; see :func:`masking_schedule`.
    decode: finished tokens (B, L) as what rewards read; default the tokens.
    micro_batch: rows of one network call.

    Raises ValueError for a schedule that does not fall from 1 to 0.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        *,
        num_tokens: int,
        length: int,
        masked: Sequence[float],
        decode: Callable[[Tensor], Tensor] | None = None,
        micro_batch: int = 64,
    ) -> None:
        m = np.asarray(masked, dtype=np.float64)
        if m.ndim != 1 or len(m) < 2 or m[0] != 1.0 or m[-1] != 0.0 or not (np.diff(m) < 0).all():
            raise ValueError(f"masked={list(masked)!r} must fall strictly from 1 to 0")
        if num_tokens < 1 or length < 1 or micro_batch < 1:
            raise ValueError(
                f"num_tokens={num_tokens}, length={length} and micro_batch={micro_batch} must be at least 1"
            )
        self.num_tokens, self.micro_batch = num_tokens, micro_batch
        self.shape, self.num_steps = (length,), len(m) - 1
        self.evaluations = 0
        self._logits, self._decode = logits, decode
        self._stay = torch.from_numpy(m[1:] / m[:-1])

    def initial(self, noise: NoiseStream) -> Tensor:
        """All positions masked, (B, L)."""
        return torch.full((len(noise), *self.shape), self.num_tokens, dtype=torch.int64)

    def answer(self, x: Tensor, level: Int64, sample: Int64, *, grad: bool = False) -> Answer:
        """Log-probabilities of the clean tokens, (B, L, K)."""
        self.evaluations += len(x)
        with torch.set_grad_enabled(grad):
            parts = [self._logits(part).log_softmax(-1) for part in x.split(self.micro_batch)]
        return Answer(torch.cat(parts))

    def transition(self, x: Tensor, level: Int64, answer: Answer) -> CategoricalTransition:
        """The law of the next tokens, (B, L, K + 1) log-probabilities, the mask being the last."""
        stay = self._stay[torch.from_numpy(level)][:, None, None].to(answer.output)
        log_stay = stay.log().expand(*answer.output.shape[:2], 1)
        masked = torch.cat([answer.output + (-stay).log1p(), log_stay], dim=-1)
        kept = torch.full_like(masked, -torch.inf).scatter_(-1, x[..., None], 0.0)
        return CategoricalTransition(torch.where((x == self.num_tokens)[..., None], masked, kept))

    def x0(self, x: Tensor, level: Int64, answer: Answer) -> Tensor:
        """The most likely token in every masked position, each by itself; the others as they are, (B, L)."""
        return torch.where(x == self.num_tokens, answer.output.argmax(-1), x)

    def decode(self, x: Tensor, *, grad: bool = False) -> Tensor:
        """Finished tokens as what rewards read."""
        return x if self._decode is None else self._decode(x)

    def is_stochastic(self, step: int) -> bool:
        """True: every step may unmask."""
        return True

    def answer_holds(self, before: Tensor, after: Tensor) -> NDArray[np.bool_]:
        """Rows whose step unmasked nothing: the network sees no time."""
        return (before == after).all(1).numpy()
