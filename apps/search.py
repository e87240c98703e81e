"""``gensample search MODEL --reward class:bag --method dts* --out best.png``: samples of higher reward.

One process.  A saved tree goes on with ``--resume-from``, under the same settings, towards a larger budget.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensample.apps.fid import report_errors
from gensample.apps.guidance_options import add_guidance_arguments, check_guidance, guidance_rule
from gensample.apps.sample import DIFFUSION_HELP

if TYPE_CHECKING:
    from gensample.rewards import Reward
    from gensample.search import Method
    from gensample.search.tree_search import SearchOutput

REWARDS = "class:NAMES, small-file, large-file, clip:MODEL, pick:MODEL"
_COLUMNS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add = parser.add_argument
    add("model", help="shipped name (fashion), folder, or Hub id of a pipeline")
    add("--reward", required=True, help=f"{REWARDS}; or a sum: class:5,7,9 + 0.5*small-file")
    add(
        "--method",
        default="dts*",
        help="dts, dts*, importance, smc, tds, dps, svdd, best_of_n, random, zero_order, paths",
    )
    add("--options", help='settings of the method as JSON: {"potential": "max"}')
    add("--budget", type=int, default=2000, help="denoiser evaluations, never exceeded")
    add(
        "--inverse-temperature",
        type=float,
        default=1.0,
        help="lambda: samplers aim at p(x) exp(lambda reward)",
    )
    add("--images", type=int, default=16, help="images to return")
    add("--prompt", help="of text pipelines")
    add(
        "--labels",
        default="none",
        help="one index or name for class-conditional pipelines; none drops the label",
    )
    add("--steps", type=int, default=16, help="sampling steps")
    add("--solver", default="exp", help="exp or em; scheduler is the pipeline's own")
    add("--diffusion", help=DIFFUSION_HELP)
    add_guidance_arguments(parser)  # --classifier is of class: rewards too
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=16, help="rows per network call")
    add("--out", required=True, help="PNG file of the images, in a grid")
    add("--save-to", help="file of the tree, kept as it grows (dts and dts*)")
    add("--resume-from", help="a kept tree to go on with; the budget counts what was spent on it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--json", action="store_true", help="one line of JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


def run(namespace: Any) -> int:
    """Search and write; 0 done, 2 bad input, 1 failure."""
    from gensample.metrics.errors import InputError

    with report_errors("search") as outcome:
        try:
            _search(namespace)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
    return outcome.code


def _search(ns: Any) -> None:
    import gensample
    from gensample.apps.drawing import load_quietly
    from gensample.apps.grid import check_writable_file
    from gensample.apps.sample import device_of, diffusion_of
    from gensample.metrics.distributed import World

    method = method_of(ns.method, ns.options)
    check_writable_file(Path(ns.out), "--out")
    check_guidance(ns)
    if ns.steps < 1 or ns.images < 1 or ns.batch_size < 1:
        raise ValueError(
            f"--steps {ns.steps}, --images {ns.images} and --batch-size {ns.batch_size} must be at least 1"
        )
    pipe = load_quietly(ns.model, revision=ns.revision)
    device = device_of(ns.device, World())
    pipe.to(device)
    denoiser, names = _conditioned(ns, pipe)
    reward = reward_of(ns.reward, names, lambda: _classifier(ns, device), ns.prompt, device)
    guided = ns.guidance != "cfg" or ns.scale != 1.0
    if guided and ns.prompt is None and ns.labels == "none":
        raise ValueError(
            "--guidance sharpens a label, and --labels none drops it; give --labels or leave guidance out"
        )
    started = time.monotonic()
    search = gensample.TreeSearch(
        denoiser, reward=reward, solver=None if ns.solver == "scheduler" else ns.solver,
        diffusion=None if ns.diffusion is None else diffusion_of(ns.diffusion),
        guidance=guidance_rule(ns, pipe, device) if guided else None, num_inference_steps=ns.steps,
        inverse_temperature=ns.inverse_temperature, micro_batch=ns.batch_size,
    )  # fmt: skip
    out = search(
        method=method, budget=ns.budget, generator=ns.seed, num_images=ns.images, save_to=ns.save_to,
        resume_from=ns.resume_from, output_type="pt", progress=not ns.quiet,
    )  # fmt: skip
    _write(ns, out, round(time.monotonic() - started, 2))


def method_of(name: str, options: str | None) -> Method:
    """The method called ``name`` with ``options``, a JSON object of its settings; ValueError for either unknown."""
    import dataclasses

    from gensample.search.tree_search import named_method

    method = named_method(name)
    if options is None:
        return method
    try:
        changes = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"--options {options} is not JSON: {error}") from error
    known = [f.name for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    if not isinstance(changes, dict) or not set(changes) <= set(known):
        raise ValueError(f"--options {options} must be an object with some of {known}")
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    changed: Method = dataclasses.replace(method, **changes)  # type: ignore[type-var]
    return changed


def reward_of(text: str, names: dict[str, int], classifier: Any, prompt: str | None, device: str) -> Reward:
    """The reward of ``[WEIGHT*]NAME[:ARGUMENT] + ...``; ``classifier()`` loads the one of class: terms."""
    from gensample.rewards import WeightedSum, for_prompt

    terms = []
    for term in text.split("+"):
        weight, star, name = term.strip().rpartition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError as error:
            raise ValueError(f"--reward {term.strip()}: {weight!r} is no number") from error
        terms.append((_term(name.strip(), names, classifier, prompt, device), factor))
    if len(terms) == 1 and terms[0][1] == 1.0:
        return for_prompt(terms[0][0], prompt)
    return for_prompt(WeightedSum(terms), prompt)


def _term(text: str, names: dict[str, int], classifier: Any, prompt: str | None, device: str) -> Reward:
    from gensample.apps.drawing import parse_labels
    from gensample.rewards import ClassLogProbability, Compressibility, TextImageReward

    name, _, argument = text.partition(":")
    if name == "class" and argument:
        labels = parse_labels(argument, names)
        unknown = [label for label in labels if isinstance(label, str) and label not in names]
        if unknown:
            raise ValueError(
                f"--reward {text}: class {unknown[0]!r} is unknown; use an index or one of {list(names)}"
            )
        return ClassLogProbability(classifier(), [names[x] if isinstance(x, str) else x for x in labels])
    if text in ("small-file", "large-file"):
        return Compressibility("small" if text == "small-file" else "large")
    if name in ("clip", "pick") and argument:
        if prompt is None:
            raise ValueError(f"--reward {text} needs --prompt")
        return TextImageReward.from_pretrained(
            argument, kind="clip" if name == "clip" else "pick", device=device
        )
    raise ValueError(f"--reward {text!r} is unknown; use {REWARDS}")


def _conditioned(ns: Any, pipe: Any) -> tuple[Any, dict[str, int]]:
    """The denoiser under the prompt or label asked for, and the pipeline's class names."""
    import inspect

    from gensample.apps.drawing import parse_labels
    from gensample.denoisers import denoiser_from_pipeline

    names = dict(getattr(pipe, "labels", None) or {})
    arguments = inspect.signature(pipe.__call__).parameters
    if "class_labels" in arguments:
        if ns.prompt is not None:
            raise ValueError(f"--prompt does not apply to {type(pipe).__name__}; give --labels")
        labels = [0] if ns.labels == "none" else parse_labels(ns.labels, names)
        if len(labels) != 1:
            raise ValueError(f"--labels {ns.labels} are {len(labels)} labels; a search takes one, or none")
        denoiser = denoiser_from_pipeline(pipe, class_labels=labels)
        if ns.labels == "none":
            denoiser.conditioning = denoiser.conditioning.null()
        return denoiser, names
    if ns.labels != "none":
        raise ValueError(f"--labels does not apply to {type(pipe).__name__}")
    if "prompt" in arguments:
        if ns.prompt is None:
            raise ValueError(f"{type(pipe).__name__} needs --prompt")
        return denoiser_from_pipeline(pipe, prompt=ns.prompt), names
    return denoiser_from_pipeline(pipe), names


def _classifier(ns: Any, device: str) -> Any:
    from gensample.apps.guidance_options import load_network

    if ns.classifier is None and ns.model != "fashion":
        raise ValueError(f"--reward class: needs --classifier: none ships with {ns.model}")
    return load_network(ns.classifier or "fashion_classifier_a", device, "--classifier")


def _write(ns: Any, out: SearchOutput, seconds: float) -> None:
    import gensample
    from gensample.apps.drawing import to_pixels
    from gensample.apps.grid import image_grid, write_whole

    grid = image_grid(to_pixels(out.images), min(_COLUMNS, len(out.images)))
    write_whole(Path(ns.out), grid.save)
    (info,) = out.info
    record = {
        "model": ns.model, "reward": ns.reward, "method": ns.method, "options": ns.options, "budget": ns.budget,
        "evaluations": out.evaluations, "spent": info["evaluations"], "best": info["best"],
        "rewards": out.rewards.tolist(), "log_z": info["log_z"], "ess": info["ess"],
        "inverse_temperature": ns.inverse_temperature, "steps": ns.steps, "solver": ns.solver, "seed": ns.seed,
        "seconds": seconds, "out": ns.out, "save_to": ns.save_to, "version": gensample.__version__,
    }  # fmt: skip
    text = (
        f"{len(out.images)} images in {ns.out}: best reward {info['best']:.4g}, mean {out.rewards.mean():.4g}; "
        f"{info['evaluations']} network evaluations, {seconds} s"
    )
    print(json.dumps(record) if ns.json else text)
