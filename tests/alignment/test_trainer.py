"""The alignment trainer: resumed runs, modes, passes, failing rewards, figures.  Invariant 15 of the specification."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gensample.alignment.adapters import LoRAConfig
from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.layer_tuning import LayerTuning
from gensample.alignment.nft import NFT
from gensample.alignment.objectives import Objective
from gensample.alignment.presets import dynamic_tree, flat_grpo
from gensample.alignment.reward_calls import RewardCallConfig
from gensample.alignment.schedule import TreeSchedule
from gensample.rewards import InkDensity
from gensample.training import OptimizerConfig, load_checkpoint
from gensample.training.record import read_metrics
from tests.alignment.runs import STEPS, Failing, moving_window, tiny_run


def checkpoint(folder: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    groups = load_checkpoint(folder / f"checkpoints/step-{step:08d}").tensors
    return {f"{g}/{n}": t for g, ts in groups.items() for n, t in ts.items()}


def figures(folder: Path) -> list[dict[str, Any]]:
    """The run's records without clocks."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(folder / "metrics.jsonl")]


TUNED = AlignmentConfig(
    updates_per_rollout=2,
    objective=Objective(kl=0.1, layer_tuning=LayerTuning(weight=0.1, target="best_velocity")),
    advantages=AdvantageRule(baseline="leaf", edge_weight="descendants"), combination="normalised",
)  # fmt: skip


LIKELIHOOD_FREE: dict[str, Any] = {
    "alignment": AlignmentConfig(nft=NFT(times_per_sample=2)),
    "trees": TreeSchedule(steps=STEPS, roots=4, sde="splits"),
}


@pytest.mark.parametrize(
    "options",
    [{"evaluate": True}, {"alignment": TUNED}, LIKELIHOOD_FREE, {**LIKELIHOOD_FREE, "lora": None}],
    ids=["policy gradient", "two updates, KL, LayerTuning", "NFT with LoRA", "NFT of all weights"],
)
def test_four_iterations_are_two_and_two_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    tiny_run(tmp_path / "whole", steps=4, **options).run()
    tiny_run(tmp_path / "parts", steps=2, **options).run()
    tiny_run(tmp_path / "parts", steps=4, resume="auto", weights_seed=99, **options).run()
    whole, parts = checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_the_divergence_from_the_reference_is_taken_off_the_reward(tmp_path: Path) -> None:
    config = AlignmentConfig(
        kl_in_reward=2.0,
        fixed_std=1.0,
        objective=Objective(kl=2.0),
        advantages=AdvantageRule(baseline="leaf"),
    )
    run = tiny_run(tmp_path, steps=3, alignment=config, optimizer=OptimizerConfig(learning_rate=3e-2))
    run.run()
    first, *_, last = figures(tmp_path)
    assert first["path_divergence"] == 0.0
    assert last["path_divergence"] > 0.0
    plan = run.trees.at(3)
    part = run._roll_out(3, plan, run.source.batch(3, slice(0, 2)))
    run._judge(3, plan, [part])
    assert part.rewards is not None
    assert part.divergence is not None
    assert part.advantages is not None
    total = (part.rewards.sum(0) - 2.0 * part.divergence).view(2, -1)
    expected = total - total.mean(1, keepdim=True)
    torch.testing.assert_close(part.advantages.values[-1].view(2, -1), expected)


def test_the_window_moves_with_the_iteration() -> None:
    trained = [moving_window().at(step).trained_steps for step in range(4)]
    assert trained == [(0, 1), (0, 1), (0, 1, 2), (0, 1, 3)]


def test_figures_say_what_the_guards_ask(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=2, evaluate=True).run()
    first, second, evaluated = figures(tmp_path)
    assert first["ratio_mean"] == 1.0
    assert first["ratio_std"] == first["clip_fraction"] == first["kl"] == 0.0
    assert first["zero_std_groups"] == first["failed_leaves"] == 0.0
    assert first["fusion_ess"] == 1.0
    assert {"reward/ink", "reward/files", "diversity/within_root", "diversity/across_roots"} <= first.keys()
    plan = moving_window().at(0)
    assert first["evaluations"] == 2 * (plan.rollout_evaluations + plan.train_evaluations)
    assert second["evaluations"] == evaluated["evaluations"]
    assert {"evaluation/ink", "evaluation/reward", "evaluation/diversity"} <= evaluated.keys()
    assert (tmp_path / "samples/step-00000002.png").is_file()


def test_later_updates_of_a_rollout_are_off_policy(tmp_path: Path) -> None:
    tiny_run(tmp_path, steps=1, alignment=AlignmentConfig(updates_per_rollout=3)).run()
    (record,) = figures(tmp_path)
    assert record["ratio_std"] == 0.0
    assert record["last_ratio_std"] > 0.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_modes_and_any_accumulation_take_the_same_step(tmp_path: Path, accumulation: int) -> None:
    runs = []
    for mode in ("recompute", "retain_graph"):
        run = tiny_run(
            tmp_path / mode, steps=1, accumulation=accumulation, alignment=AlignmentConfig(mode=mode, micro_batch=3),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-3),
        )  # fmt: skip
        run.run()
        runs.append(checkpoint(tmp_path / mode, 1))
    assert max(float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0]) < 1e-6


def test_reward_goes_up(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, steps=8, rewards={"ink": InkDensity(0.0)}, evaluate=True, evaluate_every=8, lora=None,
        optimizer=OptimizerConfig(learning_rate=1e-2), trees=flat_grpo(steps=STEPS, group=8), checkpoint_every=8,
    )  # fmt: skip
    before = run.callbacks[0](run, 0)["evaluation/reward"]
    run.run()
    assert run.figures["evaluation/reward"] > before + 0.03


def test_checkpoints_hold_what_is_trained_only(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=2)
    run.run()
    names = {n for n in checkpoint(tmp_path, 2) if n.startswith("model/")}
    assert names
    assert all(".lora_" in n for n in names)
    with pytest.raises(ValueError, match="another model"):
        tiny_run(tmp_path, lora=LoRAConfig(rank=3), resume="auto").run()


@pytest.mark.parametrize("how", ["nan", "raises"])
def test_failed_rewards_are_masked(tmp_path: Path, how: str) -> None:
    calls = RewardCallConfig(workers=0, retries=0)
    run = tiny_run(tmp_path, steps=2, rewards={"dark": Failing(how)}, calls=calls)
    run.run()
    first, _ = figures(tmp_path)
    assert first["failed_leaves"] == 0.5 if how == "raises" else 0 < first["failed_leaves"] <= 0.5
    assert math.isfinite(first["reward_mean"])
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_an_iteration_without_any_reward_is_skipped(tmp_path: Path) -> None:
    def down(images: Tensor, cond: Any = None) -> Tensor:
        raise ConnectionError("no reward server")

    run = tiny_run(tmp_path, steps=1, rewards={"down": down}, calls=RewardCallConfig(workers=0, retries=0))
    before = [p.clone() for p in run.model.parameters()]
    run.run()
    assert run.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_late_rewards_are_masked_and_do_not_hold_up_the_run(tmp_path: Path) -> None:
    release, ended = threading.Event(), threading.Event()

    class SlowAtFirst:
        calls = 0

        def __call__(self, images: Tensor, cond: Any = None) -> Tensor:
            self.calls += 1
            if self.calls == 1:
                release.wait(20.0)
                ended.set()
            return images.flatten(1).mean(1)

    started = time.monotonic()
    calls = RewardCallConfig(workers=1, timeout=0.3, retries=0)
    tiny_run(tmp_path, steps=1, rewards={"ink": SlowAtFirst()}, calls=calls).run()
    (record,) = figures(tmp_path)
    assert record["failed_leaves"] == 0.5  # one of two trees
    assert time.monotonic() - started < 15.0
    release.set()  # a thread that outlived the interpreter could end it badly
    assert ended.wait(5.0)


def test_sound_trees_are_not_moved_by_failed_ones(tmp_path: Path) -> None:
    """The advantages of a tree are those it has beside sound trees."""
    runs = {}
    for how in ("sound", "raises"):
        run = tiny_run(
            tmp_path / how,
            steps=1,
            rewards={"dark": Failing(how)},
            calls=RewardCallConfig(workers=0, retries=0),
        )
        plan = run.trees.at(0)
        parts = [run._roll_out(0, plan, run.source.batch(0, slice(0, 2)))]
        run._judge(0, plan, parts)
        runs[how] = parts[0].advantages
    for step in moving_window().at(0).trained_steps:
        sound, failed = (runs[how].values[step].view(2, -1) for how in ("sound", "raises"))
        assert torch.equal(sound[1], failed[1])
        assert not failed[0].any()
        assert not runs["raises"].weights[step].view(2, -1)[0].any()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"trees": flat_grpo(steps=7)}, "7 steps and the sampler 5"),
        ({"compile": True}, "compile"),
        ({"trees": dynamic_tree(steps=STEPS, depth=2), "batch_size": 3, "accumulation": 2}, "batch_size=3"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_run(tmp_path, **options)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"updates_per_rollout": 0}, "updates_per_rollout=0"),
        ({"combination": "max"}, "combination='max'"),
        ({"mode": "retain_graph", "updates_per_rollout": 2}, "retain_graph"),
        ({"mode": "retain_graph", "nft": NFT()}, "retain_graph"),
        ({"global_std": True, "combination": "advantages"}, "global_std"),
        ({"global_std": True, "fixed_std": 1.0}, "fixed_std=1"),
        ({"kl_in_reward": 0.1, "combination": "normalised"}, "kl_in_reward=0.1"),
    ],
)
def test_bad_configurations_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AlignmentConfig(**settings)


@pytest.mark.parametrize("combination", ["sum", "normalised", "advantages"])
@pytest.mark.parametrize("global_std", [False, True])
def test_rewards_are_combined_as_asked(tmp_path: Path, combination: Any, global_std: bool) -> None:
    if global_std and combination == "advantages":
        pytest.skip("refused")
    config = AlignmentConfig(
        combination=combination, global_std=global_std, advantages=AdvantageRule(baseline="leaf", clip=1e9)
    )
    run = tiny_run(tmp_path, alignment=config)
    plan = run.trees.at(0)
    part = run._roll_out(0, plan, run.source.batch(0, slice(0, 2)))
    run._judge(0, plan, [part])
    assert part.rewards is not None
    assert part.advantages is not None
    r = part.rewards.view(2, 2, -1)  # rewards, trees, leaves
    z = (r - r.mean(2, keepdim=True)) / r.std(2, keepdim=True)
    total = r.sum(0) if combination == "sum" else z.sum(0)
    centred = total - total.mean(1, keepdim=True)
    expected = centred / (total.std() if global_std else total.std(1, keepdim=True))
    expected = z.sum(0) if combination == "advantages" else expected
    torch.testing.assert_close(part.advantages.values[-1].view(2, -1), expected)
