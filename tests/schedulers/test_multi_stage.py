"""StochasticInterpolantScheduler with every solver and with two-sided models: layouts, edits, clocks, waiting."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gensample.denoisers import Denoiser
from gensample.interpolants import make_two_sided
from gensample.sampling import sample
from gensample.schedulers.interpolant import StochasticInterpolantScheduler
from gensample.solvers import SOLVERS, STOCHASTIC_SOLVERS, make_solver, stages_per_step

SEVERAL = tuple(name for name in SOLVERS if stages_per_step(name) > 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(x: Tensor, t: Tensor | float) -> Tensor:
    return torch.tanh(x) * t / (t + 1.0)


def run(scheduler: Any, x: Tensor, steps: int = 6, network: Any = model) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


# ---- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SEVERAL)
@pytest.mark.parametrize("inverted", [False, True])
def test_every_order_steps_of_timesteps_are_one_step(solver: str, inverted: bool) -> None:
    """Entry k order starts step k, at the level of a one-stage scheduler; midpoints lie half-way in sigma."""
    clock = {"invert_sigmas": True, "num_train_timesteps": 1} if inverted else {}
    ours = StochasticInterpolantScheduler(solver=solver, shift=3.0, **clock)
    euler = StochasticInterpolantScheduler(shift=3.0, **clock)
    for scheduler in (ours, euler):
        scheduler.set_timesteps(5)
    assert torch.equal(ours.timesteps[:: ours.order], euler.timesteps)
    scale = 1.0 if inverted else 1000.0
    times = np.array(ours.solver.stage_times)
    expected = times if inverted else 1.0 - times
    np.testing.assert_allclose(ours.timesteps.numpy(), scale * expected, rtol=1e-5, atol=1e-4)
    for k in range(5):
        ours.set_begin_index(k * ours.order)
        assert ours.index_for_timestep(ours.timesteps[k * ours.order]) == k * ours.order
    with pytest.raises(ValueError, match=f"multiple of order={ours.order}"):
        ours.set_begin_index(1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scheduler_draws_what_sample_draws(solver: str) -> None:
    """The same solver, noise and network through a pipeline's loop and through gensample.sample."""
    scheduler = StochasticInterpolantScheduler(solver=solver, seed=5)
    denoiser = Denoiser.from_model(
        lambda x, timestep: model(x, timestep[0]), latent_shape=(3, 4, 4), num_samples=2, scheduler=scheduler
    )
    x = noise(2, 3, 4, 4)
    drawn = sample(
        denoiser, num_inference_steps=6, latents=x, generator=5, output_type="latent", progress=False
    ).latents
    torch.testing.assert_close(run(scheduler, x), drawn, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", SEVERAL)
def test_replaced_latents_warn_between_stages_only(solver: str) -> None:
    scheduler = StochasticInterpolantScheduler(solver=solver, seed=0)
    scheduler.set_timesteps(3)
    t, order = scheduler.timesteps, scheduler.order
    x = noise(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(order):
            x = scheduler.step(noise(1, 2), t[i], x).prev_sample
        x = scheduler.step(
            noise(1, 2), t[order], 2 * x
        ).prev_sample  # an inpainting pipeline, after a whole step
    with pytest.warns(UserWarning, match=f"between the stages of a {solver} step"):
        scheduler.step(noise(1, 2), t[order + 1], x + 1)


def test_a_network_s_own_timesteps_are_interpolated_between_levels() -> None:
    scheduler = StochasticInterpolantScheduler(path="gvp", prediction_type="v_prediction", solver="midpoint")
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25], timesteps=[999, 400, 100])
    assert scheduler.timesteps.tolist() == pytest.approx([999, 699.5, 400, 250, 100, 50])


# ---- waiting and operations ---------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_step_but_the_last_reads_a_device_tensor(solver: str) -> None:
    """On the meta device any value read back to the host raises; on it operations a stage are counted, too."""
    scheduler = StochasticInterpolantScheduler(solver=solver, seed=0)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = torch.empty(2, 3, 4, 4, device="meta")
    output = torch.empty_like(x)
    first, *between, _ = scheduler.timesteps
    x = scheduler.step(output, first, x, return_dict=False)[0]
    with Counting() as counting:
        for t in between:
            x = scheduler.step(output, t, x, return_dict=False)[0]
    assert "_local_scalar_dense" not in counting.names
    limit = {"euler": 3, "ddim": 4}.get(solver, 16)  # FlowMatchEuler: 5
    assert len(counting.names) <= limit * len(between)


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_an_sde_step_asks_the_network_once_a_stage(solver: str) -> None:
    calls: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return model(x, t)

    run(StochasticInterpolantScheduler(solver=solver, seed=0), noise(1, 2, 4, 4), 5, network)
    assert len(calls) == 5 * stages_per_step(solver)


# ---- two-sided models ---------------------------------------------------------------------------------------------


def two_sided(**options: Any) -> StochasticInterpolantScheduler:
    options = {
        "prediction_type": "velocity+noise",
        "gamma": "brownian",
        "solver": "sheun",
        "seed": 2,
        **options,
    }
    return StochasticInterpolantScheduler(**options)


def heads(x: Tensor, t: Tensor | float) -> Tensor:
    return torch.cat([model(x, t), 0.3 * torch.sin(x)], dim=1)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("exp2m", "ddim")])
@pytest.mark.parametrize("path", ["linear", "trig", "encoding_decoding", "mirror", "point_source"])
def test_two_sided_networks_of_stacked_heads(path: str, solver: str, tmp_path: Path) -> None:
    gamma = {"encoding_decoding": "sin2", "point_source": "foellmer"}.get(path, "brownian")
    scheduler = two_sided(path=path, solver=solver, gamma=gamma, gamma_scale=0.7)
    scheduler.save_pretrained(tmp_path)
    again = StochasticInterpolantScheduler.from_pretrained(tmp_path)
    assert again.path == scheduler.path == make_two_sided(path, gamma=gamma, scale=0.7)
    base = noise(2, 3, 4, 4)
    drawn = run(scheduler, base, network=heads)
    assert torch.isfinite(drawn).all()
    assert torch.equal(run(again, base, network=heads), drawn)


def test_a_two_sided_scheduler_is_its_denoiser_s_process() -> None:
    scheduler = two_sided()
    denoiser = Denoiser.from_model(
        lambda x, timestep: heads(x, timestep[0]), latent_shape=(3, 4, 4), num_samples=2, scheduler=scheduler
    )
    assert (denoiser.path, denoiser.prediction_type) == (scheduler.path, "velocity+noise")
    base = noise(2, 3, 4, 4)
    drawn = sample(
        denoiser, num_inference_steps=6, latents=base, generator=2, output_type="latent", progress=False
    ).latents
    torch.testing.assert_close(run(scheduler, base, network=heads), drawn, rtol=1e-6, atol=1e-6)


def test_two_sided_transitions_and_shapes() -> None:
    scheduler = two_sided(solver="exp")
    scheduler.set_timesteps(5)
    x, output = noise(2, 3, 4, 4), noise(2, 6, 4, 4, seed=1)
    law = scheduler.transition(torch.tensor([1, 3]), x, output)
    assert law.log_prob(x).shape == (2,)
    with pytest.raises(ValueError, match="channels on dimension 1"):
        scheduler.step(noise(2, 3, 4, 4), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="mixes a base, data and noise"):
        scheduler.scale_noise(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"path": "trig"}, r"path='trig'.*two-sided paths need gamma="),
        ({"path": "gvp", "gamma": "sin2"}, "path='gvp' with gamma='sin2'"),
        ({"gamma": "sine", "prediction_type": "velocity"}, "gamma kind='sine'"),
        ({"gamma": "sin2"}, "prediction_type='flow_prediction'"),
        ({"last_step": "mean", "solver": "exp"}, "last_step='mean'"),
        ({"last_step_size": 1.5}, r"last_step_size=1\.5"),
        ({"diffusion_cost": 0.5}, r"cost=0\.5"),
    ],
)
def test_bad_two_sided_configurations(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StochasticInterpolantScheduler(**config)


# ---- configurations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["sbdm", "polynomial"])
def test_further_paths_walk_to_the_data(path: str) -> None:
    scheduler = StochasticInterpolantScheduler(
        path=path, prediction_type="sample", solver="exp", path_power=1.0, seed=0
    )
    x0 = noise(1, 2, 4, 4, seed=3)
    assert torch.equal(run(scheduler, noise(1, 2, 4, 4), network=lambda x, t: x0), x0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["velocity", "flow_prediction"])
def test_a_velocity_starts_where_the_path_stands_still(solver: str, kind: str) -> None:
    """The polynomial path's Wronskian is 0 at t = 0: the velocity gives no x0 there, and a step needs none."""
    scheduler = StochasticInterpolantScheduler(path="polynomial", prediction_type=kind, solver=solver)
    scheduler.set_timesteps(5)
    x, output = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1)
    h = (1.0 if kind == "velocity" else -1.0) * scheduler.solver.times[1]
    moved = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(moved, x + h * output)
    denoiser = Denoiser.from_model(
        lambda x, t: torch.full_like(x, 0.5),
        latent_shape=(2, 4, 4),
        path=scheduler.path,
        prediction_type=kind,
    )
    drawn = sample(denoiser, solver=solver, latents=x, output_type="latent", progress=False).latents
    torch.testing.assert_close(drawn, x + (0.5 if kind == "velocity" else -0.5))


def test_new_keys_survive_flow_matching_and_back() -> None:
    ours = two_sided(path="trig", diffusion="constant", last_step_size=0.1, shift=2.0)
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    again = StochasticInterpolantScheduler.from_config(back.config)
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: v for k, v in ours.config.items() if not k.startswith("_")
    }


def test_the_last_step_size_is_the_last_level_before_shifting() -> None:
    scheduler = StochasticInterpolantScheduler(last_step_size=0.04)
    scheduler.set_timesteps(50)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*np.linspace(1, 0.04, 50), 0.0]).float())


def test_the_scheduler_s_solver_is_the_named_solver() -> None:
    scheduler = StochasticInterpolantScheduler(solver="strang", diffusion="sin2", diffusion_scale=0.5)
    scheduler.set_timesteps(7)
    solver = make_solver(
        "strang", path=scheduler.path, prediction_type="flow_prediction", times=scheduler.solver.times,
        diffusion=scheduler.solver.diffusion,
    )  # fmt: skip
    assert solver.stage_times == scheduler.solver.stage_times
    assert solver.diffusion is not None
    assert (solver.diffusion.kind, solver.diffusion.scale) == ("sin2", 0.5)
