"""``gensample stats DIR -o ref.safetensors``: statistics of a set of images, to compare with later."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gensample.apps.fid_options import add_shared_arguments
from gensample.apps.fid_sides import SIDE_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("images", help=SIDE_HELP)
    parser.add_argument("-o", "--output", required=True, help="safetensors file to write")
    parser.add_argument(
        "--keep-features", action="store_true", help="store the kept features too, for KID, PRDC"
    )
    add_shared_arguments(parser)


def run(namespace: Any) -> int:
    """Compute and write; 0 done, 2 bad input, 1 failure."""
    from gensample.apps.fid import report_errors
    from gensample.metrics.distributed import world

    with report_errors("stats") as outcome, world() as w:
        _compute(namespace, w)
    return outcome.code


def _compute(ns: Any, w: Any) -> None:
    from gensample import __version__
    from gensample.apps.fid_options import choose_device, evaluation_options, make_features
    from gensample.apps.fid_sides import open_side
    from gensample.metrics.collect import Side
    from gensample.metrics.errors import InputError
    from gensample.metrics.evaluate import evaluate_side

    target = Path(ns.output)
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise InputError(f"--output {target}: must be a .safetensors file in an existing folder")
    options = evaluation_options(ns)
    device = choose_device(ns, w)
    source = open_side(ns.images, ns, device)
    if isinstance(source, Side):
        raise InputError(f"{ns.images} already is statistics")
    side = evaluate_side(source, make_features(ns, w, device), options, w)
    if side is None:
        return
    side.statistics.metadata["version"] = __version__
    side.statistics.save(target, features=side.features if ns.keep_features else None)
    for name, reason in side.refused:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    n, width = side.statistics.n, side.statistics.num_features
    print(f"{target}: {n} images, {width} {ns.features} features, resize {ns.resize}")
