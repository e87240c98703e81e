"""``gensample train RECIPE [--section.key value ...]``: train a model by a YAML recipe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gensample.training.loop import Trainer
    from gensample.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand; the recipe's own keys are parsed by :func:`run`."""
    parser.add_argument("recipe", help="YAML file, such as recipes/fashion_dit.yaml")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="--section.key value, for any key of the recipe; --print_config shows the merged recipe",
    )


def run(namespace: Any) -> int:
    """Train; 0 done, 2 bad input, 1 failure, 130 stopped by a signal (resume with --training.resume auto)."""
    from gensample.training.loop import TrainingDiverged
    from gensample.training.recipe import read_recipe

    try:
        recipe = read_recipe(namespace.recipe, list(namespace.overrides))
        trainer = _prepare(recipe)
    except (ValueError, OSError) as error:
        print(f"gensample train: {error}", file=sys.stderr)
        return 2
    try:
        return _train(recipe, trainer)
    except TrainingDiverged as error:
        print(f"gensample train: {error}", file=sys.stderr)
        return 1
    finally:
        trainer.close()


def _prepare(recipe: Recipe) -> Trainer:
    """Read the data, set up the loop and take up its checkpoint; makes the output folder when all is well."""
    from pathlib import Path

    from gensample.training.batches import FixedBatches, ShuffledImages
    from gensample.training.export import chosen_weights
    from gensample.training.loop import Trainer
    from gensample.training.recipe import check_images
    from gensample.training.validation import Validation

    config = recipe.training
    images, held_out = recipe.data.load(), recipe.data.load_validation()
    callbacks = []
    check_images(recipe.model, images, recipe.loss)
    if held_out is not None:
        check_images(recipe.model, held_out, recipe.loss)
        fixed = FixedBatches(held_out, recipe.loss.draw_validation, seed=0, batch_size=500)
        callbacks.append(Validation(fixed, recipe.loss))
    trainer = Trainer(
        recipe.model,
        recipe.loss,
        ShuffledImages(images, recipe.loss.draw, seed=config.seed, batch_size=config.batch_size),
        training=config,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        callbacks=callbacks,
        notes={"recipe": recipe.settings, "classes": list(images.class_names)},
    )
    chosen_weights(
        recipe.export, trainer.ema.decays, {}
    )  # an unknown choice should not wait for the end of the run
    if not config.estimate_only:
        trainer.resume()
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return trainer


def _train(recipe: Recipe, trainer: Trainer) -> int:
    config = recipe.training
    if config.estimate_only:
        hours = trainer.estimate() / 3600
        print(f"{config.steps} updates of {config.batch_size}: about {hours:.2f} h here, without validation")
        return 0
    result = trainer.run()
    if result.reason == "finished" and trainer.accelerator.is_main_process:
        _export(recipe, trainer)
    trainer.accelerator.wait_for_everyone()
    return 130 if result.reason == "signal" else 0


def _export(recipe: Recipe, trainer: Trainer) -> None:
    import json
    from pathlib import Path

    import torch

    from gensample.training.export import chosen_weights, export_model

    name = chosen_weights(recipe.export, trainer.ema.decays, trainer.figures)
    tensors = trainer.model.state_dict() if name == "model" else trainer.ema.state_dict(float(name[4:]))
    summary = {
        "weights": name,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "skipped_steps": trainer.skipped_steps,
        "figures": trainer.figures,
    }
    folder = Path(recipe.training.output_dir) / "model"
    export_model(
        recipe.model,
        tensors,
        folder,
        dtype=getattr(torch, recipe.export.dtype),
        notes={**summary, "recipe": recipe.settings},
    )
    print(json.dumps({"model": str(folder), **summary}))
