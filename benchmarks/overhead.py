"""What sampling costs beyond its network: a pipeline call against the same number of bare forwards.

    python benchmarks/overhead.py [--pairs 9] [--steps 50] [--batch 8] [--out benchmarks/results/overhead.txt]

Measured side by side, in interleaved pairs: our ClassConditionalPipeline over the shipped DiT, and Diffusers'
DiTPipeline over a DiTTransformer2DModel of comparable size with a tiny random autoencoder.  CPU time of this process,
no guidance, output_type="pt", progress bars off.  A ratio is the median over pairs of call / forwards; its 95 %
interval is from 10 000 bootstrap resamples of the pairs.  On a busy machine the CPU time of equal forwards varies by
more than the overhead, so a second ratio compares each call with the time inside its own networks.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

import gensample
from gensample.noise import philox_generator

Call = Callable[[], object]
Networks = list[tuple[nn.Module, str]]  # and the method that a pipeline calls


def main() -> None:
    """Measure and print; write the same text where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU time of idle threads would count: use 1")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders = {
        "gensample ClassConditionalPipeline": ours(options.batch, options.steps),
        "Diffusers DiTPipeline": theirs(options.batch, options.steps),
    }
    pairs: dict[str, list[float]] = {name: [] for name in contenders}
    inner: dict[str, list[float]] = {name: [] for name in contenders}
    forward: dict[str, list[float]] = {name: [] for name in contenders}
    for pair in range(-1, options.pairs):  # pair -1 warms up
        for name, (networks, call, forwards) in contenders.items():
            if pair % 2:  # alternate the order, so that a machine that slows down favours neither
                forwards_seconds, call_seconds = cpu_seconds(forwards), cpu_seconds(call)
            else:
                call_seconds, forwards_seconds = cpu_seconds(call), cpu_seconds(forwards)
            whole, inside = seconds_inside(networks, call)
            if pair >= 0:
                pairs[name].append(call_seconds / forwards_seconds)
                inner[name].append(whole / inside)
                forward[name].append(1000 * forwards_seconds / options.steps)
    text = heading(options)
    for name in contenders:
        text += (
            f"\n{name:35s} call / forwards {shown(pairs[name])}   call / inside its networks {shown(inner[name])}"
            f"   forward {np.median(forward[name]):.2f} ms"
        )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def ours(batch: int, steps: int) -> tuple[Networks, Call, Call]:
    """The network, a call of the shipped pipeline, and ``steps`` forwards of its transformer."""
    pipe = gensample.load("fashion")
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(batch)]
    x, timestep = inputs((batch, 1, 28, 28))
    classes = torch.tensor(labels)

    def call() -> object:
        return pipe(labels, steps, generator=0, output_type="pt")

    return (
        [(pipe.transformer, "forward")],
        call,
        repeated(lambda: pipe.transformer(x, timestep, classes, return_dict=False), steps),
    )


def theirs(batch: int, steps: int) -> tuple[Networks, Call, Call]:
    """The same of DiTPipeline, its network as wide, deep and long (49 tokens) as ours."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=14, patch_size=2, in_channels=4, out_channels=4, num_layers=8, num_attention_heads=6,
        attention_head_dim=32, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", attention_bias=True,
        activation_fn="gelu-approximate", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=14
    ).eval()
    pipe: Any = DiTPipeline(transformer, autoencoder, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(batch)]
    x, timestep = inputs((batch, 4, 14, 14))
    classes = torch.tensor(labels)
    generator = torch.Generator()

    def call() -> object:
        return pipe(
            labels,
            guidance_scale=1.0,
            num_inference_steps=steps,
            generator=generator.manual_seed(0),
            output_type="pt",
        )

    bare = repeated(lambda: transformer(x, timestep=timestep, class_labels=classes, return_dict=False), steps)
    return [(transformer, "forward"), (autoencoder, "decode")], call, with_decode(bare, autoencoder, x)


def with_decode(forwards: Call, autoencoder: Any, latents: torch.Tensor) -> Call:
    """The forwards and one decoding, which the call cannot do without."""

    @torch.no_grad()
    def run() -> object:
        forwards()
        return autoencoder.decode(latents)

    return run


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A state and its timesteps."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.full((shape[0],), 500.0)


def repeated(forward: Call, count: int) -> Call:
    """``count`` evaluations without gradients."""

    @torch.no_grad()
    def run() -> object:
        for _ in range(count):
            forward()
        return None

    return run


def seconds_inside(networks: Networks, call: Call) -> tuple[float, float]:
    """CPU time of a call, and of what it spends inside its own networks."""
    inside = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            start = time.process_time()
            result = method(*arguments, **options)
            inside += time.process_time() - start
            return result

        return run

    for network, name in networks:
        setattr(network, name, timed(getattr(network, name)))
    try:
        return cpu_seconds(call), inside
    finally:
        for network, name in networks:
            delattr(network, name)


def cpu_seconds(call: Call) -> float:
    """CPU time of one call, over all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def heading(options: argparse.Namespace) -> str:
    """Machine, versions, date and protocol."""
    return "\n".join(
        [
            f"{datetime.date.today()}  {processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[1]:.1f}, "
            f"{platform.platform()}",
            f"Python {platform.python_version()}, torch {torch.__version__}, Diffusers {diffusers.__version__}, "
            f"gensample {gensample.__version__}",
            f"{options.pairs} interleaved pairs, batch {options.batch}, {options.steps} steps, {options.threads} "
            "thread(s); ratios of CPU time, median [95 % interval]; Diffusers' networks include one decoding",
            "",
        ]
    )


def shown(ratios: list[float]) -> str:
    """Median and interval."""
    low, high = interval(np.array(ratios))
    return f"{np.median(ratios):.4f} [{low:.4f}, {high:.4f}]"


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draws = philox_generator(0, 0, purpose="bootstrap").integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return float(low), float(high)


def processor() -> str:
    """The CPU's name."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
