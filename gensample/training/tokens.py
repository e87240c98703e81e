"""Training data and loss of masked (absorbing-state) diffusion over tokens.

Shapes: B = rows, L = positions, K = tokens; tokens: (B, L) int64 in 0..K - 1; the mask is token K.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gensample.noise import philox_generator
from gensample.training.batches import Batch, Draws
from gensample.training.losses import LossOutput, Model


class TokenWindows:
    """Windows of a long sequence of tokens, each drawn at its own keyed place; a ``BatchSource``.

    tokens: (N,) integers in 0..K - 1; length: L; seed, batch_size: of the run.  loss: what draws the masks.
    """

    def __init__(
        self, tokens: np.ndarray, loss: MaskedTokenLoss, *, length: int, seed: int, batch_size: int
    ) -> None:
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or len(tokens) <= length:
            raise ValueError(
                f"tokens is {tokens.dtype} {tokens.shape}; give one sequence of more than length={length} integers"
            )
        self._tokens, self._loss, self._length = tokens, loss, length
        self._seed, self._batch_size = seed, batch_size

    def batch(self, step: int, rows: slice) -> Batch:
        """Rows ``rows`` of update ``step``: tokens (rows, L) and the draws of the loss."""
        places = philox_generator(self._seed, step, (), "train/windows").integers(
            len(self._tokens) - self._length + 1, size=self._batch_size
        )
        index = places[rows, None] + np.arange(self._length)
        tokens = torch.from_numpy(self._tokens[index].astype(np.int64))
        return {"tokens": tokens, **self._loss.draw(self._draws(step, rows), (self._length,))}

    def _draws(self, step: int, rows: slice) -> Draws:
        return Draws(self._seed, step, self._batch_size, rows)


class MaskedTokenLoss:
    """The negative evidence bound of masked diffusion on the log-linear schedule, per position in nats.

    A chance m ~ U(0, 1) masks every position; the loss is -1/(m L) sum over masked positions of log p(token)
    (MDLM, arXiv 2406.07524, equation 10).  Times of a batch are stratified, which lowers the variance.

    num_tokens: K, the id of the mask.  floor: the smallest m drawn, which bounds the weight 1/m.
    """

    def __init__(self, *, num_tokens: int, floor: float = 1e-2) -> None:
        if num_tokens < 1 or not 0 < floor < 1:
            raise ValueError(f"num_tokens={num_tokens} must be at least 1 and floor={floor} in (0, 1)")
        self._mask, self._floor = num_tokens, floor

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """masked (rows, L) bool and chance (rows,) float64; ``image_shape`` is (L,)."""
        size = draws.size
        strata = np.arange(size)[draws.rows]
        chance = self._floor + (1.0 - self._floor) * (strata + draws.uniform("chance")) / size
        positions = draws.normal("mask", image_shape).double()
        return {
            "masked": torch.special.ndtr(positions) < torch.from_numpy(chance)[:, None],
            "chance": torch.from_numpy(chance),
        }

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """As in training."""
        return self.draw(draws, image_shape)

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """The bound of every row in nats per position, (B,)."""
        tokens, masked = batch["tokens"], batch["masked"]
        logits: Tensor = model(torch.where(masked, self._mask, tokens))
        nats = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
        return LossOutput(((nats * masked).sum(1) / batch["chance"]).float() / tokens.shape[1])
