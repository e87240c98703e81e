"""FlowMatchEuler on evenly spaced noise levels, shifted once: the grid on which policies are trained."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from gensample.schedulers.interpolant_grid import trailing_sigmas


class TrailingFlowMatchEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEuler over sigma = 1, ..., 1/N before its shift, where nobody gives it other levels.

    FlowMatchEuler's own levels end on one that was shifted twice (20 steps at shift 3: .150, .009, 0): an almost empty
    step, which matters where the step before it draws noise.
    """

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None,
        mu: float | None = None, timesteps: Any = None,
    ) -> None:  # fmt: skip
        """As FlowMatchEuler's."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = trailing_sigmas(num_inference_steps, None)
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
