"""Walking one path: ``gensample.sample`` and its step iterator ``gensample.stream``.

One loop serves every model, solver and guidance rule: a denoiser answers, guidance combines the answers, a solver
moves the state.  The model is a live Diffusers pipeline, one of ours, or a ``Denoiser``.

Shapes: B = samples, ... = latent shape; latents: (B, ...) float32; images: (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gensample.denoisers import Conditioning, Denoiser, denoiser_from_pipeline
from gensample.guidance import DenoiserCalls, Guidance
from gensample.noise import GeneratorLike, NoiseStream
from gensample.schedulers.finite import FiniteGuard
from gensample.schedulers.solver_adapter import SchedulerSolver
from gensample.schedulers.step_noise import queued_to
from gensample.solvers import (
    STOCHASTIC_SOLVERS,
    Diffusion,
    Solver,
    SolverState,
    advance,
    default_steps,
    noise_level,
    solver_over,
)

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class StepState:
    """The walk after one step.  Assigning to ``latents`` changes what the next step starts from.

    step: 0, ..., num_steps - 1; time: in [0, 1], where the latents stand (1 is data); output, at: the last network
    answer and the (latents, time) it was given at; info: the guidance rule's diagnostics.
    """

    step: int
    num_steps: int
    time: float
    latents: Tensor
    output: Tensor
    at: tuple[Tensor, float]
    denoiser: Denoiser
    info: dict[str, Tensor] = field(default_factory=dict)

    @property
    def x0(self) -> Tensor:
        """The model's current guess of the clean sample, (B, ...): what live previews show."""
        x, t = self.at
        return self.denoiser.field(self.output, x, t, "x0")

    def preview(self) -> Tensor:
        """``x0`` decoded to images (B, C, H, W) in [0, 1]."""
        return self.denoiser.decode(self.x0)


@dataclass(frozen=True)
class SampleOutput:
    """images: PIL list, (B, H, W, C) array or (B, C, H, W) tensor in [0, 1] (None for ``output_type="latent"``);
    latents: (B, ...); evaluations: rows the network evaluated in all."""

    images: Any
    latents: Tensor
    evaluations: int


class _Evaluations:
    """The network under guidance, as a solver asks for it; remembers the last answer and where it was given."""

    def __init__(self, denoiser: Denoiser, cond: Conditioning, guidance: Guidance | None) -> None:
        self._denoise, self._cond, self._guidance = DenoiserCalls(denoiser), cond, guidance
        self._memory: object = None
        self.output: Tensor
        self.at: tuple[Tensor, float]
        self.info: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.at = x, t
        if self._guidance is None:
            self.output = self._denoise(x, t, self._cond)
        else:
            guided = self._guidance(x, t, self._denoise, self._cond, self._memory)
            self.output, self._memory, self.info = guided.output, guided.state, guided.info
        return self.output


class _Draws:
    """Standard normals (B, ...) of ``step``, from stream (seed, sample, path=(step,), "step")."""

    def __init__(self, noise: NoiseStream, latents: Tensor) -> None:
        self._noise, self._latents, self.step = noise, latents, 0

    def __call__(self) -> Tensor:
        noise = self._noise.normal(self._latents.shape[1:], path=(self.step,), purpose="step")
        return queued_to(noise, self._latents.device)


@torch.no_grad()
def walk(
    denoiser: Denoiser,
    cond: Conditioning,
    solver: Solver,
    latents: Tensor,
    noise: NoiseStream,
    guidance: Guidance | None = None,
) -> Iterator[StepState]:
    """Yield a :class:`StepState` after every step of ``solver``, from ``latents`` at solver.times[0].

    Noise of step i is drawn from stream (seed, sample, path=(i,), "step").  Raises FloatingPointError naming step,
    noise level and sample when outputs or latents stop being finite.
    """
    num_steps = len(solver.times) - 1
    num_stages = len(solver.stage_times)
    evaluate, draw = _Evaluations(denoiser, cond, guidance), _Draws(noise, latents)
    guard = FiniteGuard()
    state = SolverState()
    x = latents
    for step in range(num_steps):
        draw.step = step
        x, state = advance(solver, x, state, evaluate, draw)
        sigma = float(noise_level(solver.path, evaluate.at[1]))
        guard.check(evaluate.output, step, sigma, last=state.stage == num_stages)
        if step == num_steps - 1:
            _check_final(x)
        at = evaluate.at
        reached = StepState(
            step, num_steps, solver.times[step + 1], x, evaluate.output, at, denoiser, evaluate.info
        )
        yield reached
        x = reached.latents


@torch.no_grad()
def run(
    denoiser: Denoiser, cond: Conditioning, solver: Solver, latents: Tensor, noise: NoiseStream,
    guidance: Guidance | None = None, progress: Callable[[], object] | None = None,
) -> Tensor:  # fmt: skip
    """The latents (B, ...) at the end of :func:`walk`, without stopping between steps.

    ``progress`` is called after every step.  Outputs that are not finite are looked for together, once a few megabytes
    of them have passed, and named as by ``walk``.
    """
    draw, guard, denoise = _Draws(noise, latents), FiniteGuard(), denoiser.denoise
    guided = None if guidance is None else _Evaluations(denoiser, cond, guidance)
    rescaled = type(solver).network_input is not Solver.network_input
    update, path, steps = solver.update, solver.path, solver.step_of_stage
    state, x, room = SolverState(), latents, guard.room(latents)
    for stage, t in enumerate(solver.stage_times):
        draw.step = steps[stage]
        seen = solver.network_input(x, stage) if rescaled else x
        output = denoise(seen, t, cond).output if guided is None else guided(seen, t)
        x, state = update(x, output, state, draw)
        guard.keep(output, steps[stage], t, path)
        if stage % room == room - 1:
            guard.look(x, path)
        if progress is not None and steps[stage : stage + 2] != (steps[stage],) * 2:
            progress()
    guard.look(x, path, last=True)
    _check_final(x)
    return x


def _check_final(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        sample = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
        raise FloatingPointError(f"the last step left sample {sample} with values that are not finite")


def stream(
    model: Any,
    *,
    num_samples: int | None = None,
    num_inference_steps: int | None = None,
    guidance: Guidance | None = None,
    solver: str | Solver | None = None,
    diffusion: Diffusion | None = None,
    generator: GeneratorLike = None,
    sample_ids: Sequence[int] | None = None,
    latents: Tensor | None = None,
    **conditioning: Any,
) -> Iterator[StepState]:
    """Sample one batch, yielding after every step; closing the iterator cancels.

    Arguments as :func:`sample`.  Everything is checked before the first network call.
    """
    denoiser = as_denoiser(model, num_samples, conditioning)
    return walk(
        *_prepared(denoiser, num_inference_steps, guidance, solver, diffusion, generator, sample_ids, latents)
    )


def sample(
    model: Any,
    *,
    num_samples: int | None = None,
    num_inference_steps: int | None = None,
    guidance: Guidance | None = None,
    solver: str | Solver | None = None,
    diffusion: Diffusion | None = None,
    generator: GeneratorLike = None,
    sample_ids: Sequence[int] | None = None,
    latents: Tensor | None = None,
    output_type: OutputType = "pil",
    callback: Callable[[StepState], None] | None = None,
    progress: bool = True,
    **conditioning: Any,
) -> SampleOutput:
    """Draw samples from a live Diffusers pipeline, one of ours, or a ``Denoiser``.

    model: a pipeline (``conditioning`` are its own prompt arguments, such as ``prompt=``, ``negative_prompt=``,
        ``height=`` or ``class_labels=``) or a Denoiser with its conditioning bound.
    num_samples: for unconditional models; otherwise the conditioning says how many.
    num_inference_steps: default the published number for a published sampler, else 32.
    guidance: a rule of ``gensample.guidance``; None is the plain conditional model.
    solver: a name of ``gensample.solvers.SOLVERS``, a published sampler of ``gensample.solvers.PRESETS``, a Solver
        (with its own times: ``num_inference_steps`` is not read), or None for the pipeline's own scheduler.
    diffusion: of a stochastic solver; see ``gensample.solvers.Diffusion``.
    generator, sample_ids: the noise; see ``NoiseStream.from_generator``.
    latents: initial noise (B, ...) instead of drawn noise.
    callback: called with every StepState.

    Raises ValueError for bad arguments and FloatingPointError if latents stop being finite.
    """
    checked_output_type(output_type)
    denoiser = as_denoiser(model, num_samples, conditioning)
    before = denoiser.evaluations
    ready = _prepared(
        denoiser, num_inference_steps, guidance, solver, diffusion, generator, sample_ids, latents
    )
    with tqdm(disable=not progress, total=len(ready[2].times) - 1) as bar:
        if callback is None:
            final = run(*ready, progress=bar.update if progress else None)
        else:
            for state in walk(*ready):
                callback(state)
                final = state.latents
                bar.update()
    images = None if output_type == "latent" else to_output(denoiser.decode(final), output_type)
    return SampleOutput(images, final, denoiser.evaluations - before)


Ready = tuple[Denoiser, Conditioning, Solver, Tensor, NoiseStream, Guidance | None]


def _prepared(
    denoiser: Denoiser, num_inference_steps: int | None, guidance: Guidance | None, solver: str | Solver | None,
    diffusion: Diffusion | None, generator: GeneratorLike, sample_ids: Sequence[int] | None, latents: Tensor | None,
) -> Ready:  # fmt: skip
    """The arguments of :func:`walk`, checked."""
    if guidance is not None and not callable(guidance):
        raise TypeError(
            f"guidance={guidance!r} must be a rule, such as CFG({guidance!r}) of gensample.guidance"
        )
    cond = denoiser.conditioning
    noise = NoiseStream.from_generator(generator, cond.batch_size, sample_ids=sample_ids)
    chosen = choose_solver(denoiser, solver, num_inference_steps, diffusion, noise)
    start = initial_latents(denoiser, chosen, noise, latents)
    return denoiser, cond, chosen, start, noise, guidance


def as_denoiser(model: Any, num_samples: int | None, conditioning: dict[str, Any]) -> Denoiser:
    """``model`` itself if it is a Denoiser, else the denoiser of a live pipeline with its conditioning bound."""
    if isinstance(model, Denoiser):
        if conditioning or num_samples is not None:
            extra = sorted(conditioning) + (["num_samples"] if num_samples is not None else [])
            raise ValueError(
                f"{extra} cannot be given with a Denoiser: bind its conditioning when building it"
            )
        return model
    if num_samples is not None:
        conditioning = {**conditioning, "num_samples": num_samples}
    return denoiser_from_pipeline(model, **conditioning)


def choose_solver(
    denoiser: Denoiser,
    solver: str | Solver | None,
    num_inference_steps: int | None,
    diffusion: Diffusion | None,
    noise: NoiseStream,
) -> Solver:
    """The solver a caller asked for, over the time grid of the denoiser's own scheduler; steps as in :func:`sample`."""
    if num_inference_steps is None:
        num_inference_steps = default_steps(solver)
    if isinstance(solver, Solver):
        if diffusion is not None:
            raise ValueError("diffusion is part of a Solver object; give it to make_solver instead")
        if (solver.path, solver.prediction_type) != (denoiser.path, denoiser.prediction_type):
            raise ValueError(
                f"this solver integrates {solver.prediction_type!r} on {solver.path}, the model answers "
                f"{denoiser.prediction_type!r} on {denoiser.path}; make it with the denoiser's path and prediction_type"
            )
        return solver
    if solver is None and denoiser.scheduler is not None:
        if diffusion is not None:
            raise ValueError(f"diffusion={diffusion} needs solver= one of {STOCHASTIC_SOLVERS}")
        scheduler = denoiser.prepared_scheduler(num_inference_steps)
        own = getattr(scheduler, "solver", None)  # of our schedulers
        if isinstance(own, Solver):
            return own
        return SchedulerSolver(
            scheduler,
            path=denoiser.path,
            prediction_type=denoiser.prediction_type,
            stage_times=[denoiser.time(float(t)) for t in scheduler.timesteps],
            generators=noise.torch_generators(purpose="scheduler"),
        )
    return solver_over(
        solver or "euler", denoiser.times, num_inference_steps, path=denoiser.path,
        prediction_type=denoiser.prediction_type, diffusion=diffusion,
    )  # fmt: skip


def initial_latents(denoiser: Denoiser, solver: Solver, noise: NoiseStream, latents: Tensor | None) -> Tensor:
    """The state at the first time, (B, ...) float32 on the denoiser's device."""
    expected = (len(noise), *denoiser.latent_shape)
    if latents is None:
        latents = noise.normal(denoiser.latent_shape, purpose="init")
    elif tuple(latents.shape) != expected:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; this model and batch need {expected}")
    return solver.initial(latents.to(denoiser.device, torch.float32))


def checked_output_type(output_type: str) -> None:
    """Raise ValueError unless ``output_type`` is one of "pil", "np", "pt", "latent"."""
    if output_type not in get_args(OutputType):
        raise ValueError(f"output_type={output_type!r} is unknown; use one of {get_args(OutputType)}")


def to_output(images: Tensor, output_type: OutputType) -> Any:
    """Images (B, C, H, W) in [0, 1] as PIL images, a (B, H, W, C) array or the tensor itself."""
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return array if output_type == "np" else images_to_pil(array)


def images_to_pil(array: np.ndarray) -> list[Any]:
    """(B, H, W, C) floats in [0, 1] as a list of PIL images, grey for C = 1; values are rounded, not truncated."""
    from PIL import Image

    pixels = (array * 255.0).round().clip(0, 255).astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
