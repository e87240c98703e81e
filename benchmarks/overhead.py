"""What sampling costs beyond its network: a pipeline call against the same number of bare forwards.

    python benchmarks/overhead.py [--pairs 9] [--steps 50] [--batch 8] [--out benchmarks/results/overhead.txt]

Measured side by side, in interleaved pairs: our ClassConditionalPipeline over the shipped DiT, and Diffusers'
DiTPipeline over a DiTTransformer2DModel of comparable size with a tiny random autoencoder.  CPU time of this process,
no guidance, output_type="pt", progress bars off.  A ratio is the median over pairs of call / forwards; its 95 %
interval is from 10 000 bootstrap resamples of the pairs.  CPU time on a busy machine varies by more than the
overhead, so the loop is also timed alone: the same difference with a network that only scales its input, least of
nine, over the time of a real forward.
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
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import gensample
from gensample.noise import philox_generator

Call = Callable[[], object]


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
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for pair in range(-1, options.pairs):  # pair -1 warms up
        for name, (_, call, forwards) in contenders.items():
            if pair % 2:  # alternate the order, so that a machine that slows down favours neither
                forwards_seconds, call_seconds = cpu_seconds(forwards), cpu_seconds(call)
            else:
                call_seconds, forwards_seconds = cpu_seconds(call), cpu_seconds(forwards)
            if pair >= 0:
                times[name].append((call_seconds, forwards_seconds))
    loops = {name: loop_seconds(*contender) / options.steps for name, contender in contenders.items()}
    text = report(times, loops, options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


def ours(batch: int, steps: int) -> tuple[nn.Module, Call, Call]:
    """The transformer, a call of the shipped pipeline, and ``steps`` forwards of its transformer."""
    pipe = gensample.load("fashion")
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(batch)]
    x, timestep = inputs((batch, 1, 28, 28))
    classes = torch.tensor(labels)

    def call() -> object:
        return pipe(labels, steps, generator=0, output_type="pt")

    return (
        pipe.transformer,
        call,
        repeated(lambda: pipe.transformer(x, timestep, classes, return_dict=False), steps),
    )


def theirs(batch: int, steps: int) -> tuple[nn.Module, Call, Call]:
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
    return transformer, call, with_decode(bare, autoencoder, x)


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


def loop_seconds(transformer: nn.Module, call: Call, forwards: Call) -> float:
    """CPU time of a call beyond its forwards, by a network that only scales its input."""

    def scaled(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Transformer2DModelOutput:
        return Transformer2DModelOutput(0.1 * hidden_states)

    transformer.forward = scaled  # type: ignore[method-assign]
    try:
        return min(cpu_seconds(call) for _ in range(9)) - min(cpu_seconds(forwards) for _ in range(9))
    finally:
        del transformer.forward


def cpu_seconds(call: Call) -> float:
    """CPU time of one call, over all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def report(
    times: dict[str, list[tuple[float, float]]], loops: dict[str, float], options: argparse.Namespace
) -> str:
    """Machine, versions, date, and a line for each contender."""
    lines = [
        f"{datetime.date.today()}  {processor()}, {os.cpu_count()} CPUs, {platform.platform()}",
        f"Python {platform.python_version()}, torch {torch.__version__}, Diffusers {diffusers.__version__}, "
        f"gensample {gensample.__version__}",
        f"{options.pairs} pairs, batch {options.batch}, {options.steps} steps, {options.threads} thread(s); CPU time "
        "of a pipeline call / that of its forwards (Diffusers: and one decoding)",
        "",
    ]
    for name, pairs in times.items():
        ratios = np.array([call / bare for call, bare in pairs])
        low, high = interval(ratios)
        bare = float(np.median([b for _, b in pairs]))
        each, alone = 1000 * bare / options.steps, 1000 * loops[name]
        lines.append(
            f"{name:38s} {np.median(ratios):.4f}  [{low:.4f}, {high:.4f}]   forward {each:.2f} ms, "
            f"loop alone {alone:.2f} ms a step: {alone / each:.1%}"
        )
    return "\n".join(lines)


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
