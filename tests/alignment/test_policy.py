"""Policies: kernels against torch.distributions, each other and Diffusers; intensities; guidance and nets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from gensample.alignment.policy import Policy, scheduler_kernel, solver_kernel
from gensample.alignment.presets import branch, dynamic_tree
from gensample.denoisers import denoiser_from_pipeline
from gensample.guidance import CFG, Projection
from gensample.interpolants import make_interpolant
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import Diffusion, make_solver
from gensample.trees import Answer
from tests.alignment.small import TinyFlow, gaussian_policy, gradient, scheduler, tiny_policy, trees
from tests.tiny_models import tiny_pipeline
from tests.tiny_pipelines import tiny_ddpm, tiny_flux, tiny_sd, tiny_sd3

SHAPE = (5, 3, 4)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ddim(steps: int = 5, cls: Any = DDIMScheduler, **config: Any) -> Any:
    made = cls(clip_sample=False, **config)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize(
    "kernel",
    [
        scheduler_kernel(scheduler(5), diffusion="flow"),
        scheduler_kernel(scheduler(5), diffusion="dance"),
        scheduler_kernel(scheduler(5), diffusion="exp-sigma"),
        scheduler_kernel(ddim()),
    ],
    ids=["flow", "dance", "exp-sigma", "ddim"],
)
def test_log_prob_is_that_of_torch_distributions(kernel: Any) -> None:
    for i in range(4):
        x, output, noise = randn(1), randn(2), randn(3)
        law = kernel(1.0)(i, x, output)
        new = law.sample(noise)
        std = float(torch.as_tensor(law.std).flatten()[0])
        exact = torch.distributions.Normal(law.mean.double(), std).log_prob(new.double()).flatten(1)
        torch.testing.assert_close(
            law.log_prob(new, reduction="mean").double(), exact.mean(1), rtol=0, atol=2e-6
        )
        torch.testing.assert_close(law.log_prob(new).double(), exact.sum(1), rtol=0, atol=2e-5)
        closed = -0.5 * noise.square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(law.log_prob(new, reduction="mean"), closed, rtol=0, atol=2e-5)
    assert kernel(1.0)(4, x, output).is_deterministic


def test_dance_is_flow_with_its_noise_coefficient() -> None:
    """Two code paths of one SDE: flow scaled row by row to g = 0.3 gives the law of dance."""
    flow, dance = tiny_policy(diffusion="flow"), tiny_policy(diffusion="dance", scale=0.3)
    sigma = scheduler(6).sigmas.double().numpy()
    steps = np.arange(5)
    capped = np.where(sigma[:5] == 1.0, sigma[1], sigma[:5])
    scale = 0.3 / (0.7 * np.sqrt(sigma[:5] / (1.0 - capped)))
    x, answer = randn(1, (5, 6)), Answer(randn(2, (5, 6)))
    ours, theirs = flow.law(x, steps, answer, scale), dance.law(x, steps, answer, np.ones(5))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.std, theirs.std, rtol=0, atol=1e-6)
    assert np.isfinite(flow.spreads(branch(steps=6, splits=(0,)).at(0))).all()  # sigma = 1 included


def test_deterministic_limits_are_diffusers_own_steps() -> None:
    x, output = randn(1, (2, 6)), randn(2, (2, 6))
    for name in ("flow", "dance", "cps", "exp-sigma"):
        kernel = scheduler_kernel(scheduler(4), diffusion=name)
        for i in range(4):
            theirs = scheduler(4)
            expected = theirs.step(output, theirs.timesteps[i], x).prev_sample
            law = kernel(0.0)(i, x, output)
            assert law.is_deterministic
            torch.testing.assert_close(law.mean, expected, rtol=0, atol=1e-5)
    for i in range(4):
        theirs = ddim()
        expected = theirs.step(output, int(theirs.timesteps[i]), x, eta=0.0).prev_sample
        torch.testing.assert_close(
            scheduler_kernel(theirs)(0.0)(i, x, output).mean, expected, rtol=0, atol=1e-5
        )


def test_cps_of_scale_one_is_diffusers_stochastic_sampling() -> None:
    """x' = (1 - sigma') x0 + sigma' noise, with the draw of the same generator."""
    x, output = randn(1, (2, 6)), randn(2, (2, 6))
    theirs = scheduler(4, stochastic_sampling=True)
    drawn = theirs.step(
        output, theirs.timesteps[1], x, generator=torch.Generator().manual_seed(7)
    ).prev_sample
    noise = torch.randn(2, 6, generator=torch.Generator().manual_seed(7))
    law = scheduler_kernel(scheduler(4), diffusion="cps", scale=1.0)(1.0)(1, x, output)
    torch.testing.assert_close(law.sample(noise), drawn, rtol=0, atol=1e-5)


def test_rows_of_several_intensities_are_each_scored_at_their_own() -> None:
    policy = tiny_policy(diffusion="cps", scale=0.5)
    x, answer = randn(1, (4, 6)), Answer(randn(2, (4, 6)))
    steps, scale = np.array([3, 1, 0, 2]), np.array([1.0, 0.0, 1.5, 1.0])
    law = policy.law(x, steps, answer, scale)
    for r in range(4):
        one = slice(r, r + 1)
        alone = policy.law(x[one], steps[one], Answer(answer.output[one]), scale[one])
        torch.testing.assert_close(law.mean[one], alone.mean)
        torch.testing.assert_close(law.std[one].flatten(), torch.as_tensor(alone.std).flatten().float())
    assert type(law).__name__ == "CPSTransition"


def test_the_intensity_of_our_solvers_multiplies_g() -> None:
    """Std of a small exp step: sqrt(2 eps h); twice the intensity is four times eps."""
    times = np.linspace(0.0, 1.0, 201).tolist()
    kernel = solver_kernel(
        make_solver("em", path=make_interpolant("linear"), prediction_type="velocity", times=times,
                    diffusion=Diffusion("sigma", 0.5))
    )  # fmt: skip
    x, output = randn(1, (1, 2)), randn(2, (1, 2))
    assert float(kernel(2.0)(100, x, output).std) == pytest.approx(2 * float(kernel(1.0)(100, x, output).std))
    own = StochasticInterpolantScheduler(solver="exp")
    own.set_timesteps(6)
    law = scheduler_kernel(own)(1.0)
    assert not law(1, x, output).is_deterministic
    assert law(5, x, output).is_deterministic


def test_ddpm_without_noise_is_ddim_of_the_same_levels() -> None:
    x, output = randn(1, (2, 6)), randn(2, (2, 6))
    ours = scheduler_kernel(ddim(cls=DDPMScheduler))
    eta0 = scheduler_kernel(ddim())
    for i in range(4):
        torch.testing.assert_close(ours(0.0)(i, x, output).mean, eta0(0.0)(i, x, output).mean)
    with pytest.raises(ValueError, match="no noise intensity"):
        ours(1.5)


def test_refusals_name_the_argument() -> None:
    grid = scheduler(4)
    with pytest.raises(ValueError, match="scale=0"):
        scheduler_kernel(grid, scale=0.0)
    with pytest.raises(ValueError, match="eta=0"):
        scheduler_kernel(ddim(), eta=0.0)
    with pytest.raises(ValueError, match=r"takes eta to 1\.5"):
        scheduler_kernel(ddim())(1.5)
    with pytest.raises(ValueError, match="takes scale to"):
        scheduler_kernel(grid, diffusion="cps", scale=0.9)(1.5)
    with pytest.raises(ValueError, match=r"solver=.ddim."):
        solver_kernel(
            make_solver(
                "ddim", path=make_interpolant("linear"), prediction_type="velocity", times=[0.0, 0.5, 1.0]
            )
        )
    with pytest.raises(ValueError, match="carries state"):
        tiny_policy(guidance=CFG(3.0, projection=Projection(momentum=-0.5)))
    policy = tiny_policy()
    with pytest.raises(ValueError, match="at least three"):
        Policy(policy.denoiser, policy.kernel, [0.0, 1.0])


def test_guidance_is_the_policy_and_its_null_branch_is_detached_by_default() -> None:
    """The trained output is null + s (cond - null); with the null branch held fixed its label gets no gradient."""
    x, steps, prompts = randn(1, (3, 6)), np.zeros(3, dtype=np.int64), np.arange(3)
    null_row, used = {}, {}
    for detach in (True, False):
        policy = tiny_policy(guidance=CFG(3.0), detach_null=detach)
        guided = policy.answer(x, steps, prompts, grad=True).output
        guided.sum().backward()
        table = policy.denoiser.nets["main"].table.grad
        null_row[detach], used[detach] = table[4].abs().sum(), table[:3].abs().sum()
        plain = policy.answer(x, steps, prompts).output
        torch.testing.assert_close(guided.detach(), plain, rtol=0, atol=1e-6)
    assert null_row[True] == 0
    assert null_row[False] > 0
    assert used[True] > 0


def test_other_nets_are_guided_as_the_main_one_is() -> None:
    other = TinyFlow(6, seed=9)
    policy = tiny_policy(guidance=CFG(2.0), nets={"reference": other, "old": other})
    alone = tiny_policy(guidance=CFG(2.0))
    alone.denoiser.nets["main"] = other
    x, steps, prompts = randn(1, (3, 6)), np.zeros(3, dtype=np.int64), np.arange(3)
    expected = alone.answer(x, steps, prompts).output
    assert torch.equal(policy.answer(x, steps, prompts, net="reference").output, expected)
    assert torch.equal(policy.answer(x, steps, prompts, net="old").output, expected)
    assert not torch.equal(policy.answer(x, steps, prompts).output, expected)


@pytest.mark.parametrize("family", ["ours", "sd", "sd3", "flux", "ddpm"])
def test_a_tree_of_every_model_family(family: str) -> None:
    """Real classes with random weights: a tree of four leaves, counted, and a gradient in the network."""
    make = {
        "ours": lambda: (tiny_pipeline(), {"class_labels": [1]}),
        "sd": lambda: (tiny_sd(), {"prompt": ["a"]}),
        "sd3": lambda: (tiny_sd3(), {"prompt": ["a"]}),
        "flux": lambda: (tiny_flux(), {"prompt": ["a"]}),
        "ddpm": lambda: (tiny_ddpm(), {"num_samples": 1}),
    }
    pipe, options = make[family]()
    denoiser = denoiser_from_pipeline(pipe, **options)
    if family == "ours":
        policy = Policy.from_solver(denoiser, 3)
    else:
        policy = Policy.from_scheduler(denoiser, 3)
    plan = branch(steps=3, splits=(0, 1)).at(0)
    rollout = trees(policy, plan, 1, keep_outputs=True)
    assert rollout.evaluations == plan.rollout_evaluations == 1 + 2 + 4
    assert bool(torch.isfinite(rollout.final).all())
    answer = policy.answer(
        rollout.levels[1], np.ones(2, dtype=np.int64), np.zeros(2, dtype=np.int64), grad=True
    )
    answer.output.square().sum().backward()
    assert gradient(policy).abs().sum() > 0


def test_dynamic_trees_need_room_for_their_growth() -> None:
    policy = gaussian_policy(8, diffusion="flow")
    plan = dynamic_tree(steps=8, depth=3, growth=0.5).at(0)
    spread = policy.spreads(plan)
    flat = policy.spreads(dynamic_tree(steps=8, depth=3, growth=0.0).at(0))
    np.testing.assert_allclose(spread[:3] / flat[:3], [1.0, 1 + 0.5 / 3, 1 + 1.0 / 3], rtol=1e-6)
    assert (spread[3:] == 0).all()
    assert isinstance(policy.denoiser.scheduler, FlowMatchEulerDiscreteScheduler)
