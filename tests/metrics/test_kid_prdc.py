"""KID and PRDC against the definitions written out, and on cases with known answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gensample.metrics import kid
from gensample.metrics import prdc as prdc_module
from gensample.metrics.kid import kernel_inception_distance
from gensample.metrics.prdc import prdc


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kid_by_definition(x: Tensor, y: Tensor) -> float:
    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def test_kid_equals_its_definition_and_its_interval_the_jackknife(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "_BLOCK", 3)
    x, y = normal(8, 4), normal(7, 4, seed=1) + 0.5
    result = kernel_inception_distance(x, y, confidence=0.9)
    assert result.value == pytest.approx(kid_by_definition(x, y), rel=1e-12)
    without_x = torch.tensor([kid_by_definition(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(8)])
    without_y = torch.tensor([kid_by_definition(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(7)])
    variance = without_x.var(correction=0) * 7 + without_y.var(correction=0) * 6
    assert result.standard_error == pytest.approx(float(variance) ** 0.5, rel=1e-6)
    low, high = result.interval
    assert high - result.value == pytest.approx(1.6448536 * result.standard_error, rel=1e-6)
    assert low == pytest.approx(2 * result.value - high)


def test_kid_is_unbiased_and_its_interval_covers() -> None:
    # Same distribution: the true value is zero.
    results = [
        kernel_inception_distance(normal(100, 3, seed=2 * s), normal(100, 3, seed=2 * s + 1))
        for s in range(200)
    ]
    values = torch.tensor([r.value for r in results])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 200**0.5
    covered = sum(r.interval[0] <= 0 <= r.interval[1] for r in results) / 200
    # Under the null the statistic is degenerate and the jackknife is conservative.
    assert covered >= 0.93


def test_kid_interval_covers_a_true_difference() -> None:
    # k(x, y) in one dimension is (xy + 1)³; for N(0, 1) against N(1, 1) its means are known in closed form.
    # E over x, x' ~ N(a, 1), N(b, 1): moments m1 = ab, m2 = (1 + a²)(1 + b²), m3 = (a³ + 3a)(b³ + 3b).
    def expected(a: float, b: float) -> float:
        return (a**3 + 3 * a) * (b**3 + 3 * b) + 3 * (1 + a**2) * (1 + b**2) + 3 * a * b + 1

    truth = expected(0, 0) + expected(1, 1) - 2 * expected(0, 1)
    results = [
        kernel_inception_distance(normal(150, 1, seed=2 * s), normal(150, 1, seed=2 * s + 1) + 1)
        for s in range(200)
    ]
    covered = sum(r.interval[0] <= truth <= r.interval[1] for r in results) / 200
    assert 0.88 <= covered <= 0.99


def test_prdc_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prdc_module, "_BLOCK", 7)
    x, y, k = normal(30, 3), normal(25, 3, seed=1) * 1.5 + 0.5, 4
    result = prdc(x, y, neighbours=k)
    xx, yy, xy = torch.cdist(x, x), torch.cdist(y, y), torch.cdist(x, y)
    radius_x = xx.sort(1).values[:, k]
    radius_y = yy.sort(1).values[:, k]
    in_x = xy <= radius_x[:, None]
    assert result.precision == pytest.approx(float(in_x.any(0).double().mean()))
    assert result.recall == pytest.approx(float((xy <= radius_y[None]).any(1).double().mean()))
    assert result.density == pytest.approx(float(in_x.double().sum(0).mean() / k))
    assert result.coverage == pytest.approx(float(in_x.any(1).double().mean()))


def test_prdc_of_equal_and_of_distant_sets() -> None:
    x = normal(40, 5)
    same = prdc(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = prdc(x, x + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        kernel_inception_distance(normal(2, 3), normal(5, 3))
    with pytest.raises(ValueError, match="features must be"):
        kernel_inception_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(ValueError, match="neighbours"):
        prdc(normal(5, 3), normal(5, 3), neighbours=5)
    with pytest.raises(ValueError, match="features must be"):
        prdc(normal(5, 3), normal(5, 4))
