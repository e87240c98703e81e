"""The float32 latents behind a half-precision caller, and whether the caller changed them.

Diffusers' pipelines keep latents in the model's dtype.  Rounding them to bfloat16 at each of 250 steps adds noise
of about two per cent, so the scheduler keeps what it computed and takes it up again when the caller hands back the
very tensor that it was given.

Shapes: B = rows, ... = latent shape.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class KeptLatents:
    """The tensor that the last ``step`` returned, and the same latents before rounding."""

    def __init__(self) -> None:
        self._returned: Tensor | None = None
        self._version: int | None = None
        self._exact: Tensor | None = None
        self.edits: list[Tensor] = []

    def put(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """Keep ``exact`` (B, ...) and return it in ``dtype``."""
        returned = exact if exact.dtype is dtype else exact.to(dtype)
        self._returned, self._version, self._exact = returned, _version(returned), exact
        return returned

    def take(self, sample: Tensor, *, within_step: bool) -> Tensor:
        """``sample`` (B, ...) in float32 or float64, unrounded if it is the returned tensor, untouched.

        A change of the point between two stages of one step (``within_step``) cannot be honoured: it is noted in
        ``edits``, without waiting for a device, and :meth:`report` warns of it.
        """
        same = sample is self._returned
        if same and self._exact is not None and self._version == _version(sample) is not None:
            return self._exact
        if within_step and self._returned is not None:
            if not same:
                self.edits.append(_changed(self._returned, sample))
            elif self._version is not None:
                self.edits.append(torch.tensor(True))
        return sample if sample.dtype == torch.float64 else sample.float()

    def report(self, solver: str) -> None:
        """Warn if a change was noted since the last report."""
        edits, self.edits = self.edits, []
        if any(bool(edit) for edit in edits):
            warnings.warn(
                f"the sample was changed between the stages of a {solver} step, and the change is lost; edit "
                "latents after whole steps, or use a solver with one stage such as 'exp2m'",
                stacklevel=3,
            )


def _changed(returned: Tensor, sample: Tensor) -> Tensor:
    """Whether rows of ``sample`` differ; not the second half where it repeats an unchanged first half.

    DiTPipeline under guidance copies the first half over the second before every step and drops it in the end.
    """
    rows, changed = len(sample) // 2, sample != returned
    if rows == 0 or len(sample) % 2:
        return changed.any()
    return changed[:rows].any() | (changed[rows:].any() & (sample[:rows] != sample[rows:]).any())


def _version(tensor: Tensor) -> int | None:
    """The counter of in-place changes; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
