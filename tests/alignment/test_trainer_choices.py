"""What the trainer decides by itself: which network draws, which edges it evaluates, what it refuses early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.nft import NFT
from gensample.alignment.objectives import Objective
from gensample.alignment.presets import branch, dynamic_tree
from gensample.alignment.pruning import Pruning
from gensample.alignment.schedule import TreeSchedule, Window
from gensample.training.record import read_metrics
from tests.alignment.runs import STEPS, tiny_run


def test_the_samples_of_nft_are_drawn_by_the_old_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "alignment": AlignmentConfig(nft=NFT(times_per_sample=2)),
        "trees": TreeSchedule(steps=STEPS, roots=4, sde="splits"),
    }
    run = tiny_run(tmp_path, steps=1, **options)
    asked: list[str] = []
    answer = run.policy.answer

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("net", "main"))
        return answer(*args, **kwargs)

    monkeypatch.setattr(run.policy, "answer", watched)
    run.run()
    assert set(asked) == {"old"}  # the update reads the networks through the denoiser, not through the policy


@pytest.mark.parametrize("tuned", [False, True])
def test_edges_whose_advantage_is_zero_by_construction_cost_nothing(tmp_path: Path, tuned: bool) -> None:
    """Sibling baselines: only edges of the splits can carry a signal; LayerTuning pulls at the others all the same."""
    trees = branch(steps=STEPS, splits=(0, 2))
    objective = Objective(layer_tuning=LayerTuning() if tuned else None)
    alignment = AlignmentConfig(advantages=AdvantageRule(baseline="sibling"), objective=objective)
    tiny_run(tmp_path, steps=1, trees=trees, alignment=alignment).run()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    plan = trees.at(0)
    at_splits = sum(plan.nodes[i + 1] for i in plan.split_steps)
    everywhere = sum(plan.nodes[i + 1] for i in plan.trained_steps)
    assert at_splits < everywhere
    assert record["edges"] == 2 * (everywhere if tuned else at_splits)


def test_a_step_without_rewards_leaves_zero_gradients(tmp_path: Path) -> None:
    """Clipping and loss scalers look at them; None would put a CPU zero beside a GPU's loss."""

    def never(images: Tensor, cond: Any = None) -> Tensor:
        return torch.full((len(images),), torch.nan)

    run = tiny_run(tmp_path, steps=1, rewards={"ink": never})
    seen: list[bool] = []
    step = run.optimizer_step

    def watched(number: int, gradients: Any) -> Any:
        def kept() -> Any:
            loss = gradients()
            trained = [p for p in run.model.parameters() if p.requires_grad]
            seen.append(all(p.grad is not None and not p.grad.any() for p in trained))
            return loss

        return step(number, kept)

    run.optimizer_step = watched  # type: ignore[method-assign]
    run.run()
    assert seen == [True]


def test_a_pruning_window_that_does_not_fit_is_refused_before_the_first_iteration(tmp_path: Path) -> None:
    alignment = AlignmentConfig(pruning=Pruning(depth_window=Window(size=4, first=9)))
    with pytest.raises(ValueError, match="does not fit before the last"):
        tiny_run(tmp_path, trees=dynamic_tree(steps=STEPS, depth=2), alignment=alignment)
