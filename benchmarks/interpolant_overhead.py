"""What a sampling step costs beside its network, against Diffusers, flow_matching and torchdiffeq, in one run.

The peers live in an environment of their own, which borrows torch and Diffusers from this one:

    python -m venv /tmp/peers
    .venv/bin/python -c "import site; print(site.getsitepackages()[0])" \
        > /tmp/peers/lib/python3.11/site-packages/borrowed.pth
    echo $PWD >> /tmp/peers/lib/python3.11/site-packages/borrowed.pth
    /tmp/peers/bin/pip install --no-deps flow-matching torchdiffeq
    OMP_NUM_THREADS=1 /tmp/peers/bin/python benchmarks/interpolant_overhead.py \
        [--rounds 15] [--steps 50] [--out benchmarks/results/interpolant_overhead.txt]

The network answers a constant (1, 4, 32, 32); the time of calling it alone is taken off.  A round runs every contender
and keeps its fastest of 12 walks; figures are medians over rounds with 95 % bootstrap intervals, ratios are taken
within a round ("fastest": between the fastest walks of all rounds, which other processes disturb least).  Then
operations dispatched per step, those that read a value back to the host, and bits: every
scheduler step against FlowMatchEuler's on random outputs, and every step of the loop of ``gensample.sample`` in ulps.
Without the peers' packages their rows are left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gensample
from gensample.denoisers import Conditioning, Denoiser, NativeOutput
from gensample.interpolants import LinearInterpolant
from gensample.noise import NoiseStream, philox_generator
from gensample.sampling import run
from gensample.solvers import SolverState, make_solver, uniform_times

SHAPE = (1, 4, 32, 32)
REFERENCE = "Diffusers FlowMatchEuler.step"
Walk = Callable[[], Tensor]


class Constant:
    """A network that answers ``output``, and the least denoiser around it that the loop accepts."""

    path, prediction_type = LinearInterpolant(), "flow_prediction"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.start = torch.randn(SHAPE, generator=generator)
        self.output = torch.randn(SHAPE, generator=generator)
        self._native = NativeOutput(self.output)

    def __call__(self, x: Tensor, t: object) -> Tensor:
        return self.output

    def denoise(
        self, x: Tensor, t: float, cond: object, net: str = "main", grad: bool = False
    ) -> NativeOutput:
        """The constant as a denoiser gives it."""
        return self._native


def contenders(network: Constant, steps: int) -> dict[str, tuple[Walk, Walk]]:
    """By name: a walk of ``steps`` steps, and the calls of the network that it makes."""
    calls = repeated(lambda: network(network.start, 0.5), steps)
    rows: dict[str, tuple[Walk, Walk]] = {REFERENCE: (stepping(network, flow_match_euler(steps)), calls)}
    heun = FlowMatchHeunDiscreteScheduler()
    heun.set_timesteps(steps)
    stages = repeated(lambda: network(network.start, 0.5), len(heun.timesteps))
    rows["Diffusers FlowMatchHeun.step"] = stepping(network, heun), stages
    for solver in ("euler", "exp", "heun"):
        scheduler = gensample.StochasticInterpolantScheduler(solver=solver, seed=0)
        scheduler.set_timesteps(steps)
        evaluations = repeated(lambda: network(network.start, 0.5), len(scheduler.timesteps))
        rows[f"gensample scheduler.step, {solver}"] = (stepping(network, scheduler), evaluations)
    for name in ("euler", "exp"):
        rows[f"gensample.sample's loop, {name}"] = (
            looping(network, name, steps),
            repeated(lambda: network.denoise(network.start, 0.5, None).output, steps),
        )
    real = Denoiser.from_model(
        lambda x, timestep: network.output, latent_shape=SHAPE[1:], prediction_type="flow_prediction"
    )
    rows["gensample.sample, its Denoiser included"] = (
        lambda: gensample.sample(
            real, solver="euler", num_inference_steps=steps, latents=network.start, generator=0,
            output_type="latent", progress=False,
        ).latents,
        calls,
    )  # fmt: skip
    return {**rows, **peers(network, steps, calls)}


def peers(network: Constant, steps: int, calls: Walk) -> dict[str, tuple[Walk, Walk]]:
    """flow_matching's ODESolver and torchdiffeq, where installed."""
    rows: dict[str, tuple[Walk, Walk]] = {}
    if importlib.util.find_spec("flow_matching"):
        from flow_matching.solver import ODESolver

        solver = ODESolver(velocity_model=network)
        rows["flow_matching ODESolver, euler"] = (
            lambda: solver.sample(network.start, step_size=1.0 / steps, method="euler"), calls,
        )  # fmt: skip
    if importlib.util.find_spec("torchdiffeq"):
        from torchdiffeq import odeint

        grid = torch.linspace(0.0, 1.0, steps + 1)
        rows["torchdiffeq odeint, euler"] = (
            lambda: odeint(lambda t, x: network(x, t), network.start, grid, method="euler")[-1], calls,
        )  # fmt: skip
    return rows


def flow_match_euler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    """Diffusers' scheduler over 1, ..., 1/steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    return scheduler


def stepping(network: Constant, scheduler: Any) -> Walk:
    """A pipeline's loop around ``scheduler``."""

    def walk() -> Tensor:
        if hasattr(scheduler, "_reset"):
            scheduler._reset()
        else:
            scheduler._step_index = scheduler.dt = None  # dt: FlowMatchHeun begins a step
        x = network.start
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        return x

    return walk


def looping(network: Constant, name: str, steps: int) -> Walk:
    """The loop of ``gensample.sample``."""
    solver = make_solver(
        name, path=network.path, prediction_type=network.prediction_type, times=uniform_times(steps)
    )
    cond, noise = Conditioning(num_rows=1), NoiseStream.from_generator(0, 1)
    return lambda: run(network, cond, solver, network.start, noise)  # type: ignore[arg-type]


def repeated(call: Callable[[], Any], count: int) -> Walk:
    """``count`` calls of the network alone."""

    def walk() -> Tensor:
        for _ in range(count):
            value: Tensor = call()
        return value

    return walk


def fastest(walk: Walk, repeats: int = 12) -> float:
    """Processor seconds of the fastest of some walks."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time_ns()
        walk()
        best = min(best, (time.process_time_ns() - start) * 1e-9)
    return best


class Counting(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(walk: Walk, calls: Walk, steps: int) -> tuple[float, float]:
    """Operations a step, and those of them that read a value back."""
    with Counting() as counting:
        walk()
    reads = counting.found["_local_scalar_dense"]
    return sum(counting.found.values()) / steps, reads / steps


def bits(steps: int) -> str:
    """Every step of ours against FlowMatchEuler's, from the same state and random output."""
    theirs = flow_match_euler(steps)
    scheduler = gensample.StochasticInterpolantScheduler()
    scheduler.set_timesteps(steps)
    times = [1.0 - float(s) for s in theirs.sigmas]
    solver = make_solver("euler", path=LinearInterpolant(), prediction_type="flow_prediction", times=times)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator)
    equal, ulps = True, 0

    state, y = SolverState(), x
    for t in theirs.timesteps:
        output = torch.randn(SHAPE, generator=generator)
        expected = theirs.step(output, t, x, return_dict=False)[0]
        y = scheduler.step(output, t, y, return_dict=False)[0]
        looped, state = solver.update(x, output, state, torch.Tensor)
        equal &= torch.equal(y, expected)
        ulps = max(ulps, int((looped.view(torch.int32) - expected.view(torch.int32)).abs().max()))
        x = expected
    return f"float32 steps: scheduler bit-equal to FlowMatchEuler: {equal}; loop: {ulps} ulp per step at most"


@torch.no_grad()
def report(rounds: int, steps: int) -> str:
    """Everything as text."""
    network = Constant()
    rows = contenders(network, steps)
    cost: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(-1, rounds):  # turn -1 warms up
        for name, (walk, calls) in rows.items():
            microseconds = 1e6 * (fastest(walk) - fastest(calls)) / steps
            if turn >= 0:
                cost[name].append(microseconds)
    lines = [
        heading(rounds, steps),
        f"{'':42s}microseconds a step     x FlowMatchEuler     fastest     ops  reads",
    ]
    reference = np.array(cost[REFERENCE])
    for name, (walk, calls) in rows.items():
        ops, reads = operations(walk, calls, steps)
        found = np.array(cost[name])
        ratio, best = found / reference, found.min() / reference.min()
        lines.append(f"{name:42s}{shown(found, 1)}   {shown(ratio, 2)} {best:6.2f}  {ops:6.1f} {reads:5.2f}")
    return "\n".join([*lines, "", bits(steps)])


def shown(values: np.ndarray, digits: int) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = philox_generator(0, 0, purpose="bootstrap").integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return f"{np.median(values):6.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".ljust(22)


def heading(rounds: int, steps: int) -> str:
    """Machine, versions, date and protocol."""
    information = Path("/proc/cpuinfo")
    names = [v.partition(":")[2].strip() for v in information.read_text().splitlines() if "model name" in v]
    return "\n".join(
        [
            f"{datetime.date.today()}  {names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, load "
            f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, Diffusers "
            f"{diffusers.__version__}, gensample {gensample.__version__}",
            f"state {SHAPE} float32, {steps} steps, {rounds} rounds, 1 thread; CPU time beyond the network",
            "",
        ]
    )


def main() -> None:
    """Measure and print; write the same text where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = report(options.rounds, options.steps)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
