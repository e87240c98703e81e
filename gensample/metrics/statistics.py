"""Streaming mean and covariance of features in float64, with merging and files.

Sums are taken about a shift (the mean of the first batch), so that features with a mean far above their
spread lose no digits; parts are joined by Chan, Golub and LeVeque (1979), Eq. (2.1):

    n = n₁ + n₂,   δ = μ₂ − μ₁,   μ = μ₁ + δ n₂/n,   S = S₁ + S₂ + δδᵀ n₁n₂/n            (1)

Shapes: N samples, D features; features (N, D), mean (D,), scatter and covariance (D, D).
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .frechet import ArrayLike, FrechetResult, frechet_distance

FORMAT = "gensample-feature-statistics-1"


class FeatureStatistics:
    """Sample count, mean and covariance of features, gathered batch by batch.

    Memory is D² float64 whatever the number of samples. `metadata` (JSON values) travels with the file:
    which features, resize mode and files the numbers came from. `n` is None for statistics read from a file
    that does not say (pytorch-fid's npz): such statistics can be compared but not updated or merged.
    """

    def __init__(self, num_features: int, *, metadata: dict[str, Any] | None = None) -> None:
        if num_features < 1:
            raise ValueError(f"num_features must be positive; got {num_features}")
        self.num_features = num_features
        self.n: int | None = 0
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._shift = torch.zeros(num_features, dtype=torch.float64)
        self._sum = torch.zeros(num_features, dtype=torch.float64)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64)

    @classmethod
    def from_features(
        cls, features: ArrayLike, *, metadata: dict[str, Any] | None = None
    ) -> FeatureStatistics:
        """Return the statistics of one (N, D) array of features."""
        x = torch.as_tensor(features)
        if x.ndim != 2:
            raise ValueError(f"features must be (N, D); got shape {tuple(x.shape)}")
        return cls(x.shape[1], metadata=metadata).update(x)

    @classmethod
    def from_moments(
        cls, mean: ArrayLike, covariance: ArrayLike, n: int | None, *, metadata: dict[str, Any] | None = None
    ) -> FeatureStatistics:
        """Return statistics with a given mean (D,), unbiased covariance (D, D) and count (None: unknown).

        Raises:
            ValueError: shapes that do not fit, non-finite entries, or n < 2.
        """
        mu, sigma = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
        if mu.ndim != 1 or sigma.shape != (mu.numel(), mu.numel()):
            raise ValueError(
                f"mean must be (D,) and covariance (D, D); got {tuple(mu.shape)}, {tuple(sigma.shape)}"
            )
        if not (bool(mu.isfinite().all()) and bool(sigma.isfinite().all())):
            raise ValueError("mean or covariance holds non-finite values")
        if n is not None and n < 2:
            raise ValueError(f"n must be at least 2; got {n}")
        if n is not None:
            return cls.from_scatter(mu, sigma * (n - 1), n, metadata=metadata)
        out = cls(mu.numel(), metadata=metadata)
        out.n, out._shift, out._outer = None, mu.clone(), sigma.clone()
        return out

    @classmethod
    def from_scatter(
        cls, mean: Tensor, scatter: Tensor, n: int, *, metadata: dict[str, Any] | None = None
    ) -> FeatureStatistics:
        """Return statistics of n >= 0 samples with this mean (D,) and scatter about it (D, D), float64."""
        out = cls(mean.numel(), metadata=metadata)
        out.n, out._shift, out._outer = n, mean.double().clone(), scatter.double().clone()
        return out

    def update(self, features: ArrayLike) -> FeatureStatistics:
        """Add a batch of features (B, D), any float dtype, any device; return self.

        Raises:
            ValueError: wrong shape, a non-finite feature, or statistics of unknown count.
        """
        x = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"features must be (B, {self.num_features}); got shape {tuple(x.shape)}")
        n = self._known_count()
        if x.shape[0] == 0:
            return self
        if not bool(x.isfinite().all()):
            row = int((~x.isfinite()).any(1).nonzero()[0, 0])
            raise ValueError(f"non-finite feature in row {row} of the batch (sample {n + row})")
        if n == 0:
            self._shift = x.mean(0)
        x = x - self._shift
        self._sum += x.sum(0)
        self._outer.addmm_(x.T, x)
        self.n = n + x.shape[0]
        return self

    @property
    def mean(self) -> Tensor:
        """Mean (D,) in float64; zeros while empty."""
        return self._shift + self._sum / self.n if self.n else self._shift.clone()

    @property
    def scatter(self) -> Tensor:
        """Sum of outer products about the mean (D, D) in float64."""
        n = self._known_count()
        return self._outer - torch.outer(self._sum, self._sum) / n if n else self._outer.clone()

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D) in float64. Raises ValueError with fewer than two samples."""
        if self.n is None:
            return self._outer.clone()
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples; these statistics hold {self.n}")
        return self.scatter / (self.n - 1)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets of samples together, Eq. (1); neither argument changes."""
        return merge_statistics([self, other])

    def frechet_distance(self, other: FeatureStatistics) -> FrechetResult:
        """Return the Fréchet distance to other statistics of the same features."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def save(self, path: str | os.PathLike[str], *, features: Tensor | None = None) -> None:
        """Write mu, sigma, n and metadata to a safetensors file, atomically.

        Args:
            path: the file to write; its folder must exist.
            features: optional (K, D) kept features (float32), so that later runs can compute KID and PRDC.

        Raises:
            ValueError: fewer than two samples.
            OSError: the file cannot be written; nothing partial remains.
        """
        tensors = {"mu": self.mean.contiguous(), "sigma": self.covariance.contiguous()}
        if self.n is not None:
            tensors["n"] = torch.tensor([self.n], dtype=torch.int64)
        if features is not None:
            tensors["features"] = features.to("cpu", torch.float32).contiguous()
        target = Path(path)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
        os.close(descriptor)
        try:
            save_file(tensors, temporary, metadata={"format": FORMAT, "gensample": json.dumps(self.metadata)})
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read statistics from our safetensors, or from a pytorch-fid / ADM npz with `mu` and `sigma`.

        Never unpickles.

        Raises:
            ValueError: not such a file, truncated, or with missing or malformed entries; names the file.
        """
        file = Path(path)
        try:
            if file.suffix.lower() == ".npz":
                with np.load(file, allow_pickle=False) as data:
                    return cls.from_moments(data["mu"], data["sigma"], None, metadata={"source": file.name})
            with safe_open(file, framework="pt") as handle:
                header = handle.metadata() or {}
                metadata = json.loads(header.get("gensample", "{}"))
                n = int(handle.get_tensor("n").item()) if "n" in handle.keys() else None  # noqa: SIM118
                mu, sigma = handle.get_tensor("mu"), handle.get_tensor("sigma")
                return cls.from_moments(mu, sigma, n, metadata=metadata)
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(
                f"{file}: not feature statistics ({error}); expected safetensors written by "
                "`gensample stats`, or an npz with mu and sigma"
            ) from error

    def _known_count(self) -> int:
        if self.n is None:
            raise ValueError("these statistics came without a sample count: they cannot be updated or merged")
        return self.n


def load_kept_features(path: str | os.PathLike[str]) -> Tensor | None:
    """Return the features (K, D) kept in a statistics file of ours, or None where it has none."""
    file = Path(path)
    if file.suffix.lower() == ".npz":
        return None
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor("features") if "features" in handle.keys() else None  # noqa: SIM118


def merge_statistics(parts: Iterable[FeatureStatistics]) -> FeatureStatistics:
    """Join statistics of disjoint samples by Eq. (1); empty parts are welcome.

    Parts are sorted by their contents first, so the result is the same bit for bit in any order.

    Raises:
        ValueError: no part at all, different widths, or a part of unknown count.
    """
    ordered = sorted(parts, key=lambda part: (part._known_count(), part.mean.numpy().tobytes()))
    if not ordered:
        raise ValueError("nothing to merge: the list of statistics is empty")
    widths = {part.num_features for part in ordered}
    if len(widths) != 1:
        raise ValueError(f"cannot merge statistics of different widths {sorted(widths)}")
    width = widths.pop()
    n, mean = 0, torch.zeros(width, dtype=torch.float64)
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for part in ordered:
        m = part._known_count()
        if m == 0:
            continue
        delta = part.mean - mean
        scatter = scatter + part.scatter + torch.outer(delta, delta) * (n * m / (n + m))
        mean = mean + delta * (m / (n + m))
        n += m
    return FeatureStatistics.from_scatter(mean, scatter, n, metadata=ordered[-1].metadata)
