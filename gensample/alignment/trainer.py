"""Alignment on the shared training loop: roll out trees, ask for rewards, update the policy.

One step of the loop is one iteration.  Every process takes whole trees, so advantages need no communication; the
window, the trees, the prompts and all noise are functions of (seed, step), so neither an interruption nor the number
of processes changes the run (up to the order of floating-point sums).  Gradients are added up over the trees of a
process, then summed over processes and divided by the weight of all edges.

Shapes: P = trees of a micro-batch, L = leaves of a tree, R = rewards; rewards (R, P L) float64, NaN where failed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gensample.alignment.advantages import Advantages, normalise_rewards
from gensample.alignment.config import AlignmentConfig
from gensample.alignment.nft import nft_accumulate, old_decay
from gensample.alignment.old_policy import OldNetwork
from gensample.alignment.part import Part
from gensample.alignment.penalty import path_divergence
from gensample.alignment.policy import Policy
from gensample.alignment.prompts import PromptBatches, Prompts
from gensample.alignment.pruning import informative
from gensample.alignment.reward_calls import RewardCalls
from gensample.alignment.rollout import diversity, roll_out
from gensample.alignment.schedule import TreePlan, TreeSchedule
from gensample.alignment.update import accumulate, total_weight, update_logs
from gensample.noise import NoiseStream, stream_key
from gensample.training.batches import Batch
from gensample.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.loop import Trainer
from gensample.training.validation import Callback


class AlignmentTrainer(Trainer):
    """Policy gradients over trees of rollouts, or DiffusionNFT on their leaves.

    Args:
        policy: the sampler under training; ``policy.denoiser.nets["main"]`` is trained where ``requires_grad``.
        trees: the schedule of the trees; "global step" there is the iteration.
        rewards: what is maximised; ``reward_weights`` by name, default 1 each.
        prompts: what is drawn; ``training.batch_size`` of them an iteration, one tree each.
        alignment: how rollouts become updates.
        training, optimizer, schedule, callbacks, accelerator, notes: as for the loop.

    Attributes: evaluations: network rows spent on rollouts and updates so far, over all processes.

    Raises:
        ValueError: steps of policy and trees that differ, weights for unknown rewards, ``training.compile``, a KL term
            without a reference, or as the loop does.
    """

    def __init__(
        self,
        policy: Policy,
        trees: TreeSchedule,
        rewards: RewardCalls,
        prompts: Prompts,
        *,
        training: TrainingConfig,
        alignment: AlignmentConfig | None = None,
        reward_weights: Mapping[str, float] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        callbacks: Sequence[Callback] = (),
        accelerator: Accelerator | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.alignment = alignment or AlignmentConfig()
        self.policy, self.trees, self.rewards, self.prompts = policy, trees, rewards, prompts
        self.reward_weights = dict.fromkeys(rewards.names, 1.0) | dict(reward_weights or {})
        self._check(training)
        self.evaluations = 0.0
        network = policy.denoiser.nets["main"]
        assert isinstance(network, nn.Module)
        super().__init__(
            network, None, PromptBatches(len(prompts), seed=training.seed, batch_size=training.batch_size),
            training=training, optimizer=optimizer, schedule=schedule, callbacks=callbacks, accelerator=accelerator,
            notes=notes,
        )  # fmt: skip
        policy.denoiser.device = self.accelerator.device
        self._bind_reference()
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._old_network = OldNetwork(network) if self.alignment.nft is not None else None
        if self._old_network is not None:
            policy.denoiser.nets["old"] = self._old_network.network

    def _check(self, training: TrainingConfig) -> None:
        if unknown := sorted(set(self.reward_weights) - set(self.rewards.names)):
            raise ValueError(f"reward_weights has {unknown}; the rewards are {list(self.rewards.names)}")
        if self.trees.steps != self.policy.num_steps:
            raise ValueError(
                f"the trees have {self.trees.steps} steps and the sampler {self.policy.num_steps}; give both the same"
            )
        if self.alignment.nft is not None and self.policy.guidance is not None:
            raise ValueError("nft trains the network without guidance; set sampler.guidance_scale to 1")
        if training.compile:
            raise ValueError("training.compile is not supported in alignment; set it to false")
        self.policy.spreads(self.trees.at(0))  # refuses noise beyond what the kernel allows
        if self.alignment.pruning.depth_window is not None:
            self.alignment.pruning.depth_window.start(self.trees.steps, 0)

    def _bind_reference(self) -> None:
        """A frozen copy of the first weights where a term pulls to them and no adapter can be switched off."""
        nft = self.alignment.nft
        asked = self.alignment.objective.kl > 0 if nft is None else nft.kl > 0
        asked = asked or self.alignment.kl_in_reward > 0
        nets = self.policy.denoiser.nets
        if asked and "reference" not in nets and not getattr(self.model, "peft_config", None):
            nets["reference"] = copy.deepcopy(self.model).requires_grad_(False)

    # what the loop asks

    def prepare_network(self) -> nn.Module:
        """The network itself, under autocast where asked for: gradients are summed in one piece, after the last."""
        network: nn.Module = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return network.eval()  # in rollout and update alike: dropout would move the ratio from 1

    def update(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        """One iteration: rollouts, rewards, ``updates_per_rollout`` optimiser steps; returns figures to record."""
        plan, before = self.trees.at(step), self.policy.evaluations
        parts = [
            self._roll_out(step, plan, batch) for batch in micro_batches
        ]  # rewards are under way meanwhile
        logs = self._judge(step, plan, parts)
        for part in parts:
            del part.pending[:]
        for number in range(self.alignment.updates_per_rollout):
            gradients = self._nft_gradients if self.alignment.nft is not None else self._policy_gradients
            found: dict[str, float] = {}
            figures = self.optimizer_step(step, partial(gradients, step, number, parts, found))
            first = found if number == 0 else {f"last_{k}": v for k, v in found.items()}
            logs |= first
        if self._old_network is not None:
            self._old_network.follow(old_decay(step, self.alignment.nft_decay))
        spent = torch.tensor(float(self.policy.evaluations - before), device=self.accelerator.device)
        self.evaluations += float(self.accelerator.reduce(spent, "sum"))
        return {**figures, **logs, "evaluations": self.evaluations}

    def stored_tensors(self) -> dict[str, Tensor]:
        """The trained parameters, and the old policy's."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return trained if self._old_network is None else trained | self._old_network.tensors()

    @torch.no_grad()
    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back; RuntimeError where names or shapes differ."""
        stored = self.stored_tensors()
        different = sorted(set(stored) ^ set(tensors)) or [
            n for n, t in tensors.items() if t.shape != stored[n].shape
        ]
        if different:
            raise RuntimeError(
                f"it trains {len(tensors)} tensors, this run {len(stored)}; first: {different[0]}"
            )
        for name, tensor in tensors.items():
            stored[name].copy_(tensor)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "evaluations": self.evaluations}

    def _restore(self, checkpoint: Any) -> None:
        super()._restore(checkpoint)
        self.evaluations = float(checkpoint.state["evaluations"])

    # one iteration

    def _roll_out(self, step: int, plan: TreePlan, batch: Batch) -> Part:
        """The trees of a micro-batch, their rewards asked for."""
        numbers, trees = batch["prompts"].tolist(), batch["trees"].tolist()
        conditioning = self.prompts.conditioning(numbers).to(self.accelerator.device)
        self.policy.denoiser.conditioning = conditioning
        seed = stream_key(self.config.seed, step, (), "alignment/rollout") & (2**63 - 1)
        tuning = self.alignment.objective.layer_tuning
        keys = NoiseStream.from_generator(seed, len(trees), sample_ids=trees)
        rollout = roll_out(
            self.policy, plan, keys, np.arange(len(trees)), micro_batch=self.alignment.micro_batch,
            retain_graph=self.alignment.mode == "retain_graph",
            keep_outputs=self.alignment.kl_in_reward > 0
            or (tuning is not None and tuning.target == "best_velocity"),
            net="main" if self.alignment.nft is None else "old",
        )  # fmt: skip
        images = self.policy.decode(rollout.final)
        pending = [
            self.rewards.submit(
                images[row * plan.leaves : (row + 1) * plan.leaves],
                conditioning.rows([row] * plan.leaves),
                prompt=self.prompts.text(number),
            )
            for row, number in enumerate(numbers)
        ]
        return Part(conditioning, keys, rollout, pending)

    def _judge(self, step: int, plan: TreePlan, parts: list[Part]) -> dict[str, float]:
        """Wait for the rewards and make advantages and masks of them; returns the guards."""
        logs: list[dict[str, float]] = []
        for part in parts:
            tables = [pending.result() for pending in part.pending]
            values = torch.cat([t.values for t in tables], 1)
            part.rewards = torch.where(torch.cat([t.valid for t in tables]), values, torch.nan)
            for failure in (f for t in tables for f in t.failures):
                self._recorder.say(f"step {step + 1}: reward {failure}: masked")
            if self.alignment.kl_in_reward:
                self.policy.denoiser.conditioning = part.conditioning
                part.divergence = path_divergence(
                    self.policy, part.rollout, micro_batch=self.alignment.micro_batch
                )
        scale = self._global_std(plan, parts) if self.alignment.global_std else self.alignment.fixed_std
        for part in parts:
            assert part.rewards is not None
            part.advantages = self._advantages(plan, part, scale)
            part.masks = self.alignment.pruning.masks(plan, part.advantages.fused, step)
            objective = self.alignment.objective
            if objective.kl == 0 and objective.layer_tuning is None:
                part.masks = informative(plan, self.alignment.advantages.baseline, part.masks)
            named = {
                f"reward/{n}": float(v.nanmean())
                for n, v in zip(self.rewards.names, part.rewards, strict=True)
            }
            if part.divergence is not None:
                named["path_divergence"] = float(part.divergence.mean())
            spread = {f"diversity/{k}": v for k, v in diversity(part.rollout).items()}
            logs.append(named | part.advantages.logs | spread)
        return self._averaged(logs)

    def _combined(self, plan: TreePlan, part: Part) -> Tensor:
        """One reward a leaf (P L,)."""
        rewards = _made(part.rewards)
        if self.alignment.combination == "normalised":
            rewards = normalise_rewards(plan, rewards)
        total: Tensor = self._weights() @ rewards
        return total if part.divergence is None else total - self.alignment.kl_in_reward * part.divergence

    def _weights(self) -> Tensor:
        return torch.tensor([self.reward_weights[n] for n in self.rewards.names], dtype=torch.float64)

    def _advantages(self, plan: TreePlan, part: Part, scale: float | None) -> Advantages:
        rule, rollout = self.alignment.advantages, part.rollout
        scores = {step: values.cpu() for step, values in rollout.log_probs.items()}
        if self.alignment.combination == "advantages":
            return rule.combine(
                plan, _made(part.rewards), self._weights(), log_probs=scores, dimensions=rollout.dimensions
            )
        return rule(
            plan, self._combined(plan, part), log_probs=scores, dimensions=rollout.dimensions, scale=scale
        )

    def _global_std(self, plan: TreePlan, parts: list[Part]) -> float | None:
        """Unbiased standard deviation of the combined rewards of all processes; None where they are all equal."""
        values = torch.cat([self._combined(plan, part) for part in parts])
        values = values[~values.isnan()]
        count, total = self._sum(
            torch.stack([torch.tensor(float(len(values))), values.sum()]).double()
        ).tolist()
        if count < 2:
            return None
        squares = float(self._sum((values - total / count).square().sum()))
        return (squares / (count - 1)) ** 0.5 or None

    def _policy_gradients(self, step: int, number: int, parts: list[Part], found: dict[str, float]) -> Tensor:
        """Gradients of the objective over all edges of all processes; returns its value."""
        plan = parts[0].rollout.plan
        weight = sum(total_weight(plan, _made(p.advantages), p.masks) for p in parts)
        normaliser = float(self._sum(torch.tensor(weight, dtype=torch.float64)))
        if normaliser == 0:
            self._recorder.say(
                f"step {step + 1}: no edge to train: every reward failed, or pruning left none"
            )
            self._sum_gradients()  # zeros on the parameters' device, which clipping and a loss scaler look at
            return torch.tensor(torch.nan, device=self.accelerator.device)
        sums: list[Tensor] = []
        for part in parts:
            self.policy.denoiser.conditioning = part.conditioning
            result = accumulate(
                self.policy, part.rollout, _made(part.advantages), self.alignment.objective,
                backward=self.accelerator.backward, masks=part.masks, old=part.old if number else None,
                normaliser=normaliser, micro_batch=self.alignment.micro_batch, mode=self.alignment.mode,
            )  # fmt: skip
            part.old = result.old if number == 0 else part.old
            sums.append(result.sums)
        self._sum_gradients()
        found |= update_logs(self._sum(torch.stack(sums).sum(0)))
        objective = self.alignment.objective
        tuning = objective.layer_tuning.weight if objective.layer_tuning is not None else 0.0
        loss = found["policy_loss"] + objective.kl * found["kl"] + tuning * found["pull"]
        return torch.tensor(loss, dtype=torch.float32, device=self.accelerator.device)

    def _nft_gradients(self, step: int, number: int, parts: list[Part], found: dict[str, float]) -> Tensor:
        """Gradients of DiffusionNFT's loss over the clean samples of all processes; returns its value."""
        nft = _made(self.alignment.nft)
        valid = [~_made(p.rewards).isnan().any(0) for p in parts]
        rows = float(self._sum(torch.tensor(float(sum(int(v.sum()) for v in valid)))))
        if rows == 0:
            self._recorder.say(f"step {step + 1}: every reward failed")
            self._sum_gradients()
            return torch.tensor(torch.nan, device=self.accelerator.device)
        sums = torch.zeros(4, dtype=torch.float64)
        for part, chosen in zip(parts, valid, strict=True):
            self.policy.denoiser.conditioning = part.conditioning
            picked = chosen.nonzero()[:, 0]
            if not len(picked):
                continue
            rollout = part.rollout
            result = nft_accumulate(
                self.policy.denoiser, rollout.final[picked.to(rollout.final.device)],
                rollout.prompt_of(rollout.plan.steps)[picked.numpy()],
                _made(part.advantages).values[-1][picked], part.leaf_keys(number).select(picked.tolist()),
                self.policy.times.tolist(), nft, backward=self.accelerator.backward,
                normaliser=rows * nft.times_per_sample, micro_batch=self.alignment.micro_batch,
            )  # fmt: skip
            sums += torch.tensor([result[n] for n in ("rows", "loss", "pull", "share")], dtype=torch.float64)
        self._sum_gradients()
        count, loss, pull, share = self._sum(sums).tolist()
        found |= {"nft_loss": loss / count, "kl": pull / count, "good_share": share / count}
        return torch.tensor(
            (loss + nft.kl * pull) / count, dtype=torch.float32, device=self.accelerator.device
        )

    # between processes

    def _sum(self, value: Tensor) -> Tensor:
        """``value`` summed over processes, float64 on the host."""
        total: Tensor = self.accelerator.reduce(value.double().to(self.accelerator.device), "sum")
        return total.cpu()

    def _averaged(self, logs: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The mean of each figure over micro-batches and processes, NaN left out."""
        names = list(logs[0])
        table = torch.tensor([[log[n] for n in names] for log in logs], dtype=torch.float64)
        sums = self._sum(torch.stack([table.nansum(0), (~table.isnan()).double().sum(0)]))
        return {
            n: float(total / count) if count else float("nan")
            for n, total, count in zip(names, *sums, strict=True)
        }

    def _sum_gradients(self) -> None:
        """Sum gradients over processes; a parameter that no edge reached has gradient 0, as it has beside others."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([_made(p.grad).flatten() for p in self._trained])
        flat = self.accelerator.reduce(flat, "sum")
        for parameter, piece in zip(
            self._trained, flat.split([p.numel() for p in self._trained]), strict=True
        ):
            _made(parameter.grad).copy_(piece.view_as(parameter))


def _made(value: Any) -> Any:
    assert value is not None
    return value
