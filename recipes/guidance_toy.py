"""Guidance rules on a toy whose denoisers are exact: eight classes on a ring, judged by the true densities.

    OMP_NUM_THREADS=1 python recipes/guidance_toy.py            (about two minutes on one core)

Each class is three isotropic Gaussians.  The "networks" are exact denoisers of a blurred copy (component widths x1.6
main, x2.6 weak): errors of one kind and two strengths, as autoguidance needs.  The classifier is the Bayes posterior
of clean samples.  Sampler: Heun, 32 steps, on the noise levels alpha/beta of EDM (5 to 0.002, rho 7), float64.

acc: Bayes-oracle accuracy; logp: true class-conditional log-density; ED: energy distance to true samples of the class,
x 1000; cov: 5-neighbour coverage; rows: network rows per sample.  Toy results show mechanics, nothing about images.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import gensample
from gensample.denoisers import Conditioning, Denoiser
from gensample.denoisers.process import FlowTimes
from gensample.guidance import CFG, GFCG, Autoguidance, ClassifierPosterior, Guidance, NoiseAwarePosterior
from gensample.metrics.prdc import prdc
from gensample.noise import NoiseStream
from gensample.solvers import make_solver

CLASSES, COMPONENTS = 8, 3
WRONG = (0.96, 0.8, 0.6)  # accuracies of turned classifiers; what the rows are named after is what they reach


@dataclass(frozen=True)
class Ring:
    """means (K, M, 2), widths (K, M), float64; classes and components equally likely."""

    means: Tensor
    widths: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Ring:
        """A ring of radius 1, component offsets of deviation 0.22 and widths in [0.10, 0.15]."""
        rng = np.random.default_rng(seed)
        angle = 2 * np.pi * np.arange(CLASSES) / CLASSES
        centres = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        means = centres[:, None] + 0.22 * rng.standard_normal((CLASSES, COMPONENTS, 2))
        widths = rng.uniform(0.10, 0.15, (CLASSES, COMPONENTS))
        return cls(torch.from_numpy(means), torch.from_numpy(widths))

    def blurred(self, factor: float) -> Ring:
        return replace(self, widths=factor * self.widths)

    def rotated(self, angle: float) -> Ring:
        """The ring turned by ``angle`` (radians): as a classifier, one whose boundaries are off by that much."""
        c, s = np.cos(angle), np.sin(angle)
        return replace(self, means=self.means @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64))

    def wrong(self, accuracy: float) -> tuple[Ring, float]:
        """The ring turned until it classifies true samples this accurately, and how accurately it does (bisection)."""
        x = self.sample(2500, np.random.default_rng(54321))
        labels = torch.arange(CLASSES).repeat_interleave(2500)
        low, high = 0.0, 2 * np.pi / CLASSES
        for _ in range(12):
            turned = self.rotated(0.5 * (low + high))
            reached = float((turned.log_density(x.flatten(0, 1)).argmax(1) == labels).double().mean())
            low, high = (0.5 * (low + high), high) if reached > accuracy else (low, 0.5 * (low + high))
        return turned, reached

    def log_joint(self, x: Tensor, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """log p_t(x | k, m) + log 1/M, (B, K, M)."""
        variance = beta**2 * self.widths**2 + alpha**2
        square = (x[:, None, None] - beta * self.means).square().sum(-1)
        return -0.5 * square / variance - torch.log(2 * np.pi * variance) - np.log(COMPONENTS)

    def log_density(self, x: Tensor, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """log p_t(x | k), (B, K): the logits of the exact posterior."""
        return self.log_joint(x, alpha, beta).logsumexp(2)

    def flow(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Exact flow prediction, noise - x0 on the linear path; label K stands for no condition."""
        null = class_labels == CLASSES
        if bool(null.any()) and not bool(null.all()):
            output = torch.empty_like(x)
            for rows in (null, ~null):
                output[rows] = self.flow(x[rows], timestep[rows], class_labels[rows])
            return output
        alpha = float(timestep[0])
        beta = 1.0 - alpha
        means, widths = self.means, self.widths
        if not bool(null.any()):  # one class a row: (B, 1, M) components
            means, widths = means[class_labels][:, None], widths[class_labels][:, None]
        square = (x[:, None, None] - beta * means).square().sum(-1)
        variance = beta**2 * widths**2 + alpha**2
        joint = -0.5 * square / variance - torch.log(variance)
        weight = joint.flatten(1).softmax(1).reshape(joint.shape)
        gain = (beta * widths**2 / variance)[..., None]
        x0 = (weight[..., None] * (means + gain * (x[:, None, None] - beta * means))).sum((1, 2))
        return (x - beta * x0) / alpha - x0

    def sample(self, per_class: int, rng: np.random.Generator) -> Tensor:
        """True samples (K, n, 2)."""
        which = torch.from_numpy(rng.integers(COMPONENTS, size=(CLASSES, per_class)))
        z = torch.from_numpy(rng.standard_normal((CLASSES, per_class, 2)))
        rows = torch.arange(CLASSES)[:, None]
        return self.means[rows, which] + self.widths[rows, which][..., None] * z


def edm_times(steps: int, high: float = 5.0, low: float = 0.002, rho: float = 7.0) -> list[float]:
    """Times of the noise levels sigma = alpha/beta = (1 - t)/t of EDM, and the data."""
    ramp = np.linspace(0, 1, steps)
    sigma = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [float(t) for t in 1.0 / (1.0 + sigma)] + [1.0]


def make_denoiser(ring: Ring, labels: Tensor) -> Denoiser:
    """The main and the weak network under these labels (N,)."""
    cond = Conditioning(batched={"class_labels": labels}).bind_null(class_labels=torch.tensor([CLASSES]))
    return Denoiser.from_model(
        ring.blurred(1.6).flow,
        nets={"weak": ring.blurred(2.6).flow},
        latent_shape=(2,),
        path="linear",
        prediction_type="flow_prediction",
        time_map=FlowTimes(scale=1.0),
        conditioning=cond.bind_references(class_labels=torch.arange(CLASSES)),
        decoder=lambda x: x,
    )


def rules(ring: Ring) -> dict[str, Guidance | None]:
    """The table's rows."""
    clean = ClassifierPosterior(ring.log_density, micro_batch=10**6)
    permuted = ClassifierPosterior(lambda x: ring.log_density(x).roll(1, 1), micro_batch=10**6)
    uniform = ClassifierPosterior(lambda x: torch.zeros(len(x), CLASSES), micro_batch=10**6)

    wrong = {}
    for share in WRONG:
        turned, reached = ring.wrong(share)
        wrong[f"{100 * reached:.1f} %"] = ClassifierPosterior(turned.log_density, micro_batch=10**6)

    def exact(x: Tensor, t: float | Tensor) -> Tensor:
        return ring.blurred(1.6).log_density(x, 1.0 - float(t), float(t))

    free = {"threshold": 0.0, "max_scale": np.inf, "max_entropy": None}
    alone = GFCG(posterior=clean, threshold=0.0)
    mixed = GFCG(posterior=clean, base=Autoguidance(2.0))
    degraded: dict[str, Guidance | None] = {}
    for name, posterior in wrong.items():
        degraded[f"GFCG, A {name}"] = replace(alone, posterior=posterior)
        degraded[f"GFCG-ATG, A {name}"] = replace(mixed, posterior=posterior)
        degraded[f"GFCG-ATG, A {name} tau=.3"] = replace(mixed, posterior=posterior, threshold=0.3)
    return {
        "conditional": None,
        "CFG w=1.25": CFG(1.25),
        "CFG w=1.5": CFG(1.5),
        "ATG w=1.5": Autoguidance(1.5),
        "ATG w=2": Autoguidance(2.0),
        "ATG w=2.5": Autoguidance(2.5),
        "GFCG g=2": alone,
        "GFCG g=2 lagged": replace(alone, lagged=True),
        "GFCG-ATG w=2 g=2": mixed,
        "label flip w=2 tau=.05": replace(mixed, combine="flip"),
        "label flip w=2 tau=.5": replace(mixed, combine="flip", threshold=0.5),
        "CFG|GFCG w=1.25 g=2": GFCG(posterior=clean, base=CFG(1.25)),
        "CFG+GFCG w=1.25 g=2": GFCG(posterior=clean, base=CFG(1.25), combine="add", threshold=0.0),
        "constant g=1": replace(alone, scale_function="constant", gamma=1.0, **free),
        "constant g=.25": replace(alone, scale_function="constant", gamma=0.25, **free),
        "noise-aware g=.25": GFCG(posterior=NoiseAwarePosterior(exact), gamma=0.25, **free),
        "noise-aware g=.5": GFCG(posterior=NoiseAwarePosterior(exact), gamma=0.5, **free),
        "GFCG, permuted labels": replace(alone, posterior=permuted),
        "GFCG-ATG, permuted labels": replace(mixed, posterior=permuted),
        "GFCG, uniform, no guard": replace(alone, posterior=uniform, max_entropy=None),
        "GFCG, uniform, guarded": replace(alone, posterior=uniform),
        "GFCG-ATG, uniform, guarded": replace(mixed, posterior=uniform),
        **degraded,
    }


def figures(ring: Ring, x: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """acc, logp, ED and cov of samples (N, 2)."""
    log_p = ring.log_density(x)
    record = {
        "acc": float((log_p.argmax(1) == labels).double().mean()),
        "logp": float(log_p.gather(1, labels[:, None]).mean()),
    }
    distances, coverage = [], []
    for k in range(CLASSES):
        drawn, true = x[labels == k], real[k]
        within = torch.pdist(drawn).mean() + torch.pdist(true).mean()
        distances.append(float(2 * torch.cdist(drawn, true).mean() - within))
        coverage.append(prdc(true, drawn).coverage)
    return {**record, "ED": 1e3 * statistics.mean(distances), "cov": statistics.mean(coverage)}


def run(
    ring: Ring, rule: Guidance | None, seed: int, samples: int, steps: int = 32
) -> tuple[Tensor, Tensor, float]:
    """Samples (N, 2), labels (N,) and network rows per sample."""
    labels = torch.arange(samples) % CLASSES
    denoiser = make_denoiser(ring, labels)
    times = edm_times(steps)
    noise = NoiseStream.from_generator(seed, samples).normal((2,)).double()
    solver = make_solver("heun", path=denoiser.path, prediction_type="flow_prediction", times=times)
    x = noise * (1.0 - times[0])
    for state in gensample.sampling.walk(
        denoiser, denoiser.conditioning, solver, x, NoiseStream.from_generator(seed, samples), rule
    ):
        x = state.latents
    return x, labels, denoiser.evaluations / samples


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=6000, help="per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ring", type=int, default=775, help="seed of the components")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    args = parser.parse_args()
    ring = Ring.drawn(args.ring)
    real = ring.sample(1200, np.random.default_rng(12345))
    print(f"{'rule':28s} {'rows':>6s}  acc             logp             ED             cov")
    for name, rule in rules(ring).items():
        if args.only not in name:
            continue
        records = []
        for seed in range(args.seeds):
            x, labels, rows = run(ring, rule, seed, args.samples)
            records.append(figures(ring, x, labels, real))
        text = f"{name:28s} {rows:6.1f}"
        for key, digits in (("acc", 4), ("logp", 2), ("ED", 2), ("cov", 3)):
            values = [r[key] for r in records]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            text += f"  {statistics.mean(values):.{digits}f}±{spread:.{digits}f}"
        print(text, flush=True)


if __name__ == "__main__":
    main()
