"""Nothing depends on how images were loaded: batch size, workers, ranks, refused neighbours."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gensample.metrics.collect import Accumulator
from gensample.metrics.distributed import World, world
from gensample.metrics.errors import InputError
from gensample.metrics.evaluate import EvaluationOptions, evaluate_side
from gensample.metrics.features import FeatureExtractor, make_extractor
from gensample.metrics.loading import Preparation, load_chunks
from gensample.metrics.sources import FolderSource, NpzSource, ZipSource
from gensample.metrics.statistics import FeatureStatistics

ALONE = World()


def extractor(module: nn.Module, micro_batch: int = 4) -> FeatureExtractor:
    return make_extractor("tiny", module, image_size=24, micro_batch=micro_batch)


def moments(source: Any, module: nn.Module, **options: Any) -> FeatureStatistics | None:
    with world() as w:
        chosen = EvaluationOptions(progress=False, **options)
        side = evaluate_side(source, extractor(module), chosen, w)
    return None if side is None else side.statistics


def assert_same(one: FeatureStatistics | None, other: FeatureStatistics | None) -> None:
    assert one is not None
    assert other is not None
    assert one.n == other.n
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance, other.covariance)


def test_chunks_are_the_same_for_every_world_size(image_folder: Path) -> None:
    source = FolderSource(image_folder)
    options = {"micro_batch": 4, "prepare": Preparation((24, 24))}
    alone = list(load_chunks(source, range(21), **options))  # type: ignore[arg-type]
    assert len(alone) == 6
    assert alone[-1].valid.tolist() == [True, False, False, False]
    assert float(alone[-1].images[1:].abs().max()) == 0
    for size in (2, 3, 8):
        ranks = [
            list(load_chunks(source, range(21), rank=r, world_size=size, **options))  # type: ignore[arg-type]
            for r in range(size)
        ]
        for c, chunk in enumerate(alone):
            assert torch.equal(ranks[c % size][c // size].images, chunk.images)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 1), (32, 2), (3, 2)])
def test_batch_size_and_workers_change_no_bit(
    image_folder: Path, tiny_features: nn.Module, batch_size: int, workers: int
) -> None:
    source = FolderSource(image_folder)
    plain = moments(source, tiny_features)
    assert_same(plain, moments(source, tiny_features, batch_size=batch_size, num_workers=workers))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_world_size_changes_no_bit_end_to_end(
    image_folder: Path, tiny_features: nn.Module, run_ranks: Callable[..., list[Any]], size: int
) -> None:
    # 21 images in chunks of 4: six chunks, so ranks are uneven, and with seven ranks one is empty.
    source = FolderSource(image_folder)
    alone = moments(source, tiny_features)
    results = run_ranks(size, functools.partial(moments, source, tiny_features))
    assert_same(alone, results[0])
    assert results[1:] == [None] * (size - 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_identical_features_give_identical_statistics(run_ranks: Callable[..., list[Any]], size: int) -> None:
    features = torch.randn(2500, 6, generator=torch.Generator().manual_seed(0))
    reference = FeatureStatistics.from_features(features)

    def gather() -> FeatureStatistics | None:
        with world() as w:
            accumulator = Accumulator(2500, 2500, 0)
            for start in range(0, 2500, 100 * w.size):
                mine = features[start + 100 * w.rank :][:100]
                rows = torch.zeros(100, 6)
                rows[: len(mine)] = mine
                counts = w.gather_objects(len(mine))
                gathered = w.gather_rows(rows)
                if gathered is not None:
                    for r, count in enumerate(counts):
                        for i in range(count):
                            accumulator.add(start + 100 * r + i, gathered[r, i])
            return accumulator.finish()[0] if w.is_main else None

    result = run_ranks(size, gather)[0]
    assert result.n == 2500
    torch.testing.assert_close(result.covariance, reference.covariance, rtol=1e-12, atol=1e-12)
    assert result.frechet_distance(reference).value < 1e-9


def test_num_picks_the_same_subset_on_any_number_of_ranks(
    image_folder: Path, tiny_features: nn.Module, run_ranks: Callable[..., list[Any]]
) -> None:
    source = FolderSource(image_folder)
    subset = functools.partial(moments, source, tiny_features, num=9, seed=5)
    alone = subset()
    assert alone is not None
    assert alone.n == 9
    assert_same(alone, run_ranks(3, subset)[0])
    other = moments(source, tiny_features, num=9, seed=6)
    assert other is not None
    assert not torch.equal(alone.mean, other.mean)


def test_micro_batch_size_changes_less_than_1e5(image_folder: Path, tiny_features: nn.Module) -> None:
    source = FolderSource(image_folder)
    options = EvaluationOptions(progress=False)
    one = evaluate_side(source, extractor(tiny_features, 4), options, ALONE)
    other = evaluate_side(source, extractor(tiny_features, 21), options, ALONE)
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one.statistics.mean, other.statistics.mean, rtol=1e-5, atol=1e-6)


def test_sources_of_the_same_images_agree(tmp_path: Path, tiny_features: nn.Module) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 10, 12, 3), dtype=np.uint8)
    (tmp_path / "f").mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "f" / f"{i}.png")
            archive.write(tmp_path / "f" / f"{i}.png", f"{i}.png")
    np.savez_compressed(tmp_path / "x.npz", images)
    sources = [FolderSource(tmp_path / "f"), ZipSource(tmp_path / "x.zip"), NpzSource(tmp_path / "x.npz")]
    first = moments(sources[0], tiny_features)
    for source in sources[1:]:
        assert_same(first, moments(source, tiny_features))
        assert_same(first, moments(source, tiny_features, num_workers=2, batch_size=2))


def test_a_refused_image_stops_on_every_rank_or_is_skipped_and_listed(
    image_folder: Path, tiny_features: nn.Module, run_ranks: Callable[..., list[Any]]
) -> None:
    (image_folder / "13.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = FolderSource(image_folder)
    with pytest.raises(InputError, match=r"13\.png: corrupt"):
        moments(source, tiny_features)
    side = evaluate_side(
        source, extractor(tiny_features), EvaluationOptions(skip_bad=True, progress=False), ALONE
    )
    assert side is not None
    assert side.statistics.n == 20
    assert [name for name, _ in side.refused] == [str(image_folder / "13.png")]
    assert side.record["skipped"][0]["reason"].startswith("corrupt")

    def stopped() -> str:
        with pytest.raises(InputError) as caught:
            moments(source, tiny_features)
        return str(caught.value)

    messages = run_ranks(3, stopped)
    assert len(set(messages)) == 1
    assert "13.png" in messages[0]
    assert_same(
        side.statistics, run_ranks(2, functools.partial(moments, source, tiny_features, skip_bad=True))[0]
    )


def test_a_failing_network_stops_every_rank(image_folder: Path, run_ranks: Callable[..., list[Any]]) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x[0].sum()) > 0 and world_rank() == 1:
                raise KeyError("inside the network")
            return x.mean((2, 3))

    def world_rank() -> int:
        return torch.distributed.get_rank()

    def stopped() -> str:
        with pytest.raises(RuntimeError, match="inside the network") as caught:
            moments(FolderSource(image_folder), Fails())
        return str(caught.value)

    assert len(set(run_ranks(2, stopped))) == 1


def test_non_finite_features_name_the_image(image_folder: Path) -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.mean((2, 3))
            y[2] = torch.nan
            return y

    with pytest.raises(FloatingPointError, match=r"2\.png"):
        moments(FolderSource(image_folder), Breaks())


def test_kept_features_are_a_keyed_sample() -> None:
    rows = torch.arange(50.0)[:, None].expand(50, 3)

    def kept(keep: int, seed: int) -> list[float]:
        accumulator = Accumulator(50, keep, seed)
        for i, row in enumerate(rows):
            accumulator.add(i, row)
        statistics, features = accumulator.finish()
        assert statistics.n == 50
        return features[:, 0].tolist()

    assert kept(50, 0) == list(range(50))
    assert kept(10, 0) == kept(10, 0) != kept(10, 1)
    assert len(kept(10, 0)) == 10


def test_resize_none_refuses_mixed_sizes_by_name(tmp_path: Path, tiny_features: nn.Module) -> None:
    for i, size in enumerate([(24, 20), (24, 20), (25, 20)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"2\.png: size 25x20 differs from 24x20"):
        moments(FolderSource(tmp_path), tiny_features, resize="none")


def test_grey_input() -> None:
    prepare = Preparation((4, 4), channels=1)
    grey = np.full((4, 4, 3), 77, np.uint8)
    assert torch.equal(prepare(grey), torch.full((1, 4, 4), 77.0))
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 0] = 100
    torch.testing.assert_close(prepare(colour), torch.full((1, 4, 4), 29.9))


def test_loading_draws_nothing_from_the_global_generator(
    image_folder: Path, tiny_features: nn.Module
) -> None:
    before = torch.random.get_rng_state()
    moments(FolderSource(image_folder), tiny_features, num_workers=2)
    assert torch.equal(torch.random.get_rng_state(), before)
