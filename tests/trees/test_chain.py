"""The chain seam: a walk of edges equals the plain sampler, whatever the batch, order or level mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gensample
from gensample.denoisers import Conditioning, Denoiser
from gensample.guidance import CFG, GFCG, NoiseAwarePosterior
from gensample.interpolants import GaussianMixture, make_interpolant
from gensample.noise import NoiseStream
from gensample.solvers import Diffusion, make_solver
from gensample.trees import DenoiserChain

PATH = make_interpolant("linear")
MIXTURE = GaussianMixture.isotropic([0.3, 0.7], [[-2.0, 0.5], [1.5, 0.0]], [0.15, 0.3])


def denoiser(num_samples: int = 1) -> Denoiser:
    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = [
            MIXTURE.output(x[i : i + 1], PATH, float(1.0 - timestep[i].double() / 1000.0), "velocity")
            for i in range(len(x))
        ]
        return torch.cat(rows)

    return Denoiser.from_model(
        network, latent_shape=(2,), path="linear", prediction_type="velocity", num_samples=num_samples,
        decoder=lambda x: x,
    )  # fmt: skip


def chain(num_samples: int = 1, **options: object) -> DenoiserChain:
    model = denoiser(num_samples)
    solver = make_solver(
        "exp", path=PATH, prediction_type="velocity", times=model.times(6), diffusion=Diffusion("sigma", 1.0)
    )
    return DenoiserChain.from_solver(model, solver, **options)


def walk(c: DenoiserChain, noise: NoiseStream, stops: list[int]) -> torch.Tensor:
    x, level = c.initial(noise), np.zeros(len(noise), dtype=np.int64)
    sample = np.zeros(len(noise), dtype=np.int64)
    for stop in stops:
        x = c.propagate(x, level, np.full(len(noise), stop), noise, sample)
        level = np.full(len(noise), stop)
    return x


def test_edges_compose_to_the_plain_sampler() -> None:
    """Three edges of a chain are gensample.sample with the same seed, to float32 rounding."""
    c, noise = chain(), NoiseStream.from_generator(5, 4)
    expected = gensample.sample(
        denoiser(4), solver="exp", diffusion=Diffusion("sigma", 1.0), num_inference_steps=6, generator=5,
        output_type="latent", progress=False,
    ).latents  # fmt: skip
    assert torch.allclose(walk(c, noise, [2, 3, 6]), expected, atol=1e-5)
    assert c.evaluations == 24


def test_rows_at_different_levels_share_a_batch() -> None:
    """A mixed frontier gives each row what it gets alone, and costs the sum of the edges."""
    c, noise = chain(), NoiseStream.from_generator(5, 3)
    x, zero = c.initial(noise), np.zeros(3, dtype=np.int64)
    start, stop = np.array([0, 2, 5]), np.array([3, 6, 6])
    whole = c.propagate(x, start, stop, noise, zero)
    assert c.evaluations == 3 + 4 + 1
    for row in range(3):
        r = slice(row, row + 1)
        alone = c.propagate(x[r], start[r], stop[r], noise.select(r), zero[:1])
        assert torch.allclose(whole[r], alone, atol=1e-5)


def test_children_share_their_parents_first_evaluation() -> None:
    """Siblings from one shared answer equal siblings that each evaluate; evaluations drop by the sharing."""
    c = chain()
    noise = NoiseStream.from_generator(5, 1)
    parent = walk(c, noise, [2])
    children = noise.select([0, 0, 0]).extend([0, 1, 2])
    start, stop, sample = np.full(3, 2), np.full(3, 4), np.zeros(3, dtype=np.int64)
    before = c.evaluations
    apart = c.propagate(parent.repeat(3, 1), start, stop, children, sample)
    assert c.evaluations - before == 6
    first = c.answer(parent, start[:1], sample[:1]).rows(np.zeros(3, dtype=np.int64))
    shared = c.propagate(parent.repeat(3, 1), start, stop, children, sample, first=first)
    assert c.evaluations - before == 6 + 1 + 3
    assert torch.allclose(apart, shared, atol=1e-6)
    assert (shared[0] - shared[1]).abs().max() > 1e-3


def test_the_last_step_is_deterministic() -> None:
    c = chain()
    assert [c.is_stochastic(i) for i in range(6)] == [True] * 5 + [False]


def test_micro_batches_do_not_change_the_walk() -> None:
    noise = NoiseStream.from_generator(5, 7)
    assert torch.allclose(walk(chain(), noise, [6]), walk(chain(micro_batch=3), noise, [6]), atol=1e-5)


def test_deterministic_and_stateful_walks_are_refused() -> None:
    model = denoiser()
    for name, fix in (("euler", "exp"), ("heun", "exp"), ("exp2m", "exp")):
        solver = make_solver(name, path=PATH, prediction_type="velocity", times=model.times(4))
        with pytest.raises(ValueError, match=fix):
            DenoiserChain.from_solver(model, solver)
    posterior = NoiseAwarePosterior(lambda x, t: torch.zeros(len(x), 2))
    with pytest.raises(ValueError, match="lagged=False"):
        chain(guidance=GFCG(posterior=posterior, lagged=True))


def test_bad_edges_are_named() -> None:
    c, noise = chain(), NoiseStream.from_generator(5, 1)
    with pytest.raises(ValueError, match=r"within 0\.\.6"):
        c.propagate(c.initial(noise), np.array([3]), np.array([3]), noise, np.array([0]))


def test_guidance_is_the_policy() -> None:
    """CFG at scale 1 leaves the walk as it is; its null branch follows the row's own conditioning."""
    labels = Conditioning(batched={"y": torch.tensor([1.0, -1.0])}).bind_null(y=torch.zeros(1))

    def network(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -x + y[:, None]

    def build(**options: object) -> DenoiserChain:
        model = Denoiser.from_model(
            network, latent_shape=(2,), path="linear", prediction_type="velocity", conditioning=labels
        )
        solver = make_solver(
            "exp",
            path=PATH,
            prediction_type="velocity",
            times=model.times(4),
            diffusion=Diffusion("sigma", 1.0),
        )
        return DenoiserChain.from_solver(model, solver, **options)

    x, level, sample = torch.zeros(3, 2), np.array([0, 2, 1]), np.array([1, 0, 1])
    plain = build().answer(x, level, sample).output
    assert plain[:, 0].tolist() == [-1.0, 1.0, -1.0]
    guided = build(guidance=CFG(3.0)).answer(x, level, sample).output
    assert guided[:, 0].tolist() == [-3.0, 3.0, -3.0]
