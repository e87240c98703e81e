"""``gensample align RECIPE [--section.key value ...]``: align a model to rewards by a YAML recipe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gensample.alignment.prompts import Prompts
    from gensample.alignment.recipe import AlignRecipe
    from gensample.alignment.trainer import AlignmentTrainer
    from gensample.denoisers import Denoiser
    from gensample.rewards import Reward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand; the recipe's own keys are parsed by :func:`run`."""
    parser.add_argument("recipe", help="YAML file, such as recipes/align_fashion.yaml")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="--section.key value, for any key of the recipe; --print_config shows the merged recipe",
    )


def run(namespace: Any) -> int:
    """Align; 0 done, 2 bad input, 1 failure, 130 stopped by a signal (resume with --training.resume auto)."""
    from gensample.alignment.recipe import read_align_recipe
    from gensample.training.loop import TrainingDiverged

    try:
        recipe = read_align_recipe(namespace.recipe, list(namespace.overrides))
        pipe, trainer = _prepare(recipe)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"gensample align: {error}", file=sys.stderr)
        return 2
    try:
        return _align(recipe, pipe, trainer)
    except (TrainingDiverged, FloatingPointError, RuntimeError) as error:
        print(f"gensample align: {error}", file=sys.stderr)
        return 1
    finally:
        trainer.close()


def _prepare(recipe: AlignRecipe) -> tuple[Any, AlignmentTrainer]:
    """Load the model, set up the loop and take up its checkpoint; makes the output folder when all is well."""
    from pathlib import Path

    import torch

    from gensample.alignment.adapters import add_lora
    from gensample.alignment.evaluation import Evaluation
    from gensample.alignment.export import trained_component
    from gensample.alignment.reward_calls import RewardCalls
    from gensample.alignment.sampler import build_policy
    from gensample.alignment.trainer import AlignmentTrainer
    from gensample.apps.drawing import load_quietly
    from gensample.training.export import chosen_weights
    from gensample.training.launch import make_accelerator

    exported = chosen_weights(recipe.export, recipe.training.ema_decays, {})
    accelerator = make_accelerator(recipe.training)
    pipe = load_quietly(recipe.model)
    network = getattr(pipe, trained_component(pipe))
    pipe.to(accelerator.device)
    if recipe.dtype != "float32":
        pipe.to(getattr(torch, recipe.dtype))
    if recipe.lora is None:
        network.requires_grad_(True)
    else:
        add_lora(network, recipe.lora, seed=recipe.training.seed, old=recipe.alignment.nft is not None)
    if recipe.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    denoiser, prompts = _prompts(recipe, pipe)
    rewards, weights = _rewards(recipe, pipe, accelerator.device)
    callbacks = []
    if recipe.evaluation.samples:
        judged = range(min(recipe.evaluation.prompts, len(prompts)))
        callbacks.append(
            Evaluation(
                prompts=judged,
                samples=recipe.evaluation.samples,
                seed=recipe.evaluation.seed,
                grid=recipe.evaluation.grid,
                ema=None if exported == "model" else float(exported[4:]),  # what is exported is judged
            )
        )
    trainer = AlignmentTrainer(
        build_policy(denoiser, recipe.sampler), recipe.trees, RewardCalls(rewards, recipe.rewards.calls), prompts,
        reward_weights=weights, alignment=recipe.alignment, training=recipe.training, optimizer=recipe.optimizer,
        schedule=recipe.schedule, callbacks=callbacks, accelerator=accelerator, notes={"recipe": recipe.settings},
    )  # fmt: skip
    if not recipe.training.estimate_only:
        trainer.resume()
        Path(recipe.training.output_dir).mkdir(parents=True, exist_ok=True)
    return pipe, trainer


def _prompts(recipe: AlignRecipe, pipe: Any) -> tuple[Denoiser, Prompts]:
    """The denoiser and what it draws; ValueError for labels of a text model and texts of a labelled one."""
    import inspect

    from gensample.alignment.prompts import BoundPrompts, EncodedPrompts
    from gensample.denoisers import denoiser_from_pipeline

    texts, labels, options = recipe.prompts.read(), recipe.prompts.labels, recipe.prompts.options
    labelled = "class_labels" in inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if labelled:
        if texts is not None:
            raise ValueError(f"prompts.texts and prompts.file do not apply to {name}; give prompts.labels")
        count = (
            pipe.transformer.config.num_classes if hasattr(pipe.transformer.config, "num_classes") else 1000
        )
        denoiser = denoiser_from_pipeline(
            pipe, class_labels=list(range(count)) if labels is None else labels, **options
        )
        return denoiser, BoundPrompts(denoiser.conditioning)
    if labels is not None or texts is None:
        raise ValueError(f"{name} draws texts; give prompts.texts or prompts.file, and no prompts.labels")
    denoiser = denoiser_from_pipeline(pipe, prompt=texts[0], **options)
    return denoiser, EncodedPrompts(
        texts, lambda text: denoiser_from_pipeline(pipe, prompt=text, **options).conditioning
    )


def _rewards(
    recipe: AlignRecipe, pipe: Any, device: torch.device
) -> tuple[dict[str, Reward], dict[str, float]]:
    """Rewards and their weights by name."""
    import gensample
    from gensample.apps.search import reward_of
    from gensample.rewards import ClassLogProbability, InkDensity

    labels = dict(getattr(pipe, "labels", None) or {})

    def classifier() -> Any:
        net = gensample.load(recipe.rewards.classifier, device=device)
        return net.eval().requires_grad_(False)

    def named(text: str) -> Reward:
        name, _, argument = text.partition(":")
        if text == "class":
            return ClassLogProbability(classifier())
        if name == "ink":
            try:
                target = float(argument)
            except ValueError as error:
                raise ValueError(f"rewards: {text!r}: {argument!r} is no number; write ink:0.3") from error
            return InkDensity(target)
        try:
            return reward_of(text, labels, classifier, None if labels else "", str(device))
        except ValueError as error:
            raise ValueError(f"rewards: class, ink:TARGET, or as in gensample search: {error}") from error

    terms = recipe.rewards.terms
    return {t.reward: named(t.reward) for t in terms}, {t.reward: t.weight for t in terms}


def _align(recipe: AlignRecipe, pipe: Any, trainer: AlignmentTrainer) -> int:
    config = recipe.training
    if config.estimate_only:
        hours = trainer.estimate(2) / 3600
        print(f"{recipe.trees.at(0).describe()} a tree")
        print(
            f"{config.steps} iterations of {config.batch_size} trees: about {hours:.2f} h here, without evaluation"
        )
        return 0
    result = trainer.run()
    if result.reason == "finished" and trainer.accelerator.is_main_process:
        _export(recipe, pipe, trainer)
    trainer.accelerator.wait_for_everyone()
    return 130 if result.reason == "signal" else 0


def _export(recipe: AlignRecipe, pipe: Any, trainer: AlignmentTrainer) -> None:
    import contextlib
    import json
    from pathlib import Path

    import torch

    from gensample.alignment.export import export_lora, export_pipeline
    from gensample.training.export import chosen_weights

    name = chosen_weights(recipe.export, recipe.training.ema_decays, {})
    folder = Path(recipe.training.output_dir) / ("pipeline" if recipe.lora is None else "lora")
    summary = {
        "weights": name,
        "iterations": trainer.step,
        "evaluations": trainer.evaluations,
        "seconds": round(trainer.seconds, 1),
        "figures": trainer.figures,
    }
    notes = {**summary, "recipe": recipe.settings}
    averaged = contextlib.nullcontext() if name == "model" else trainer.ema.applied(float(name[4:]))
    with averaged:
        export = export_pipeline if recipe.lora is None else export_lora
        export(pipe, folder, dtype=getattr(torch, recipe.export.dtype), notes=notes)
    print(json.dumps({"exported": str(folder), **summary}))
