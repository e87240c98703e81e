"""Recipes: YAML with typed sections, read by jsonargparse, every value of which the command line may override.

model: {class_path: DiT, init_args: {...}}          data: {class_path: FashionMNIST, init_args: {...}}
loss: {class_path: InterpolantLoss, ...}            optimizer: ... schedule: ... training: ... export: ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from gensample.models.classifier import Classifier
from gensample.models.dit import DiT
from gensample.training.config import ExportConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.couplings import CoupledLoss
from gensample.training.data import FashionMNIST, ImageData, LabelledImages
from gensample.training.folders import ImageFolder, NpzImages
from gensample.training.losses import ClassificationLoss, InterpolantLoss
from gensample.training.multiplicative import LogSpaceLoss, MultiplicativeScoreLoss
from gensample.training.pairs import FashionPairs

GenerativeLoss = InterpolantLoss | CoupledLoss | LogSpaceLoss | MultiplicativeScoreLoss

# What a recipe may name; a class path of anything else is refused before it is imported.
_CLASSES = (
    DiT, Classifier, InterpolantLoss, CoupledLoss, LogSpaceLoss, MultiplicativeScoreLoss, ClassificationLoss,
    FashionMNIST, FashionPairs, ImageFolder, NpzImages,
)  # fmt: skip
_NAMES = {c.__name__: f"{c.__module__}.{c.__qualname__}" for c in _CLASSES}


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe: its objects, and the same as plain JSON data."""

    model: DiT | Classifier
    loss: GenerativeLoss | ClassificationLoss
    data: ImageData
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    export: ExportConfig
    settings: dict[str, Any]
    text: str


def recipe_parser() -> ArgumentParser:
    """The parser of recipes; ``--print_config`` shows the merged one."""
    parser = ArgumentParser(
        prog="gensample train", exit_on_error=False, description="Train a model by a recipe."
    )
    parser.add_argument("--config", action="config", help="the recipe, YAML")
    parser.add_argument("--model", type=DiT | Classifier, required=True, help="the network to train")
    parser.add_argument(
        "--loss", type=GenerativeLoss | ClassificationLoss, required=True, help="what to minimise"
    )
    parser.add_argument("--data", type=ImageData, required=True, help="labelled images")
    parser.add_argument("--optimizer", type=OptimizerConfig, default=OptimizerConfig())
    parser.add_argument("--schedule", type=ScheduleConfig, default=ScheduleConfig())
    parser.add_argument("--training", type=TrainingConfig, required=True)
    parser.add_argument("--export", type=ExportConfig, default=ExportConfig())
    return parser


def read_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at ``path`` with ``--section.key value`` overrides and build its objects.

    Nothing is written, and no data is read yet. The model has the initial weights of ``training.seed``.

    Raises:
        RecipeError: unreadable YAML, unknown keys or classes, values of the wrong type or out of range.
    """
    _check_classes(path)
    _check_overrides(overrides)
    parser = recipe_parser()
    try:
        settings = parser.parse_args(["--config", path, *overrides])
        built: Namespace = parser.instantiate(settings)
    except (ArgumentError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    del settings["config"]
    built.model.initialize_weights(built.training.seed)
    if isinstance(built.loss, GenerativeLoss) and built.loss.label_dropout is None:
        built.loss.label_dropout = built.model.config.class_dropout_prob
    if isinstance(built.model, DiT) != isinstance(built.loss, GenerativeLoss):
        raise RecipeError(
            f"{path}: {type(built.model).__name__} cannot be trained with {type(built.loss).__name__}"
        )
    return Recipe(
        model=built.model,
        loss=built.loss,
        data=built.data,
        optimizer=built.optimizer,
        schedule=built.schedule,
        training=built.training,
        export=built.export,
        settings=settings.as_dict(),
        text=parser.dump(settings),
    )


def check_images(
    model: DiT | Classifier, images: LabelledImages, loss: GenerativeLoss | ClassificationLoss | None = None
) -> None:
    """Images and labels must be what the model takes, for the ``loss`` it is trained with.

    Raises:
        ValueError: naming the setting to change.
    """
    channels, height, width = images.shape
    if isinstance(loss, CoupledLoss):
        taken, given = loss.channels(channels), (model.config.in_channels, model.config.out_channels)
        if taken != given:
            raise ValueError(
                f"images of {channels} channels under this coupling and its heads need model.in_channels, out_channels "
                f"= {taken}, not {given}: make them agree"
            )
    elif channels != model.config.in_channels:
        raise ValueError(
            f"images have {channels} channels, model.in_channels is {model.config.in_channels}: make them agree"
        )
    if isinstance(model, DiT) and (height, width) != (model.config.sample_size,) * 2:
        raise ValueError(
            f"images are {height}x{width}, model.sample_size is {model.config.sample_size}: make them agree"
        )
    if len(images.class_names) != model.config.num_classes:
        raise ValueError(
            f"the data has {len(images.class_names)} classes, model.num_classes is {model.config.num_classes}: "
            "make them agree"
        )


def read_mapping(path: str, sections: str) -> dict[str, Any]:
    """The YAML mapping in the file ``path``; RecipeError, which names the ``sections`` it should have, for all else."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a recipe: it must be a mapping with {sections}")
    return content


def _check_classes(path: str) -> None:
    for section, value in read_mapping(path, "model, loss, data and training").items():
        if isinstance(value, dict) and "class_path" in value:
            _check_class(f"{path}: {section}", value["class_path"])


def _check_overrides(overrides: Sequence[str]) -> None:
    for position, text in enumerate(overrides):
        name, joined, value = text.partition("=")
        if name == "--config":
            raise RecipeError("--config: one recipe a run; change single keys with --section.key value")
        if name in ("--model", "--loss", "--data") or name.endswith("class_path"):
            _check_class(name, value if joined else next(iter(overrides[position + 1 :]), None))


def _check_class(where: str, name: object) -> None:
    if name not in _NAMES and name not in _NAMES.values():
        raise RecipeError(f"{where}: class_path {name!r} is unknown; use one of {', '.join(_NAMES)}")
