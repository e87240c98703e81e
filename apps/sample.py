"""``gensample sample MODEL --labels 0-9 --per-label 8 --out grid.png``: images of given classes.

Runs on several processes under ``python -m torch.distributed.run``, with the same images as on one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensample.apps.fid import report_errors
from gensample.apps.guidance_options import add_guidance_arguments, check_guidance, guidance_rule

if TYPE_CHECKING:
    import numpy as np

    from gensample.apps.drawing import DrawOptions
    from gensample.metrics.distributed import World
    from gensample.solvers import Diffusion


# Written out, because the parser must not import torch; a test compares them with the library's lists.
SOLVER_HELP = (
    "euler, ddim, ab2, heun, midpoint, rk4 or dopri5 (ODE), em, exp, exp2m, sheun or strang (SDE), or a published "
    "sampler: sit-paper, sit-code, repa, flow-grpo, ancestral-rf, ddpm-ancestral; default: the pipeline's scheduler"
)
DIFFUSION_HELP = (
    "eps(t) of an SDE solver: constant, sigma, sigma-paper, linear, decreasing, sin2, sbdm, grpo, kl-optimal or "
    "ancestral-rf, with a scale as in sigma:0.5"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add("model", help="shipped name (fashion), folder, or Hub id of a class-conditional pipeline")
    add("--labels", default="0-9", help="indices, ranges and names: 0-4,bag,7")
    add("--per-label", type=int, default=8, help="images of each label: one row of the grid")
    add("--steps", type=int, help="sampling steps; default: a published sampler's own number, else 32")
    add_guidance_arguments(parser)
    add("--solver", help=SOLVER_HELP)
    add("--diffusion", help=DIFFUSION_HELP)
    add("--seed", type=int, default=0, help="sample i depends on this and i alone")
    add("--batch-size", type=int, default=25, help="images per network call; changes no image")
    add("--out", help="PNG file of a grid, one row per label")
    add("--out-dir", help="folder, new or empty, for one PNG per image and labels.json")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--json", action="store_true", help="one line of JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(namespace: Any) -> int:
    """Draw and write; 0 done, 2 bad input, 1 failure."""
    from gensample.metrics.distributed import world
    from gensample.metrics.errors import InputError

    with report_errors("sample") as outcome, world() as w:
        try:
            _sample(namespace, w)
        except ValueError as error:
            raise InputError(str(error)) from error
    return outcome.code


def _sample(ns: Any, w: World) -> None:
    import gensample
    from gensample.apps.drawing import draw_batches, load_quietly, parse_labels, to_pixels
    from gensample.denoisers import denoiser_from_pipeline

    options = _options(ns)
    _check_outputs(ns, w)
    pipe = class_conditional(load_quietly(ns.model, revision=ns.revision), ns.model)
    device = device_of(ns.device, w)
    pipe.to(device)
    options = replace(options, guidance=guidance_rule(ns, pipe, device))
    started = time.monotonic()
    kinds = denoiser_from_pipeline(pipe, class_labels=parse_labels(ns.labels, pipe.labels))
    classes = kinds.conditioning.batched["class_labels"].tolist()
    labels = [label for label in classes for _ in range(ns.per_label)]
    rows: dict[int, np.ndarray] = {}
    evaluations = 0
    with _output_folder(ns.out_dir, w) as folder:
        for drawn in draw_batches(pipe, labels, options, w):
            evaluations += drawn.evaluations
            for i, pixels in zip(drawn.sample_ids, to_pixels(drawn.images), strict=True):
                if folder is not None:
                    _save_image(pixels, folder / _file_name(i, labels))
                if ns.out:
                    rows[i] = pixels
        evaluations = sum(w.gather_objects(evaluations))
        names = {index: name for name, index in pipe.labels.items()}
        if folder is not None and w.is_main:
            _write_labels(folder, labels, names, ns)
    gathered = {i: row for part in w.gather_objects(rows) for i, row in part.items()}
    if not w.is_main:
        return
    if ns.out:
        _write_grid(Path(ns.out), gathered, classes, names, ns.per_label)
    seconds = round(time.monotonic() - started, 2)
    record = {
        "model": ns.model, "images": len(labels), "labels": classes, "steps": ns.steps, "seed": ns.seed,
        "guidance": ns.guidance, "scale": ns.scale, "solver": ns.solver, "diffusion": ns.diffusion,
        "evaluations": evaluations, "seconds": seconds, "processes": w.size, "out": ns.out, "out_dir": ns.out_dir,
        "version": gensample.__version__,
    }  # fmt: skip
    targets = " and ".join(path for path in (ns.out, ns.out_dir) if path)
    text = f"{len(labels)} images in {targets}: {evaluations} network evaluations, {seconds} s"
    print(json.dumps(record) if ns.json else text)


def _options(ns: Any) -> DrawOptions:
    """The checked options of the draw, by the names of the command line."""
    from gensample.apps.drawing import DrawOptions
    from gensample.solvers import PRESETS, SOLVERS, STOCHASTIC_SOLVERS, default_steps

    ns.steps = default_steps(ns.solver) if ns.steps is None else ns.steps  # the records tell it
    for name in ("steps", "per_label", "batch_size"):
        if getattr(ns, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(ns, name)} must be at least 1")
    if ns.solver is not None and ns.solver not in (*SOLVERS, *PRESETS):
        raise ValueError(f"--solver {ns.solver} is unknown; use one of {', '.join((*SOLVERS, *PRESETS))}")
    if ns.diffusion is not None and ns.solver not in STOCHASTIC_SOLVERS:
        raise ValueError(f"--diffusion {ns.diffusion} needs --solver {', '.join(STOCHASTIC_SOLVERS)}")
    check_guidance(ns)
    return DrawOptions(
        steps=ns.steps,
        batch_size=ns.batch_size,
        seed=ns.seed,
        solver=ns.solver,
        diffusion=None if ns.diffusion is None else diffusion_of(ns.diffusion),
        quiet=ns.quiet,
    )


def diffusion_of(text: str) -> Diffusion:
    """The diffusion written as KIND or KIND:SCALE."""
    from gensample.solvers import Diffusion

    kind, colon, scale = text.partition(":")
    try:
        return Diffusion(kind, float(scale) if colon else 1.0)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"--diffusion {text}: {error}") from error


def _check_outputs(ns: Any, w: World) -> None:
    """Raise on every process if an output cannot be written, before anything is drawn."""
    from gensample.apps.grid import check_writable_file, check_writable_folder
    from gensample.metrics.errors import InputError

    problem = None
    if w.is_main:
        try:
            if not (ns.out or ns.out_dir):
                raise InputError("give --out FILE.png, --out-dir FOLDER, or both")
            if ns.out:
                check_writable_file(Path(ns.out), "--out")
            if ns.out_dir:
                folder = Path(ns.out_dir)
                check_writable_folder(folder.absolute().parent, "--out-dir")
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise InputError(
                        f"--out-dir {folder} is not an empty folder; give a new name or empty it"
                    )
        except InputError as error:
            problem = str(error)
    (problem, *_) = w.gather_objects(problem)
    if problem:
        raise InputError(problem)


def class_conditional(pipe: Any, name: str) -> Any:
    """``pipe`` itself; raises ValueError unless it draws by class labels."""
    import inspect

    if not hasattr(pipe, "labels") or "class_labels" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{name} is a {type(pipe).__name__}; sample draws from class-conditional pipelines")
    return pipe


def device_of(text: str, w: World) -> str:
    """The device called ``text``; "auto" is this process's GPU, else the CPU."""
    import torch

    if text != "auto":
        try:
            torch.zeros(1, device=text).cpu()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {text} cannot be used here ({error}); give auto or cpu") from error
        return text
    return f"cuda:{w.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _output_folder(out_dir: str | None, w: World) -> Iterator[Path | None]:
    """A hidden folder that all processes fill; it takes the name ``out_dir`` when all are done."""
    if out_dir is None:
        yield None
        return
    target = Path(out_dir).absolute()
    name = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.") if w.is_main else None
    part = Path(w.gather_objects(name)[0])
    try:
        yield part
        w.gather_objects(None)  # every image is written
        if w.is_main:
            part.chmod(0o755)
            os.replace(part, target)
    finally:
        if w.is_main:
            shutil.rmtree(part, ignore_errors=True)


def _file_name(i: int, labels: Sequence[int]) -> str:
    return f"{labels[i]:0{len(str(max(labels)))}d}-{i:06d}.png"


def _save_image(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def _write_labels(folder: Path, labels: Sequence[int], names: dict[int, str], ns: Any) -> None:
    files = {_file_name(i, labels): label for i, label in enumerate(labels)}
    used = {label: names[label] for label in sorted(set(labels)) if label in names}
    record = {"model": ns.model, "seed": ns.seed, "steps": ns.steps, "class_names": used, "labels": files}
    (folder / "labels.json").write_text(json.dumps(record, indent=1) + "\n")


def _write_grid(
    path: Path, rows: dict[int, np.ndarray], classes: Sequence[int], names: dict[int, str], columns: int
) -> None:
    import numpy as np

    from gensample.apps.grid import image_grid, write_whole

    pixels = np.stack([rows[i] for i in sorted(rows)])
    grid = image_grid(pixels, columns, [names.get(label, str(label)) for label in classes])
    write_whole(path, grid.save)
