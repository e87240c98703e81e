"""`gensample.metrics.FrechetDistance` where torchmetrics' own goes wrong: dtype, empty ranks, merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MetricCollection

from gensample.metrics import FeatureStatistics, FrechetDistance


def features(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + seed


def filled(batch: int = 17) -> FrechetDistance:
    metric = FrechetDistance(num_features=8)
    for real in (True, False):
        for chunk in features(60, int(real)).split(batch):  # type: ignore[no-untyped-call]
            metric.update(chunk, real=real)
    return metric


def expected() -> float:
    a, b = (FeatureStatistics.from_features(features(60, s)) for s in (1, 0))
    return a.frechet_distance(b).value


@pytest.mark.parametrize("batch", [1, 17, 60])
def test_value(batch: int) -> None:
    value = filled(batch).compute()
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected(), rel=1e-12)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.float, lambda m: m.set_dtype(torch.float16)])
def test_half_precision_keeps_float64_sums(cast: Callable[[Any], Any]) -> None:
    metric = FrechetDistance(num_features=8)
    cast(metric)
    for real in (True, False):
        metric.update(features(60, int(real)).half(), real=real)
    a, b = (FeatureStatistics.from_features(features(60, s).half()) for s in (1, 0))
    assert metric.real.dtype == torch.float64
    assert float(metric.compute()) == pytest.approx(a.frechet_distance(b).value, rel=1e-12)


def test_extractor_reset_collection_and_forward() -> None:
    metric = FrechetDistance(nn.Flatten(), num_features=8)
    images = features(40, 0).reshape(40, 2, 2, 2)
    collection = MetricCollection({"fd": metric})
    collection.update(images, real=True)
    collection.update(images + 1, real=False)
    assert float(collection.compute()["fd"]) == pytest.approx(8.0, rel=1e-9)
    collection.reset()
    assert float(metric.real.abs().sum()) == 0
    # forward() computes on the batch and merges it into the state.
    metric.update(images, real=True)
    metric.update(images[:20] + 1, real=False)
    state = metric.fake.clone()
    with pytest.raises(ValueError, match="2 real samples"):
        metric(images[20:] + 1, real=False)
    assert not torch.equal(metric.fake, torch.zeros_like(state))


def test_state_survives_saving() -> None:
    metric = filled()
    metric.persistent(True)
    other = FrechetDistance(num_features=8)
    other.load_state_dict(metric.state_dict())
    other.update(torch.zeros(0, 8), real=True)
    assert float(other.compute()) == float(metric.compute())


@pytest.mark.parametrize("size", [2, 3])
def test_uneven_and_empty_ranks(run_ranks: Callable[..., list[Any]], size: int) -> None:
    def compute() -> float:
        dist.init_process_group("gloo")
        try:
            metric = FrechetDistance(num_features=8)
            # Rank 0 has most of the images, the last rank none of either side.
            if dist.get_rank() < size - 1:
                cut = slice(0, 50) if dist.get_rank() == 0 else slice(50, 60)
                cut = slice(0, 60) if size == 2 else cut
                for real in (True, False):
                    metric.update(features(60, int(real))[cut], real=real)
            return float(metric.compute())
        finally:
            dist.destroy_process_group()

    results = run_ranks(size, compute)
    assert results == [results[0]] * size
    assert results[0] == pytest.approx(expected(), rel=1e-9)


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="num_features"):
        FrechetDistance(num_features=0)
    metric = FrechetDistance(num_features=8)
    with pytest.raises(ValueError, match=r"\(B, 8\)"):
        metric.update(torch.zeros(3, 9), real=True)
    with pytest.raises(ValueError, match="non-finite"):
        metric.update(torch.full((3, 8), torch.nan), real=True)
    metric.update(torch.zeros(0, 8), real=True)
    with pytest.raises(ValueError, match="2 real samples"):
        metric.compute()
