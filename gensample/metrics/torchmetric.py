"""The Fréchet distance as a torchmetrics `Metric`.

Unlike torchmetrics' own: the state is float64 whatever dtype the metric or the features are set to, the
result is a float64 scalar, a rank without a single image takes part in the sync, and parts are merged about
their means.

Shapes: B images, D features; state of one side (D + 1, D + 1) = [[n, μᵀ], [μ, scatter]].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from .frechet import frechet_distance
from .statistics import FeatureStatistics, merge_statistics


def _merge_states(stacked: Tensor) -> Tensor:
    """Merge packed states (W, D + 1, D + 1) of disjoint samples into one."""
    return _pack(merge_statistics(_unpack(state) for state in stacked)).to(stacked.device)


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and generated images.

    Args:
        feature_extractor: maps a batch of images to features (B, D); None when `update` is given features.
        num_features: D. Needed beforehand, so that a rank that never sees an image has a state to sync.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    real: Tensor
    fake: Tensor

    def __init__(
        self,
        feature_extractor: nn.Module | Callable[[Tensor], Tensor] | None = None,
        *,
        num_features: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_features < 1:
            raise ValueError(f"num_features must be positive; got {num_features}")
        self.feature_extractor = feature_extractor
        self.num_features = num_features
        size = num_features + 1
        for name in ("real", "fake"):
            self.add_state(name, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx=_merge_states)

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Add a batch: images for the extractor, or features (B, D) without one; B may be 0.

        Raises:
            ValueError: features that are not (B, num_features), or not finite.
        """
        features = self.feature_extractor(images) if self.feature_extractor is not None else images
        name = "real" if real else "fake"
        state: Tensor = getattr(self, name)
        statistics = _unpack(state)
        batch = FeatureStatistics(self.num_features).update(features)
        setattr(self, name, _pack(merge_statistics([statistics, batch])).to(state.device))

    def compute(self) -> Tensor:
        """Return the distance of all that was added on all processes: a float64 scalar.

        Raises:
            ValueError: fewer than two samples on a side.
        """
        real, fake = _unpack(self.real), _unpack(self.fake)
        for name, side in (("real", real), ("generated", fake)):
            if (side.n or 0) < 2:
                raise ValueError(f"the Fréchet distance needs at least 2 {name} samples; got {side.n}")
        value = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance).value
        return torch.tensor(value, dtype=torch.float64, device=self.real.device)

    def set_dtype(self, dst_type: str | torch.dtype) -> FrechetDistance:
        """Keep the statistics in float64; only the extractor, if a module, takes the dtype."""
        if isinstance(self.feature_extractor, nn.Module):
            self.feature_extractor.to(dst_type)
        return self


def _pack(statistics: FeatureStatistics) -> Tensor:
    d = statistics.num_features
    state = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    state[0, 0] = statistics.n or 0
    state[0, 1:] = state[1:, 0] = statistics.mean
    state[1:, 1:] = statistics.scatter
    return state


def _unpack(state: Tensor) -> FeatureStatistics:
    state = state.detach().to("cpu", torch.float64)
    return FeatureStatistics.from_scatter(state[1:, 0], state[1:, 1:], round(float(state[0, 0])))
