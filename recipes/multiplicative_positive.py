"""Positive data beyond images by multiplicative and additive diffusion, and log-normal weights.

    python recipes/multiplicative_positive.py [--out docs/images] [--steps 2000]

The data are spectra: the energies of every Fashion-MNIST image at four spatial frequencies, positive, heavy-tailed and
over seven decades.  The additive model is a linear-path flow on the standardised values, the
multiplicative one the same flow on their standardised logarithms (geometric Brownian motion, sigma 16 standard
deviations of the logarithm); same network, batches, updates and steps.  Prints one JSON line each, and draws the
figures of docs/multiplicative.md.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gensample.interpolants import LinearInterpolant, interpolation_loss
from gensample.interpolants.geometric import GeometricProcess, safe_exp
from gensample.solvers import SolverState, advance, make_solver, uniform_times
from gensample.training import ExponentiatedGradient
from gensample.training.data import FashionMNIST

FREQUENCIES = ((1, 0), (1, 1), (3, 3), (0, 7))  # cycles per image down and across
NAMES = tuple(f"energy at {f}" for f in FREQUENCIES)


def measurements(images: Tensor) -> Tensor:
    """(N, 4) float64, all positive: energies per pixel of images (N, 1, 28, 28) uint8 at the four frequencies."""
    power = torch.fft.rfft2(images[:, 0].double() / 255).abs().square() / images[0].numel()
    return torch.stack([power[:, down, across] for down, across in FREQUENCIES], 1)


class Net(nn.Module):
    """Three hidden layers of 128 on the state and features of the noise level."""

    def __init__(self, width: int = 128, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (len(NAMES) + 8, width, width, width, len(NAMES))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(
                    torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5
                )
                layer.bias.zero_()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x (B, 4), level (B,) in [0, 1]: noise over noise plus signal."""
        angles = level[:, None] * torch.pi * 2.0 ** torch.arange(4)
        hidden = torch.cat([x, angles.sin(), angles.cos()], 1)
        for layer in self.layers[:-1]:
            hidden = F.silu(layer(hidden))
        return self.layers[-1](hidden)


def train(data: Tensor, steps: int, seed: int) -> Net:
    """A linear-path flow on standardised ``data`` (N, 4): the same for both models."""
    net, path = Net(), LinearInterpolant()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    rng = np.random.Generator(np.random.Philox(key=seed))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.from_numpy(rng.integers(0, len(data), 512))
        noise = torch.from_numpy(rng.standard_normal((512, data.shape[1]), dtype=np.float32))
        loss = interpolation_loss(
            lambda x, t: net(x, torch.from_numpy(1 - t).float()), path, "flow_prediction", data[rows].float(), noise,
            rng.random(512),
        ).mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def sample_additive(net: Net, noise: Tensor, steps: int) -> Tensor:
    """States at the data from standard normal noise, by Heun's method."""
    path = LinearInterpolant()
    solver = make_solver("heun", path=path, prediction_type="flow_prediction", times=uniform_times(steps))
    x, state = solver.initial(noise), SolverState()
    for _ in range(steps):
        x, state = advance(solver, x, state, lambda x, t: net(x, torch.full((len(x),), 1 - t)), lambda: noise)
    return x


@torch.no_grad()
def sample_multiplicative(net: Net, noise: Tensor, steps: int) -> Tensor:
    """The same on geometric Brownian motion: states u, whose exponential is positive."""
    process = GeometricProcess(sigma=16.0, prediction_type="log_flow", network_input="log")
    level = np.linspace(float(process.timestep(0.0)), 0.0, steps + 1)[1:-1] / 1000
    times = [0.0, *np.asarray(process.time_of_ratio(level / (1 - level))).tolist(), 1.0]
    solver = make_solver("heun", path=process.path, prediction_type="epsilon", times=times)
    u, state = solver.initial(noise), SolverState()

    def epsilon(u: Tensor, t: float) -> Tensor:
        said = net(process.network_state(u, t), torch.full((len(u),), float(process.timestep(t)) / 1000))
        return process.to_epsilon(said, u, t)

    for _ in range(steps):
        u, state = advance(solver, u, state, epsilon, lambda: noise)
    return u


def sliced_w1(a: np.ndarray, b: np.ndarray, directions: int = 64) -> float:
    """Mean 1-Wasserstein distance over fixed random directions."""
    d = np.random.Generator(np.random.Philox(key=3)).standard_normal((a.shape[1], directions))
    d /= np.linalg.norm(d, axis=0)
    return float(np.abs(np.sort(a @ d, 0) - np.sort(b @ d, 0)).mean())


def compare(steps: int) -> dict[str, Any]:
    """Train and sample both models; figures on test images."""
    fashion = FashionMNIST()
    train_x, test_x = (measurements(fashion.load_split(split).images) for split in ("train", "test"))
    mean, std = train_x.mean(0), train_x.std(0)
    log_mean, log_std = train_x.log().mean(0), train_x.log().std(0)
    noise = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=11)).standard_normal((len(test_x), 4))
    ).float()
    additive = sample_additive(train((train_x - mean) / std, steps, 1), noise, 20).double() * std + mean
    u = sample_multiplicative(train((train_x.log() - log_mean) / log_std, steps, 1), noise, 20)
    multiplicative, clamped = safe_exp(u.double() * log_std + log_mean)
    result: dict[str, Any] = {"real": test_x, "additive": additive, "multiplicative": multiplicative}
    skew = (((test_x - test_x.mean(0)) / test_x.std(0)) ** 3).mean(0)
    print(json.dumps({"data": NAMES, "skewness": [round(float(v), 2) for v in skew], "clamped": int(clamped),
                      "smallest": [float(f"{v:.3g}") for v in test_x.min(0).values]}))  # fmt: skip
    for name in ("additive", "multiplicative"):
        x = result[name]
        kept = x.clamp_min(1e-6)
        line = {
            "model": name, "samples": len(x), "negative_values": float((x <= 0).double().mean()),
            "samples_with_one": float((x <= 0).any(1).double().mean()), "smallest": float(x.min()),
            "sliced_w1": sliced_w1(((x - mean) / std).numpy(), ((test_x - mean) / std).numpy()),
            "sliced_w1_log": sliced_w1(
                ((kept.log() - log_mean) / log_std).numpy(), ((test_x.log() - log_mean) / log_std).numpy()
            ),
        }  # fmt: skip
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}))
    floor = sliced_w1(((train_x[: len(test_x)] - mean) / std).numpy(), ((test_x - mean) / std).numpy())
    print(json.dumps({"floor": "train images against test images", "sliced_w1": round(floor, 4)}))
    return result


def draw_positive(result: dict[str, Any], path: Path) -> None:
    """Histograms of every measurement: real, additive, multiplicative."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
    for i, (axis, name) in enumerate(zip(axes, NAMES, strict=True)):
        real = result["real"][:, i].numpy()
        low, high = min(0.0, float(result["additive"][:, i].min())), float(np.quantile(real, 0.97))
        width = high / 50
        bins = np.arange(np.floor(low / width), 51) * width  # no bin straddles 0
        axis.hist(real, bins, density=True, color="#cbd5e1", label="real")
        for kind, colour in (("additive", "#d97706"), ("multiplicative", "#4338ca")):
            axis.hist(
                result[kind][:, i].numpy(), bins, density=True, histtype="step", color=colour, label=kind
            )
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def weights(steps: int) -> dict[str, np.ndarray]:
    """First-layer weights over their first size, from weights of one size and random sign, for both optimisers."""
    data = FashionMNIST().load_split("guidance")
    x = (data.images.float() / 255 - 0.2860) / 0.3530
    found = {}
    for name in ("exponentiated gradient", "gradient descent"):
        rng = np.random.Generator(np.random.Philox(key=2))
        sizes = [(784, 64), (64, 10)]
        layers = [
            nn.Parameter(torch.from_numpy(rng.choice([-1.0, 1.0], s)).float() * s[0] ** -0.5) for s in sizes
        ]
        if name == "gradient descent":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(layers, lr=0.1)
        else:
            optimizer = ExponentiatedGradient(layers, lr=1.0)
        start = layers[0].detach().clone()
        for _ in range(steps):
            rows = torch.from_numpy(rng.integers(0, len(x), 128))
            logits = F.relu(x[rows].flatten(1) @ layers[0]) @ layers[1]
            loss = F.cross_entropy(logits, data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        inner = torch.zeros(28, 28, dtype=torch.bool)
        inner[4:24, 6:22] = True  # pixels that carry ink
        ratio = (layers[0].detach() / start)[inner.flatten()].flatten().numpy()
        accuracy = float((logits.argmax(1) == data.labels[rows]).float().mean())
        change = np.log(np.abs(ratio)) if name == "exponentiated gradient" else ratio - 1
        z = (change - change.mean()) / change.std()
        print(json.dumps({
            "optimiser": name, "last_batch_accuracy": round(accuracy, 3),
            "flipped_signs": float((ratio < 0).mean().round(4)),
            "log_std": round(float(np.log(np.abs(ratio)).std()), 3),
            "skewness_of_change": round(float((z**3).mean()), 2),
            "excess_kurtosis_of_change": round(float((z**4).mean() - 3), 2),
        }))  # fmt: skip
        found[name] = ratio
    return found


def draw_weights(found: dict[str, np.ndarray], path: Path) -> None:
    """Weights over their first size on a linear axis, and the logarithm of their size, for both optimisers."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for name, colour in (("exponentiated gradient", "#4338ca"), ("gradient descent", "#d97706")):
        ratio = found[name]
        style = {"histtype": "step", "density": True, "color": colour, "label": name}
        axes[0].hist(ratio, np.linspace(-2, 4, 121), **style)
        axes[1].hist(np.log(np.abs(ratio)), np.linspace(-3, 2, 121), **style)
    axes[0].axvline(0, color="black", linewidth=0.6)
    axes[0].set_title("weight / first weight (below 0: sign changed)", fontsize=9)
    axes[1].set_title("log |weight / first weight|", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Everything, in half a minute on one core."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    draw_positive(compare(args.steps), args.out / "gbm-positive.png")
    draw_weights(weights(args.steps), args.out / "gbm-weights.png")


if __name__ == "__main__":
    main()
