"""``gensample fid REAL FAKE``: Fréchet distance, KID and precision / recall / density / coverage in one pass.

``gensample fid convert-weights FILE --sha256 HASH -o OUT`` makes safetensors of the published Inception file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gensample.apps.fid_options import add_shared_arguments
from gensample.apps.fid_sides import SIDE_HELP

if TYPE_CHECKING:
    from gensample.metrics.collect import Side
    from gensample.metrics.distributed import World


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("real", help=f"reference: {SIDE_HELP}; or the word convert-weights")
    parser.add_argument("fake", help="generated images, like REAL; or the file to convert")
    add_shared_arguments(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="one line of JSON on stdout: values, versions, hashes, settings")
    add("--no-kid", action="store_true", help="leave the kernel distance out")
    add("--no-prdc", action="store_true", help="leave precision, recall, density and coverage out")
    add("--neighbours", type=int, default=5, help="k of precision, recall, density and coverage")
    add(
        "--fd-infinity",
        action="store_true",
        help="extrapolate the distance to infinitely many generated images",
    )
    add("--bootstrap", type=int, default=0, metavar="B", help="interval of the distance from B resamples")
    add("--confidence", type=float, default=0.95, help="coverage of the KID and bootstrap intervals")
    add("--sha256", help="convert-weights: what FILE must hash to; default: the published file's hash")
    add("-o", "--output", help="convert-weights: the safetensors file; default: where fid looks for it")


def run(namespace: Any) -> int:
    """Compare two sides, or convert weights; 0 done, 2 bad input, 1 failure."""
    from gensample.metrics.distributed import world

    with report_errors("fid") as outcome:
        if namespace.real == "convert-weights":
            _convert(namespace)
        else:
            with world() as w:
                _compare(namespace, w)
    return outcome.code


@dataclass
class Outcome:
    """The exit code of a subcommand."""

    code: int = 0


@contextmanager
def report_errors(command: str) -> Iterator[Outcome]:
    """Turn exceptions into one line on stderr and an exit code: 2 for bad input, 1 for a failure."""
    import os

    from gensample.metrics.errors import InputError

    outcome = Outcome()
    try:
        yield outcome
    except (InputError, FloatingPointError, ArithmeticError, RuntimeError, OSError, ValueError) as error:
        outcome.code = 2 if isinstance(error, InputError) else 1
        # Every rank raises the same error; one of them tells.
        if os.environ.get("RANK", "0") == "0":
            print(f"gensample {command}: {error}", file=sys.stderr)


def _convert(ns: Any) -> None:
    from gensample.metrics.weights import SHA256, convert_weights, default_weights_path

    written = convert_weights(ns.fake, ns.output or default_weights_path(), sha256=ns.sha256 or SHA256)
    print(written)


def _compare(ns: Any, w: World) -> None:
    from gensample.apps.fid_options import choose_device, evaluation_options, make_features
    from gensample.apps.fid_sides import open_side
    from gensample.metrics.collect import Side
    from gensample.metrics.errors import InputError
    from gensample.metrics.evaluate import MetricOptions, compare, evaluate_side

    options = evaluation_options(ns)
    if ns.neighbours < 1:
        raise InputError(f"--neighbours must be at least 1; got {ns.neighbours}")
    if ns.bootstrap < 0 or ns.bootstrap == 1:
        raise InputError(f"--bootstrap must be 0 (off) or at least 2; got {ns.bootstrap}")
    if not 0 < ns.confidence < 1:
        raise InputError(f"--confidence must be between 0 and 1; got {ns.confidence}")
    device = choose_device(ns, w)
    opened = [open_side(text, ns, device) for text in (ns.real, ns.fake)]
    # Neither side is read before the other is known to exist; two files of statistics need no network.
    extractor = None if all(isinstance(side, Side) for side in opened) else make_features(ns, w, device)
    sides: list[Side | None] = []
    for side in opened:
        if isinstance(side, Side) or extractor is None:
            sides.append(side if isinstance(side, Side) else None)
        else:
            sides.append(evaluate_side(side, extractor, options, w))
    real, fake = sides
    if not w.is_main or real is None or fake is None:
        return
    metrics = MetricOptions(
        kid=not ns.no_kid,
        prdc=not ns.no_prdc,
        neighbours=ns.neighbours,
        infinity_points=15 if ns.fd_infinity else 0,
        bootstrap=ns.bootstrap,
        confidence=ns.confidence,
        seed=ns.seed,
        progress=options.progress,
    )
    record = {**compare(real, fake, metrics), **_provenance(ns, w, real, fake, extractor)}
    print(json.dumps(record) if ns.json else _text(record))


def _provenance(ns: Any, w: World, real: Side, fake: Side, extractor: Any) -> dict[str, Any]:
    import torch

    from gensample import __version__

    known = {**real.statistics.metadata, **fake.statistics.metadata}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "features": known.get("features"),
        "weights_sha256": known.get("weights_sha256"),
        "resize": known.get("resize"),
        "dtype": known.get("dtype"),
        "micro_batch": known.get("micro_batch"),
        "seed": ns.seed,
        "num": ns.num,
        "world_size": w.size,
        "device": None if extractor is None else str(next(iter(extractor.module.parameters())).device),
        "reference": real.record,
        "generated": fake.record,
    }


def _text(record: dict[str, Any]) -> str:
    name = (
        "FID"
        if record["features"] == "inception"
        else f"FD ({record['features'] or 'features not recorded'})"
    )
    lines = [
        f"{name}: {record['frechet_distance']:.6g}",
        f"  mean term {record['mean_term']:.6g}, covariance term {record['cov_term']:.6g}",
        f"  N = {record['n_reference']} against {record['n_generated']}, D = {record['dimension']}, "
        f"rank {record['rank']}, {record['method']} form, resize {record['resize']}",
    ]
    if record["bootstrap"]:
        low, high = record["bootstrap"]["interval"]
        lines.append(f"  {record['bootstrap']['confidence']:.0%} bootstrap interval {low:.6g} .. {high:.6g}")
    if record["fd_infinity"]:
        lines.append(f"FD infinity: {record['fd_infinity']['value']:.6g}")
    if record["kid"]:
        low, high = record["kid"]["interval"]
        confidence = record["kid"]["confidence"]
        lines.append(f"KID: {record['kid']['value']:.6g} ({confidence:.0%} interval {low:.6g} .. {high:.6g})")
    if record["prdc"]:
        parts = [f"{key} {record['prdc'][key]:.4f}" for key in ("precision", "recall", "density", "coverage")]
        lines.append(", ".join(parts) + f" (k = {record['prdc']['neighbours']})")
    for key in ("reference", "generated"):
        lines.append(f"{key}: {_side_text(record[key])}")
        lines += [f"  skipped {s['name']}: {s['reason']}" for s in record[key].get("skipped", [])]
    lines += [f"warning: {text}" for text in record["warnings"]]
    return "\n".join(lines)


def _side_text(side: dict[str, Any]) -> str:
    text = f"{side['path']} ({side['kind']})"
    if side.get("extensions"):
        text += ": " + ", ".join(f"{count} {ext}" for ext, count in side["extensions"].items())
    if side.get("ignored"):
        text += "; ignored " + ", ".join(f"{count} {ext}" for ext, count in side["ignored"].items())
    if side.get("duplicates"):
        text += f"; {len(side['duplicates'])} duplicated names counted once"
    return text
