"""Streaming statistics: exactness, order, merging, files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from gensample.metrics import FeatureStatistics, merge_statistics
from gensample.metrics.statistics import load_kept_features


def features(n: int = 200, d: int = 12, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + offset


@pytest.mark.parametrize("batch", [1, 7, 64, 200])
def test_streaming_equals_numpy(batch: int) -> None:
    x = features()
    s = FeatureStatistics(12)
    for chunk in x.split(batch):  # type: ignore[no-untyped-call]
        s.update(chunk)
    assert s.n == 200
    np.testing.assert_allclose(s.mean.numpy(), x.numpy().mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(s.covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-13)


def test_large_mean_loses_no_digits() -> None:
    x = features(offset=1e6)
    exact = np.cov((x - 1e6).numpy(), rowvar=False)
    assert np.abs(FeatureStatistics.from_features(x).covariance.numpy() - exact).max() < 1e-9


def test_merging_does_not_depend_on_order_bit_for_bit() -> None:
    parts = [FeatureStatistics.from_features(part) for part in features(90).split([10, 30, 1, 49])]  # type: ignore[no-untyped-call]
    parts.append(FeatureStatistics(12))
    first = merge_statistics(parts)
    for order in itertools.permutations(parts):
        merged = merge_statistics(order)
        assert merged.n == 90
        assert torch.equal(merged.mean, first.mean)
        assert torch.equal(merged.covariance, first.covariance)
    whole = FeatureStatistics.from_features(features(90))
    torch.testing.assert_close(first.covariance, whole.covariance, rtol=0, atol=1e-14)


def test_merge_leaves_its_arguments_alone() -> None:
    a, b = FeatureStatistics.from_features(features(20)), FeatureStatistics.from_features(features(30) + 1)
    before = a.covariance
    assert a.merge(b).n == 50
    assert torch.equal(a.covariance, before)


def test_file_round_trip(tmp_path: Path) -> None:
    x = features()
    s = FeatureStatistics.from_features(x, metadata={"features": "probe", "source": {"images": 200}})
    path = tmp_path / "ref.safetensors"
    s.save(path, features=x[:50])
    loaded = FeatureStatistics.load(path)
    assert loaded.n == 200
    assert loaded.metadata == s.metadata
    assert torch.equal(loaded.mean, s.mean)
    torch.testing.assert_close(loaded.covariance, s.covariance, rtol=1e-15, atol=0)
    kept = load_kept_features(path)
    assert kept is not None
    assert torch.equal(kept, x[:50].float())
    # Loaded statistics can go on growing.
    assert loaded.update(x).n == 400
    assert [p.name for p in tmp_path.iterdir()] == ["ref.safetensors"]


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        FeatureStatistics(3).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_reads_pytorch_fid_and_adm_npz_without_pickle(tmp_path: Path) -> None:
    x = features()
    mu, sigma = x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    loaded = FeatureStatistics.load(tmp_path / "fid.npz")
    assert loaded.n is None
    assert loaded.frechet_distance(FeatureStatistics.from_features(x)).value < 1e-12
    with pytest.raises(ValueError, match="without a sample count"):
        loaded.update(x)
    np.savez(tmp_path / "evil.npz", mu=np.array([{"a": 1}], dtype=object), sigma=sigma)
    with pytest.raises(ValueError, match="allow_pickle"):
        FeatureStatistics.load(tmp_path / "evil.npz")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.npz"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=name):
        FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "missing.safetensors")


def test_bad_batches_are_refused() -> None:
    s = FeatureStatistics(4)
    with pytest.raises(ValueError, match=r"must be \(B, 4\)"):
        s.update(torch.zeros(3, 5))
    bad = torch.zeros(3, 4)
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match="row 1"):
        s.update(bad)
    assert s.update(torch.zeros(0, 4)).n == 0
    with pytest.raises(ValueError, match="empty"):
        merge_statistics([])
    with pytest.raises(ValueError, match="different widths"):
        merge_statistics([FeatureStatistics(2), FeatureStatistics(3)])
