"""The training loop that pretraining, alignment and distillation share.

One update: B rows of the global batch, split over the processes and then into micro-batches,

    g = mean over the B rows of grad loss,   |g| <= max_grad_norm,   AdamW with rate factor(step),   EMA

All randomness of update s is a function of (seed, s), so interruption, accumulation and the number of processes
leave the run unchanged up to the order of floating-point sums (bitwise for the same layout).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gensample.training.batches import Batch, BatchSource, Prefetcher, micro_batch_rows, to_device
from gensample.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from gensample.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from gensample.training.ema import ExponentialAverage
from gensample.training.launch import make_accelerator, stop_on_signal
from gensample.training.losses import LossStep
from gensample.training.optimizer import (
    ParameterGroups,
    decayed_and_plain_groups,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from gensample.training.record import Recorder
from gensample.training.validation import Callback


class TrainingDiverged(RuntimeError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: ``finished``, ``time`` (max_seconds) or ``signal``; and the last callback figures."""

    step: int
    reason: str
    figures: dict[str, float]
    seconds: float


class Trainer:
    """Model, data and settings of one run; :meth:`run` trains.

    Args:
        model: module in float32; autocast makes the forward pass cheaper, never the weights.
        loss_step: the loss of a batch (:class:`gensample.training.losses.LossStep`); None where a subclass's
            :meth:`update` needs none.
        source: the batches.
        training, optimizer, schedule: settings.
        callbacks: called every ``evaluate_every`` steps and at the end.
        parameter_groups: AdamW groups from the model, each with its peak ``lr`` (default: the config's rate);
            the schedule multiplies every group's own rate, so ratios between groups (muP) stay.
        accelerator: default: one built from ``training``.
        notes: JSON kept in every checkpoint, such as the recipe.

    Raises:
        ValueError: batch size not divisible by processes x accumulation, or fp16 without an accelerator device.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_step: LossStep | None,
        source: BatchSource,
        *,
        training: TrainingConfig,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        callbacks: Sequence[Callback] = (),
        parameter_groups: ParameterGroups = decayed_and_plain_groups,
        accelerator: Accelerator | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.config = training
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule = schedule or ScheduleConfig()
        self.accelerator = accelerator or make_accelerator(training)
        self.model = model.to(self.accelerator.device)
        self.loss_step, self.source, self.callbacks = loss_step, source, tuple(callbacks)
        self.notes = notes or {}
        self.step = 0
        self.skipped_steps = 0
        self.figures: dict[str, float] = {}
        self.seconds = 0.0
        self._resumed = False
        self._recorder = Recorder(
            Path(), active=False, steps=training.steps, resumed_step=0, tensorboard=False
        )
        self._bad_in_a_row = 0
        self._window: list[float] = []
        self._micro_rows = micro_batch_rows(
            training.batch_size,
            training.accumulation,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        self._optimizer = self.accelerator.prepare_optimizer(
            make_optimizer(self.model, self.optimizer_config, parameter_groups)
        )
        self.ema = ExponentialAverage(self.model, training.ema_decays)
        self._reducing = self.prepare_network()
        self._forward = torch.compile(self._reducing) if training.compile else self._reducing

    @property
    def checkpoint_folder(self) -> Path:
        """Where this run's checkpoints lie."""
        return Path(self.config.output_dir) / "checkpoints"

    # running

    def run(self) -> TrainingResult:
        """Train to ``steps``, or until ``max_seconds`` or a signal, from where ``resume`` says.

        Raises:
            CheckpointError, ValueError: nothing sound to resume from, or a folder that is in use.
            TrainingDiverged: ``max_bad_steps`` updates in a row were not finite; the last checkpoint stands.
        """
        self.resume()
        started = time.monotonic()
        self._recorder = Recorder(
            Path(self.config.output_dir),
            active=self.accelerator.is_main_process,
            steps=self.config.steps,
            resumed_step=self.step,
            tensorboard=self.config.tensorboard,
        )
        earlier = self.seconds
        reason = "finished"
        with contextlib.closing(self._recorder), stop_on_signal() as signalled, self._prefetched() as batches:
            for step, micro_batches in batches:
                elapsed = time.monotonic() - started
                self.seconds = earlier + elapsed
                late = self.config.max_seconds is not None and elapsed >= self.config.max_seconds
                why = self._agree_to_stop(signalled.is_set(), late)
                if why is not None:
                    reason = why
                    break
                logs = self.update(step, micro_batches)
                if (step + 1) % self.config.log_every == 0:
                    self._log(step + 1, logs)
                self.step = step + 1
                self.seconds = earlier + time.monotonic() - started
                self._after()
            if reason != "finished":
                self.save()
                self._recorder.say(
                    f"stopped ({reason}) after step {self.step} of {self.config.steps}, checkpoint saved"
                )
        return TrainingResult(self.step, reason, self.figures, self.seconds)

    def estimate(self, updates: int = 10) -> float:
        """Seconds that all ``steps`` would take, from the median of some updates (the model is spoilt by them)."""
        times: list[float] = []
        for step in range(updates + 3):  # the first ones compile, and fill caches
            started = time.monotonic()
            self.update(step, [self.source.batch(step, rows) for rows in self._micro_rows])
            times.append(time.monotonic() - started)
        return sorted(times[3:])[updates // 2] * self.config.steps

    @contextlib.contextmanager
    def _prefetched(self) -> Iterator[Prefetcher]:
        ahead = Prefetcher(
            self.source,
            self._micro_rows,
            range(self.step, self.config.steps),
            depth=self.config.prefetch,
            pin=self.accelerator.device.type == "cuda",
        )
        try:
            yield ahead
        finally:
            ahead.close()

    def _agree_to_stop(self, signalled: bool, late: bool) -> str | None:
        """The same answer on every process, whichever of them was signalled or has the slower clock."""
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([float(signalled), float(late)], device=self.accelerator.device)
            signalled, late = (value > 0 for value in self.accelerator.reduce(flags, "sum").tolist())
        return "signal" if signalled else "time" if late else None

    # what a run with gradients of its own overrides: AlignmentTrainer

    def prepare_network(self) -> nn.Module:
        """The network as the forward pass calls it: its gradients are averaged over the processes."""
        network: nn.Module = self.accelerator.prepare_model(self.model)
        return network

    def update(self, step: int, micro_batches: list[Batch]) -> dict[str, float]:
        """Update ``step`` on this process's micro-batches, by :meth:`optimizer_step`; returns figures to record."""
        self.model.train()
        return self.optimizer_step(step, partial(self._accumulate_gradients, micro_batches))

    def stored_tensors(self) -> dict[str, Tensor]:
        """The model's tensors that checkpoints keep, by their names in its state."""
        return self.model.state_dict()

    def load_stored_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`stored_tensors` gave; RuntimeError for tensors of another model."""
        self.model.load_state_dict(tensors)

    def optimizer_step(self, step: int, accumulate: Callable[[], Tensor]) -> dict[str, float]:
        """One optimiser step, or none when the loss or the gradient is not finite; returns figures to record.

        ``accumulate`` leaves the gradient of the global mean loss on every process and returns that loss, ().
        """
        factor = self.schedule.factor(step, self.config.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        loss = accumulate()
        limit = self.optimizer_config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        loss_value, norm_value = torch.stack([loss, norm.float()]).tolist()  # the one wait for the device
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self._optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # an overflow lowers the scale
        self._optimizer.zero_grad()
        self._count_bad(step, finite, loss_value, norm_value)
        if finite:
            self.ema.update()
            self._window.append(loss_value)
        return {"gradient_norm": norm_value, "learning_rate_factor": factor}

    def _accumulate_gradients(self, micro_batches: list[Batch]) -> Tensor:
        """Gradients of the mean loss over the global batch; returns that mean, (), float32."""
        assert self.loss_step is not None
        total = torch.zeros((), device=self.accelerator.device)
        for i, host_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._reducing):
                batch = to_device(host_batch, self.accelerator.device)
                loss = self.loss_step(self._forward, batch).loss.mean() / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        return self.accelerator.reduce(total, "mean")

    def _count_bad(self, step: int, finite: bool, loss: float, norm: float) -> None:
        if finite:
            self._bad_in_a_row = 0
            return
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        self._recorder.say(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}: update skipped")
        if self._bad_in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"{self._bad_in_a_row} updates in a row up to step {step + 1} had a loss or gradient that is not "
                f"finite (last: loss {loss:g}, gradient norm {norm:g}); lower optimizer.learning_rate or use "
                "mixed_precision bf16, and resume from the last checkpoint"
            )

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        window, self._window = self._window, []
        self._recorder.write(
            step,
            {
                **({"loss": math.fsum(window) / len(window)} if window else {}),
                **figures,
                "skipped_steps": self.skipped_steps,
                "seconds": round(self.seconds, 3),
            },
        )

    def _after(self) -> None:
        """Callbacks and checkpoints that fall due after ``self.step``."""
        self._recorder.advance()
        final = self.step == self.config.steps
        if self.callbacks and (final or self.step % self.config.evaluate_every == 0):
            self.figures = {}
            for callback in self.callbacks:
                self.figures.update(callback(self, self.step))
            self._recorder.write(self.step, self.figures)
            self._recorder.say(
                f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in self.figures.items())
            )
        if final or self.step % self.config.checkpoint_every == 0:
            self.save()

    def close(self) -> None:
        """Leave the process group, if there is one; call it once, at the very end."""
        self.accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    # checkpoints

    def save(self) -> None:
        """Write a checkpoint of the present step (main process; the others wait)."""
        if self.accelerator.is_main_process:
            stored = self.stored_tensors()
            tensors: dict[str, dict[str, Tensor]] = {
                "model": stored,
                "optimizer": optimizer_tensors(self.model, self._optimizer.optimizer),
            }
            for d in self.ema.decays:
                average = self.ema.state_dict(d)
                tensors[f"ema-{d:g}"] = {name: average.get(name, kept) for name, kept in stored.items()}
            save_checkpoint(
                self.checkpoint_folder,
                Checkpoint(self.step, tensors, self._state()),
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "seed": self.config.seed,
            "ema_updates": self.ema.updates,
            "skipped_steps": self.skipped_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "loss_window": self._window,
            "figures": self.figures,
            "seconds": self.seconds,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "training": dataclasses.asdict(self.config),
            "notes": self.notes,
        }

    def resume(self) -> None:
        """Take up the checkpoint that ``training.resume`` names, once; :meth:`run` does it if nobody has."""
        if self._resumed:
            return
        self._resumed = True
        if self.config.resume == "never":
            if list_checkpoints(self.checkpoint_folder):
                raise ValueError(
                    f"{self.checkpoint_folder} holds checkpoints of an earlier run: continue it with "
                    "--training.resume auto, or give another --training.output_dir"
                )
            return
        if self.config.resume == "auto":
            checkpoint = load_newest(self.checkpoint_folder)
        else:
            checkpoint = load_checkpoint(Path(self.config.resume))
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        for name in ("seed", "batch_size"):
            if state["training"][name] != getattr(self.config, name):
                raise ValueError(
                    f"the checkpoint was trained with {name}={state['training'][name]}, this run asks for "
                    f"{getattr(self.config, name)}: keep it, or start in another output_dir"
                )
        try:
            self.load_stored_tensors(checkpoint.tensors["model"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint is of another model: keep that model, or start in another output_dir ({error})"
            ) from error
        load_optimizer_tensors(self.model, self._optimizer.optimizer, checkpoint.tensors["optimizer"])
        for decay in self.ema.decays:
            # A decay that is new to this run starts from the weights.
            name = f"ema-{decay:g}"
            self.ema.load(decay, checkpoint.tensors.get(name, checkpoint.tensors["model"]))
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.ema.updates = int(state["step"]), int(state["ema_updates"])
        self.skipped_steps, self._bad_in_a_row = int(state["skipped_steps"]), int(state["bad_in_a_row"])
        self._window, self.figures = list(state["loss_window"]), dict(state["figures"])
        self.seconds = float(state["seconds"])
