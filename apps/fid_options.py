"""Arguments that `gensample fid` and `gensample stats` share, and the objects they describe."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gensample.metrics.decode import ImagePolicy
    from gensample.metrics.distributed import World
    from gensample.metrics.evaluate import EvaluationOptions
    from gensample.metrics.features import FeatureExtractor

FEATURES_HELP = (
    "inception (default), dinov2, clip, fashion-b (shipped, offline), or module:attribute, an nn.Module that "
    "maps images (B, C, H, W) in [0, 1] to features (B, D)"
)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Features, images, sampling of a pipeline, and speed."""
    add = parser.add_argument
    add("--features", default="inception", help=FEATURES_HELP)
    add("--weights", help="inception: safetensors file; dinov2 and clip: folder or Hub id")
    add("--weights-sha256", help="refuse an inception weights file that hashes to anything else")
    add("--download", action="store_true", help="allow the network: fetch missing weights, checked by hash")
    add("--image-size", type=int, help="input size of a module:attribute that does not name its own")
    add("--resize", choices=["clean", "legacy-torch", "legacy-tf", "none"], default="clean")
    add("--num", type=int, help="evaluate this many images, the same ones on any number of processes")
    add("--seed", type=int, default=0, help="seed of --num, --samples, kept features and resampling")
    add("--skip-bad", action="store_true", help="leave refused images out and list them instead of stopping")
    add("--animated", choices=["error", "first"], default="error")
    add("--sixteen-bit", choices=["error", "scale"], default="error")
    add("--cmyk", choices=["error", "convert"], default="error")
    add("--alpha", choices=["error", "white", "black", "drop"], default="error")
    add("--exif", choices=["error", "rotate", "ignore"], default="error")
    add("--max-pixels", type=int, default=2**26, help="refuse larger images before decoding them")
    add("--max-bytes", type=int, default=2**28, help="refuse larger files and zip members")
    add("--symlinks", choices=["files", "all", "skip"], default="files", help="links that a folder follows")
    add("--hidden", action="store_true", help="include names that begin with a dot")
    add("--samples", type=int, help="images to draw from a pipeline side; nothing is written")
    add("--pipeline-args", default="{}", help="JSON arguments of the pipeline's call, e.g. steps or guidance")
    add("--prompts", help="text file, one prompt a line, for a pipeline side that needs prompts")
    add("--batch-size", type=int, default=32, help="images a worker hands over at a time; changes no result")
    add("--workers", type=int, default=0, help="loading processes; changes no result")
    add("--keep", type=int, default=10_000, help="feature rows held for KID, PRDC, FD infinity and bootstrap")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--quiet", action="store_true", help="no progress on stderr")


def image_policy(ns: Any) -> ImagePolicy:
    """Return the decoding policy of the arguments."""
    from gensample.metrics.decode import ImagePolicy

    return ImagePolicy(
        animated=ns.animated,
        sixteen_bit=ns.sixteen_bit,
        cmyk=ns.cmyk,
        alpha=ns.alpha,
        exif=ns.exif,
        max_pixels=ns.max_pixels,
        max_bytes=ns.max_bytes,
    )


def evaluation_options(ns: Any) -> EvaluationOptions:
    """Return the reading options, checked.

    Raises:
        InputError: a number out of range; names the option.
    """
    from gensample.metrics.errors import InputError
    from gensample.metrics.evaluate import EvaluationOptions

    for name, least in (("batch_size", 1), ("workers", 0), ("keep", 3), ("seed", 0), ("max_pixels", 1)):
        if getattr(ns, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(ns, name)}")
    return EvaluationOptions(
        resize=ns.resize,
        num=ns.num,
        seed=ns.seed,
        skip_bad=ns.skip_bad,
        keep=ns.keep,
        batch_size=ns.batch_size,
        num_workers=ns.workers,
        progress=not ns.quiet,
    )


def choose_device(ns: Any, world: World) -> str:
    """Return the device of this process; `auto` takes one accelerator per local rank where there are any."""
    import torch

    from gensample.metrics.errors import InputError

    if ns.device == "auto":
        return f"cuda:{world.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if ns.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {ns.device}: no CUDA device is available")
    try:
        return str(torch.device(ns.device if ns.device != "cuda" else f"cuda:{world.local_rank}"))
    except RuntimeError as error:
        raise InputError(f"--device {ns.device}: {error}") from error


def make_features(ns: Any, world: World, device: str) -> FeatureExtractor:
    """Return the feature extractor of the arguments.

    Raises:
        InputError: no weights, wrong weights, or an unknown name; says what to do.
    """
    from gensample.metrics.errors import InputError
    from gensample.metrics.features import inception_extractor, module_extractor, transformers_extractor

    if ns.features == "inception":
        return inception_extractor(_inception_weights(ns, world), resize=ns.resize, device=device)
    if ns.features in ("dinov2", "clip"):
        if ns.weights is None:
            raise InputError(
                f"--features {ns.features} needs --weights: a folder with config.json and model.safetensors, "
                "or a Hub id (with --download unless it is cached)"
            )
        return transformers_extractor(ns.features, ns.weights, download=ns.download, device=device)
    if ns.features == "fashion-b":
        from gensample.apps.fid_shipped import shipped_features

        return shipped_features(ns.features, device)
    if ":" in ns.features:
        # A console script does not look for modules in the current folder; the user's module is likely there.
        sys.path.append(os.getcwd())
        return module_extractor(ns.features, image_size=ns.image_size, device=device)
    raise InputError(f"--features {ns.features}: unknown; expected {FEATURES_HELP}")


def _inception_weights(ns: Any, world: World) -> str:
    from gensample.metrics.errors import InputError
    from gensample.metrics.features import file_sha256
    from gensample.metrics.weights import default_weights_path, download_weights

    path = ns.weights or str(default_weights_path())
    failure = None
    if world.is_main:
        from pathlib import Path

        if not Path(path).is_file() and ns.download:
            try:
                download_weights(path)
            except InputError as error:
                failure = str(error)
        elif not Path(path).is_file():
            failure = (
                f"no Inception weights at {path}. Either\n"
                "  1. let gensample fetch and check the published file once: add --download, or\n"
                "  2. convert a copy of your own: gensample fid convert-weights "
                "pt_inception-2015-12-05-6726825d.pth -o inception.safetensors, "
                "then add --weights inception.safetensors\n"
                "(--features fashion-b, or module:attribute, needs no Inception weights)"
            )
        if failure is None and ns.weights_sha256 and file_sha256(path) != ns.weights_sha256.lower():
            failure = f"{path}: SHA-256 is {file_sha256(path)}, expected {ns.weights_sha256}"
    failure = world.gather_objects(failure)[0]
    if failure is not None:
        raise InputError(failure)
    return path
