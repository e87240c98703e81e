"""Class mixtures in the plane whose denoisers and posteriors are exact, and walks over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gensample
from gensample.denoisers import Conditioning, Denoiser
from gensample.denoisers.process import FlowTimes
from gensample.guidance import ClassifierPosterior, DenoiserCalls, Guidance
from gensample.interpolants import LinearInterpolant
from gensample.interpolants.oracles import GaussianMixture
from gensample.solvers import make_solver

PATH = LinearInterpolant()
# Powers of two: the network's float32 timesteps are then exact, and so is the posterior at them.
TIMES = [1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0]
FREE: dict[str, Any] = {"threshold": 0.0, "max_scale": float("inf"), "max_entropy": None}


class Classes:
    """K classes, each a two-component mixture in the plane; exact networks and posteriors."""

    def __init__(self, num_classes: int = 3, width: float = 0.3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.means = torch.from_numpy(rng.standard_normal((num_classes, 2, 2)))
        self.num_classes = num_classes
        half = torch.full((2,), 0.5, dtype=torch.float64)
        variances = torch.full((2 * num_classes,), width**2, dtype=torch.float64)
        self.classes = [GaussianMixture.isotropic(half, m, variances[:2]) for m in self.means]
        weights = torch.full((2 * num_classes,), 0.5 / num_classes, dtype=torch.float64)
        self.all = GaussianMixture.isotropic(weights, self.means.flatten(0, 1), variances)

    def logits(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """log p_t(x | k): exact posterior logits of equally likely classes."""
        return torch.stack([m.log_density(x, PATH, float(t)) for m in self.classes], dim=1)

    def network(self, prediction_type: str = "flow_prediction") -> Callable[..., Tensor]:
        def output(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
            t = 1.0 - float(timestep[0])
            every = [m.output(x, PATH, t, prediction_type) for m in (*self.classes, self.all)]
            return torch.stack(every)[class_labels, torch.arange(len(x))]

        return output

    def denoiser(
        self, rows: int = 12, prediction_type: str = "flow_prediction", weak: Any = None
    ) -> Denoiser:
        cond = Conditioning(batched={"class_labels": torch.arange(rows) % self.num_classes})
        return Denoiser.from_model(
            self.network(prediction_type),
            nets={"weak": weak or Classes(self.num_classes, width=0.8).network(prediction_type)},
            latent_shape=(2,),
            path=PATH,
            prediction_type=prediction_type,
            time_map=FlowTimes(scale=1.0),
            conditioning=cond.bind_null(class_labels=torch.tensor([self.num_classes])).bind_references(
                class_labels=torch.arange(self.num_classes)
            ),
            decoder=lambda x: x,
        )


class Counting:
    """A classifier that counts its calls."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, images: Tensor) -> Any:
        assert not images.requires_grad
        assert not torch.is_grad_enabled()
        self.calls += 1
        return self.answer(images)


def points(rows: int = 12, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 2)))


def posterior(toy: Classes) -> ClassifierPosterior:
    return ClassifierPosterior(toy.logits, micro_batch=64)


def guided(rule: Guidance | None, denoiser: Denoiser, x: Tensor, t: float = 0.5, state: Any = None) -> Tensor:
    calls = DenoiserCalls(denoiser)
    if rule is None:
        return calls(x, t, denoiser.conditioning)
    with torch.no_grad():
        return rule(x, t, calls, denoiser.conditioning, state).output


def walked(rule: Guidance | None, denoiser: Denoiser, x: Tensor, solver: str = "euler") -> Tensor:
    chosen = make_solver(solver, path=PATH, prediction_type=denoiser.prediction_type, times=TIMES)
    noise = gensample.noise.NoiseStream.from_generator(5, len(x))
    for state in gensample.sampling.walk(denoiser, denoiser.conditioning, chosen, x, noise, rule):
        last = state.latents
    return last
