"""Losses of multiplicative (geometric Brownian motion) diffusion: denoising score matching, and its log-space form.

With eps_theta the noise that the network's answer means and s the standard deviation of log x_t given x_0, all of
these regress on the same field and differ in weight only (docs/multiplicative.md):

    M-DSM        |s^2 (h_theta) + log(x_t / x_0) - m + s^2|^2  =  s^4 |h_theta - h|^2  =  s^2 |eps_theta - eps|^2
    epsilon      |eps_theta - eps|^2                log_sample   |u_0 estimate - u_0|^2
    log_flow     |answer - (eps - u_0)|^2

(h = x grad_x log p; M-DSM: arXiv 2510.02730, in the form of its code.)  Noise and target use the same level; the
published code shifts one of them by a step.

Shapes: B = rows of the micro-batch; images (B, C, H, W) uint8; u, noise: (B, C, H, W); times: (B,) float64.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gensample.interpolants import interpolate, per_row
from gensample.interpolants.geometric import GeometricProcess, LogPrediction, LogProcess, NetworkInput
from gensample.interpolants.paths import Float64
from gensample.training.batches import Batch, Draws
from gensample.training.losses import LossOutput, Model

LevelLaw = Literal["index", "log_uniform", "flow"]


class _GeometricLoss:
    """What both losses share: the process, the law of noise levels, and the call of the network."""

    def __init__(
        self,
        process: GeometricProcess,
        *,
        data_shift: float,
        level_law: LevelLaw,
        min_ratio: float,
        label_dropout: float | None,
    ) -> None:
        if label_dropout is not None and not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} must lie in [0, 1]")
        if not 0 < data_shift < math.inf:
            raise ValueError(
                f"data_shift={data_shift} must be positive: images reach 0, whose logarithm is infinite"
            )
        if level_law not in ("index", "log_uniform", "flow"):
            raise ValueError(f"level_law={level_law!r} is unknown; use 'index', 'log_uniform' or 'flow'")
        self.process, self.label_dropout = process, label_dropout
        self._shift, self._law = data_shift, level_law
        self._max_ratio = float(process.ratio(0.0))
        if not 0 < min_ratio < self._max_ratio:
            raise ValueError(
                f"min_ratio={min_ratio} must lie between 0 and the noisiest ratio {self._max_ratio:g}"
            )
        self._min_ratio = min_ratio

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """noise (B, C, H, W) float32, times (B,) float64, label_drop (B,) bool."""
        dropped = torch.from_numpy(draws.uniform("label_drop") < (self.label_dropout or 0.0))
        times = self.times(draws.uniform("times"))
        return {"noise": draws.normal("noise", image_shape), "times": times, "label_drop": dropped}

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """As in training, every label kept."""
        drawn = self.draw(draws, image_shape)
        return {**drawn, "label_drop": torch.zeros_like(drawn["label_drop"])}

    def times(self, uniforms: Float64) -> Float64:
        """Canonical times (B,) of the level law from uniforms on [0, 1)."""
        if self._law == "index":  # k = 1, ..., N - 1 of arXiv 2510.02730
            steps = self.process.num_train_timesteps
            return np.asarray(self.process.time((1 + np.floor((steps - 1) * uniforms)) / steps))
        if self._law == "log_uniform":
            ratio = self._min_ratio * (self._max_ratio / self._min_ratio) ** uniforms
        else:  # alpha / (alpha + beta) uniform
            low, high = (r / (1.0 + r) for r in (self._min_ratio, self._max_ratio))
            level = low + (high - low) * uniforms
            ratio = level / (1.0 - level)
        return np.asarray(self.process.time_of_ratio(ratio))

    def clean(self, images: Tensor) -> Tensor:
        """u_0 of images (B, C, H, W) uint8: the standardised logarithm of pixel/255 + data_shift."""
        return self.process.standardised((images.float() / 255.0 + self._shift).log(), 1.0)

    def answer(self, model: Model, u: Tensor, t: Float64, batch: Batch) -> Tensor:
        """The network's native output (B, C, H, W) at states u."""
        timestep = torch.from_numpy(np.asarray(self.process.timestep(t))).float().to(u.device)
        output: Tensor = model(
            self.process.network_state(u, t), timestep, class_labels=batch["labels"],
            label_drop=batch["label_drop"], return_dict=False,
        )[0]  # fmt: skip
        return output.float()


class MultiplicativeScoreLoss(_GeometricLoss):
    """Multiplicative denoising score matching on images moved into the positive numbers (arXiv 2510.02730).

    Args:
        sigma, mu: of the motion over unit time; mu None is sigma^2/2.
        data_shift: added to pixels in [0, 1], so that their logarithm exists.
        prediction_type, network_input: see :class:`~gensample.interpolants.geometric.GeometricProcess`; the paper's
            network maps x_t to the Stein score.
        level_law: ``index`` is the paper's k ~ U{1..N-1}; others as in :class:`LogSpaceLoss`.
        min_ratio: smallest s / log_std of the other laws.
        label_dropout: chance of training a row without its label; None leaves it to the recipe's model.
        num_train_timesteps: N.
    """

    def __init__(
        self,
        *,
        sigma: float = 0.8,
        mu: float | None = None,
        data_shift: float = 1.0,
        log_mean: float = 0.0,
        log_std: float = 1.0,
        prediction_type: LogPrediction = "stein",
        network_input: NetworkInput = "ambient",
        level_law: LevelLaw = "index",
        min_ratio: float = 0.01,
        label_dropout: float | None = None,
        num_train_timesteps: int = 1000,
    ) -> None:
        process = GeometricProcess(
            sigma=sigma, mu=mu, log_mean=log_mean, log_std=log_std, prediction_type=prediction_type,
            network_input=network_input, num_train_timesteps=num_train_timesteps,
        )  # fmt: skip
        super().__init__(
            process,
            data_shift=data_shift,
            level_law=level_law,
            min_ratio=min_ratio,
            label_dropout=label_dropout,
        )

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """The M-DSM residual squared, averaged over each image (the paper sums)."""
        process, t, noise = self.process, batch["times"], batch["noise"]
        u0 = self.clean(batch["images"])
        u = interpolate(process.path, u0, noise, t)
        c = process.path.coefficients(t)
        s = np.asarray(c.alpha) * process.log_std
        epsilon = process.to_epsilon(self.answer(model, u, t, batch), u, t)
        # s^2 h_theta = -s eps_theta - s^2, so that the residual has no s^2 left: s (eps - eps_theta).
        moved = process.log_std * (u - u0)  # log(x_t / x_0) - m
        residual = moved - per_row(s, epsilon) * epsilon
        return LossOutput(residual.square().flatten(1).mean(1))


class LogSpaceLoss(_GeometricLoss):
    """Regression on the logarithm of images moved into the positive numbers, under multiplicative noise.

    Args:
        sigma, log_process: the process; ``vp`` is the exponential Ornstein-Uhlenbeck process.
        data_shift: added to pixels in [0, 1].
        log_mean, log_std: centre and scale of the state; (log 2)/2 twice maps shifted images onto [-1, 1].
        prediction_type: ``log_flow``, ``epsilon`` or ``log_sample``, each with unit weight on its own error;
            ``hyvarinen`` and ``stein`` with unit weight on the noise they mean.
        network_input: see :class:`~gensample.interpolants.geometric.GeometricProcess`.
        level_law: ``flow`` draws alpha/(alpha + beta) uniformly, ``log_uniform`` the logarithm of alpha/beta, ``index``
            k ~ U{1..N-1}.
        min_ratio: smallest alpha/beta of the first two.
        label_dropout: chance of training a row without its label; None leaves it to the recipe's model.
        num_train_timesteps: N.
    """

    def __init__(
        self,
        *,
        sigma: float = 16.0,
        log_process: LogProcess = "ve",
        data_shift: float = 1.0,
        log_mean: float = 0.5 * math.log(2.0),
        log_std: float = 0.5 * math.log(2.0),
        prediction_type: LogPrediction = "log_flow",
        network_input: NetworkInput = "log",
        level_law: LevelLaw = "flow",
        min_ratio: float = 1e-3,
        label_dropout: float | None = None,
        num_train_timesteps: int = 1000,
    ) -> None:
        process = GeometricProcess(
            sigma=sigma, log_process=log_process, log_mean=log_mean, log_std=log_std,
            prediction_type=prediction_type, network_input=network_input, num_train_timesteps=num_train_timesteps,
        )  # fmt: skip
        super().__init__(
            process,
            data_shift=data_shift,
            level_law=level_law,
            min_ratio=min_ratio,
            label_dropout=label_dropout,
        )

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """Mean squared error over each image."""
        process, t, noise = self.process, batch["times"], batch["noise"]
        u0 = self.clean(batch["images"])
        u = interpolate(process.path, u0, noise, t)
        output = self.answer(model, u, t, batch)
        targets: dict[str, Any] = {"log_flow": noise - u0, "log_sample": u0}
        if process.prediction_type in targets:
            error = output - targets[process.prediction_type]
        else:
            error = process.to_epsilon(output, u, t) - noise
        return LossOutput(error.square().flatten(1).mean(1))
