"""One comparison from end to end: two sides in, one JSON-ready record out.

Shapes: N samples, D features; kept features (K, D).
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from .collect import Side, collect
from .distributed import World
from .errors import InputError
from .features import FeatureExtractor
from .frechet import FrechetResult, frechet_distance_from_features
from .kid import kernel_inception_distance
from .listing import choose
from .loading import Preparation, first_size, load_chunks
from .prdc import prdc
from .resampling import bootstrap_frechet, frechet_infinity
from .resize import ResizeMode
from .sources import ImageSource, SampledSource
from .statistics import FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a side is read: `num` images chosen by `seed`, at most `keep` feature rows held in memory."""

    resize: ResizeMode = "clean"
    num: int | None = None
    seed: int = 0
    skip_bad: bool = False
    keep: int = 10_000
    batch_size: int = 32
    num_workers: int = 0
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Which numbers beside the Fréchet distance; a zero leaves the optional ones out."""

    kid: bool = True
    prdc: bool = True
    neighbours: int = 5
    infinity_points: int = 0
    bootstrap: int = 0
    confidence: float = 0.95
    seed: int = 0
    progress: bool = True


def evaluate_side(
    source: ImageSource | SampledSource, extractor: FeatureExtractor, options: EvaluationOptions, world: World
) -> Side | None:
    """Read, resize and embed the images of a source; the side on the main process, None elsewhere.

    Raises:
        InputError: no images, a refused image without skip_bad, fewer than two usable images; on every rank.
        FloatingPointError: non-finite features.
    """
    num = None if isinstance(source, SampledSource) else options.num
    chosen = choose(len(source), num, options.seed, source.label)
    indices: list[int] = chosen.tolist()
    size = (extractor.image_size or 0,) * 2
    if options.resize == "none" or size == (0, 0):
        size = first_size(source, indices)
        if options.resize != "none" and size[0] != size[1]:
            raise InputError(
                f"{source.label}: {extractor.name} names no input size and the first image is "
                f"{size[1]}x{size[0]}: give --image-size, or --resize none for images of one size"
            )
    chunks = load_chunks(
        source,
        indices,
        Preparation(size, options.resize, extractor.channels),
        micro_batch=extractor.micro_batch,
        rank=world.rank,
        world_size=world.size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    gathered = collect(
        chunks,
        len(indices),
        extractor,
        world,
        label=source.label,
        name=lambda position: source.name(indices[position]),
        skip_bad=options.skip_bad,
        keep=options.keep,
        seed=options.seed,
        progress=options.progress,
    )
    if gathered is None:
        return None
    statistics, features, refused = gathered
    if (statistics.n or 0) < 2:
        raise InputError(f"{source.label}: {statistics.n} usable image; a covariance needs at least 2")
    record = {
        **source.summary(),
        "n": statistics.n,
        "num": num,
        "seed": options.seed,
        "image_size": list(size),
        "skipped": [{"name": name, "reason": reason} for name, reason in refused],
    }
    statistics.metadata = {**settings(extractor, options.resize), "source": record}
    return Side(source.label, statistics, features, record, refused)


def settings(extractor: FeatureExtractor, resize: str) -> dict[str, Any]:
    """Return what two sides must share to be comparable."""
    return {
        "features": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "resize": resize,
        "dtype": "float32",
        "micro_batch": extractor.micro_batch,
    }


def side_from_statistics(label: str, statistics: FeatureStatistics, features: torch.Tensor | None) -> Side:
    """Return a side known by saved statistics, and its kept features if the file had any."""
    moments = statistics.mean.numpy().tobytes() + statistics.covariance.numpy().tobytes()
    record = {
        "kind": "statistics",
        "path": label,
        "n": statistics.n,
        "statistics_sha256": hashlib.sha256(moments).hexdigest(),
        "metadata": statistics.metadata,
    }
    return Side(label, statistics, features, record)


def check_comparable(one: Side, other: Side) -> list[str]:
    """Return warnings about what the sides do not record.

    Raises:
        InputError: the sides record different features, weights or resize modes, or have different widths.
    """
    for key in ("features", "weights_sha256", "resize"):
        a, b = one.statistics.metadata.get(key), other.statistics.metadata.get(key)
        if a is not None and b is not None and a != b:
            raise InputError(
                f"{one.label} has {key} {a!r} and {other.label} {b!r}: recompute one side with the other's"
            )
    if one.statistics.num_features != other.statistics.num_features:
        raise InputError(
            f"{one.label} has {one.statistics.num_features} features and {other.label} "
            f"{other.statistics.num_features}: they come from different extractors"
        )
    return [
        f"{side.label} does not say which features, weights and resize made it: cannot check that they agree"
        for side in (one, other)
        if "features" not in side.statistics.metadata
    ]


def compare(reference: Side, generated: Side, options: MetricOptions) -> dict[str, Any]:
    """Return the record of all metrics; a metric that needs features where there are none is None.

    Raises:
        InputError: the sides are not comparable, or too few images for a metric that was asked for.
    """
    warnings = check_comparable(reference, generated)
    width = reference.statistics.num_features
    for side in (reference, generated):
        n = side.statistics.n
        if n is not None and n < width:
            warnings.append(f"{side.label}: N = {n} is below D = {width}: the distance is biased upwards")
        if side.refused:
            warnings.append(f"{side.label}: {len(side.refused)} images were left out")
    frechet = _frechet(reference, generated)
    record: dict[str, Any] = {
        "frechet_distance": frechet.value,
        "mean_term": frechet.mean_term,
        "cov_term": frechet.cov_term,
        "rank": frechet.rank,
        "method": frechet.method,
        "dimension": width,
        "n_reference": reference.statistics.n,
        "n_generated": generated.statistics.n,
    }
    try:
        record.update(_sample_metrics(reference, generated, options, warnings))
    except ValueError as error:
        raise InputError(str(error)) from error
    record["warnings"] = warnings
    return record


def _frechet(reference: Side, generated: Side) -> FrechetResult:
    """Use the Gram form where every feature is at hand and a side has fewer samples than features."""
    one, other = reference.statistics, generated.statistics
    sides = (reference, generated)
    whole = [s.features for s in sides if s.features is not None and len(s.features) == s.statistics.n]
    if len(whole) == 2 and min(map(len, whole)) < one.num_features:
        return frechet_distance_from_features(*whole)
    return one.frechet_distance(other)


def _sample_metrics(
    reference: Side, generated: Side, options: MetricOptions, warnings: list[str]
) -> dict[str, Any]:
    x, y = reference.features, generated.features
    record: dict[str, Any] = {"kid": None, "prdc": None, "fd_infinity": None, "bootstrap": None}
    if x is not None and y is not None:
        if options.kid:
            record["kid"] = _plain(kernel_inception_distance(x, y, confidence=options.confidence))
        if options.prdc:
            k = min(options.neighbours, len(x) - 1, len(y) - 1)
            if k < options.neighbours:
                warnings.append(f"PRDC uses {k} neighbours: that is all the images there are")
            record["prdc"] = _plain(prdc(x, y, neighbours=k))
    elif options.kid or options.prdc:
        warnings.append("KID and PRDC need features of both sides; one has only statistics")
    if not (options.infinity_points or options.bootstrap):
        return record
    if y is None:
        raise ValueError(f"--fd-infinity and --bootstrap need images; {generated.label} has only statistics")
    if len(y) != generated.statistics.n:
        warnings.append(f"FD infinity and bootstrap use {len(y)} kept images of {generated.label} (--keep)")
    # The whole reference where it is at hand; else its statistics, held fixed.
    whole = x if x is not None and len(x) == reference.statistics.n else reference.statistics
    if options.infinity_points:
        record["fd_infinity"] = _plain(
            frechet_infinity(
                whole, y, points=options.infinity_points, seed=options.seed, progress=options.progress
            )
        )
    if options.bootstrap:
        record["bootstrap"] = _plain(
            bootstrap_frechet(
                whole,
                y,
                resamples=options.bootstrap,
                confidence=options.confidence,
                seed=options.seed,
                progress=options.progress,
            )
        )
    return record


def _plain(result: Any) -> dict[str, Any]:
    return dataclasses.asdict(result)
