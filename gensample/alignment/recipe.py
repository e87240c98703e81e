"""Alignment recipes: YAML with typed sections, read by jsonargparse; the command line may override every value.

model: fashion                          prompts: {labels: [...]} or {texts: [...]} or {file: prompts.txt}
sampler: {steps, kernel, ...}           trees: {preset: split_only, options: {...}}
rewards: {terms: [{reward: class}]}     lora: {rank, alpha, targets} or null for all weights
alignment: ...  evaluation: ...  optimizer: ...  schedule: ...  training: ...  export: ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from gensample.alignment.adapters import LoRAConfig
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.presets import make_schedule
from gensample.alignment.reward_calls import RewardCallConfig
from gensample.alignment.sampler import SamplerConfig
from gensample.alignment.schedule import TreeSchedule
from gensample.training.config import ExportConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.recipe import RecipeError, read_mapping


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is drawn: ``labels`` of a class-conditional model (default all), or ``texts``, or a ``file`` of one a line.

    options: further arguments of a text pipeline's prompt encoding, such as height and width.
    """

    labels: list[int | str] | None = None
    texts: list[str] | None = None
    file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [n for n in ("labels", "texts", "file") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; give one")

    def read(self) -> list[str] | None:
        """The texts, None where there are none; ValueError or OSError for a file without any."""
        if self.file is None:
            return self.texts
        lines = [
            line.strip() for line in Path(self.file).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        if not lines:
            raise ValueError(f"{self.file} holds no prompt; write one a line")
        return lines


@dataclass(frozen=True, kw_only=True)
class TreesConfig:
    """A preset of ``gensample.alignment.presets`` and its options; its steps are the sampler's."""

    preset: str = "split_only"
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, steps: int) -> TreeSchedule:
        """The schedule; ValueError for an unknown preset or option, or one out of range."""
        if "steps" in self.options:
            raise ValueError("trees.options.steps is the sampler's: set sampler.steps")
        try:
            return make_schedule(self.preset, steps=steps, **self.options)
        except TypeError as error:
            raise ValueError(f"trees.options={self.options}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward by its name: ``class`` (log-probability of the sample's own label), ``class:NAMES``, ``ink:TARGET``,
    ``small-file``, ``large-file``, ``clip:MODEL``, ``pick:MODEL``; and its weight."""

    reward: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} of {self.reward!r} must be finite")


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """What is maximised.  classifier: of ``class`` rewards, a shipped name, folder or Hub id."""

    terms: list[RewardTerm]
    classifier: str = "fashion_classifier_a"
    calls: RewardCallConfig = field(default_factory=RewardCallConfig)

    def __post_init__(self) -> None:
        names = [term.reward for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"terms={names} must be different rewards, at least one")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Samples without noise every ``training.evaluate_every`` iterations: ``samples`` of the first ``prompts`` prompts,
    always from noise ``seed``; ``grid`` of each are drawn in ``output_dir/samples``.  samples 0: no evaluation."""

    samples: int = 8
    prompts: int = 16
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or self.prompts < 1 or self.grid < 0:
            raise ValueError(
                f"samples={self.samples} and grid={self.grid} must not be negative, prompts={self.prompts} at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class AlignRecipe:
    """A parsed recipe, and the same as plain JSON data."""

    model: str
    dtype: Literal["float32", "bfloat16", "float16"]
    gradient_checkpointing: bool
    prompts: PromptConfig
    sampler: SamplerConfig
    trees: TreeSchedule
    rewards: RewardsConfig
    lora: LoRAConfig | None
    alignment: AlignmentConfig
    evaluation: EvaluationConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    export: ExportConfig
    settings: dict[str, Any]


def recipe_parser() -> ArgumentParser:
    """The parser of alignment recipes; ``--print_config`` shows the merged one."""
    parser = ArgumentParser(
        prog="gensample align", exit_on_error=False, description="Align a model to rewards by a recipe."
    )
    parser.add_argument("--config", action="config", help="the recipe, YAML")
    parser.add_argument(
        "--model", type=str, required=True, help="shipped name, folder or Hub id of a pipeline"
    )
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32",
        help="of the frozen weights under LoRA; trained ones are float32",
    )  # fmt: skip
    parser.add_argument("--gradient_checkpointing", type=bool, default=False)
    parser.add_argument("--prompts", type=PromptConfig, default=PromptConfig())
    parser.add_argument("--sampler", type=SamplerConfig, default=SamplerConfig())
    parser.add_argument("--trees", type=TreesConfig, default=TreesConfig())
    parser.add_argument("--rewards", type=RewardsConfig, required=True)
    parser.add_argument("--lora", type=LoRAConfig | None, default=LoRAConfig())
    parser.add_argument("--alignment", type=AlignmentConfig, default=AlignmentConfig())
    parser.add_argument("--evaluation", type=EvaluationConfig, default=EvaluationConfig())
    parser.add_argument("--optimizer", type=OptimizerConfig, default=OptimizerConfig(learning_rate=3e-4))
    parser.add_argument(
        "--schedule", type=ScheduleConfig, default=ScheduleConfig(decay="constant", warmup_steps=0)
    )
    parser.add_argument("--training", type=TrainingConfig, required=True)
    parser.add_argument("--export", type=ExportConfig, default=ExportConfig())
    return parser


def read_align_recipe(path: str, overrides: Sequence[str] = ()) -> AlignRecipe:
    """Read the recipe at ``path`` with ``--section.key value`` overrides.  Nothing is written or loaded.

    Raises:
        RecipeError: unreadable YAML, unknown keys, values of the wrong type or out of range.
    """
    read_mapping(path, "model, rewards and training")
    if any(text.partition("=")[0] == "--config" for text in overrides):
        raise RecipeError("--config: one recipe a run; change single keys with --section.key value")
    parser = recipe_parser()
    try:
        settings = parser.parse_args(["--config", path, *overrides])
        built = parser.instantiate(settings)
        trees = built.trees.build(built.sampler.steps)
    except (ArgumentError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if built.lora is None and built.dtype != "float32":
        raise RecipeError(
            f"{path}: dtype={built.dtype} is of frozen weights; without lora all are trained in float32"
        )
    del settings["config"]
    values = {name: value for name, value in vars(built).items() if name not in ("config", "trees")}
    return AlignRecipe(**values, trees=trees, settings=settings.as_dict())
