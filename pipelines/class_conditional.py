"""Class-conditional image generation in pixel space, as a Diffusers pipeline over ``gensample.sampling.walk``.

Shapes: B = images, C = channels, H = W = the transformer's sample_size; latents (B, C, H, W) in [-1, 1] at the
data; images (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from gensample.denoisers import Conditioning, Denoiser, denoiser_from_pipeline
from gensample.denoisers.labels import Labels
from gensample.guidance import CFG, Denoise, Guidance, Guided
from gensample.models.dit import DiT
from gensample.noise import GeneratorLike, NoiseStream
from gensample.sampling import (
    OutputType,
    StepState,
    checked_output_type,
    choose_solver,
    initial_latents,
    to_output,
    walk,
)
from gensample.solvers import Diffusion, Solver

StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of given classes with our :class:`~gensample.models.dit.DiT`.

    Args:
        transformer: the network; its null label is index ``num_classes``.
        scheduler: a ``StochasticInterpolantScheduler``, or any Diffusers scheduler for the process that the
            transformer was trained on. It is only read: every call walks a copy.
        class_names: one name per class, usable as labels; None for indices only.

    Raises ValueError where class_names and the transformer disagree on the number of classes.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None) -> None:
        """See the class."""
        super().__init__()
        names = list(class_names or [])
        if names and len(set(names)) != transformer.config.num_classes:
            raise ValueError(
                f"class_names has {len(set(names))} different names for {transformer.config.num_classes} classes"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(class_names=names)
        self.labels = {name: index for index, name in enumerate(names)}
        self._guidance_scale = 1.0
        self._guidance: Guidance | None = None
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; a callback may set it, from the next step on."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._guidance_scale = CFG(scale).scale

    @property
    def guidance(self) -> Guidance:
        """The rule in force: the one given to the call, else ``CFG(guidance_scale)``; a callback may set it."""
        return self._guidance if self._guidance is not None else CFG(self._guidance_scale)

    @guidance.setter
    def guidance(self, rule: Guidance | None) -> None:
        self._guidance = rule

    @property
    def num_timesteps(self) -> int:
        """Steps of the present or last call, for one batch."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to end the run after the present step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        *,
        guidance: Guidance | None = None,
        solver: str | Solver | None = None,
        diffusion: Diffusion | None = None,
        generator: GeneratorLike = None,
        sample_ids: Sequence[int] | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image per label.

        Args:
            class_labels: an index, a name of ``class_names``, or a list of these.
            num_inference_steps: steps; every step is one network call per image (two with guidance or Heun). Default
                the published number for a published sampler, else 32.
            guidance_scale: classifier-free guidance; 1 is the conditional model, 0 the unconditional one.
            guidance: a rule of ``gensample.guidance`` instead of ``guidance_scale``.
            solver: a name of ``gensample.solvers.SOLVERS`` or ``PRESETS``, a Solver, or None: the scheduler.
            diffusion: of a stochastic ``solver``.
            generator: int, ``torch.Generator``, or a list of one per image; see ``NoiseStream``.
            sample_ids: number the images of one seed: images 3, 4, 5 of a run are the same in any batch.
            latents: initial noise (B, C, H, W) instead of drawn noise.
            batch_size: images per network call; default all. The images do not depend on it.
            output_type: "pil", "np" (B, H, W, C), "pt" (B, C, H, W), or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, kwargs)`` after every step of every
                batch; a "latents" entry of the dict it returns replaces the batch's latents.
            callback_on_step_end_tensor_inputs: what ``kwargs`` holds; of ``pipe._callback_tensor_inputs``.

        Returns:
            ``ImagePipelineOutput`` with ``images``. After an interrupt: of the batches begun so far.

        Raises:
            ValueError: for bad arguments, before the first network call.
            FloatingPointError: if latents stop being finite.
        """
        checked_output_type(output_type)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}; use {self._callback_tensor_inputs}"
            )
        denoiser, noise = self._prepare(
            class_labels, guidance_scale, guidance, generator, sample_ids, latents
        )
        batches = _batches(len(noise), batch_size)
        finished: list[Tensor] = []
        self._interrupt = False
        start = partial(self._start, denoiser, noise, solver, num_inference_steps, diffusion, latents)
        walks = chain([start(batches[0])], map(start, batches[1:]))  # the first one checks every argument
        with self.progress_bar(total=len(batches) * self._num_timesteps) as bar:
            for states in walks:
                if self._interrupt:
                    break
                for state in states:
                    if callback_on_step_end is not None:
                        self._call_back(callback_on_step_end, state, callback_on_step_end_tensor_inputs)
                    final = state.latents
                    bar.update()
                    if self._interrupt:
                        break
                finished.append(final)
        result = torch.cat(finished)
        images = result if output_type == "latent" else to_output(denoiser.decode(result), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def stream(
        self,
        class_labels: Labels,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        *,
        guidance: Guidance | None = None,
        solver: str | Solver | None = None,
        diffusion: Diffusion | None = None,
        generator: GeneratorLike = None,
        sample_ids: Sequence[int] | None = None,
        latents: Tensor | None = None,
    ) -> Iterator[StepState]:
        """Draw one batch, yielding a :class:`~gensample.sampling.StepState` after every step.

        Arguments as :meth:`__call__`, checked before this returns. ``state.preview()`` is the present guess of
        the images, and ``denoiser.decode(state.latents)`` of the last state the result; closing the iterator
        cancels the run. ``guidance_scale``, ``guidance`` and ``state.latents`` may be set between steps.
        """
        denoiser, noise = self._prepare(
            class_labels, guidance_scale, guidance, generator, sample_ids, latents
        )
        rows = slice(0, len(noise))
        return self._freeing(
            self._start(denoiser, noise, solver, num_inference_steps, diffusion, latents, rows)
        )

    def _prepare(
        self,
        class_labels: Labels,
        guidance_scale: float,
        guidance: Guidance | None,
        generator: GeneratorLike,
        sample_ids: Sequence[int] | None,
        latents: Tensor | None,
    ) -> tuple[Denoiser, NoiseStream]:
        if guidance is not None and guidance_scale != 1.0:
            raise ValueError(f"give guidance_scale={guidance_scale} or guidance={guidance!r}, not both")
        self.guidance_scale, self.guidance = guidance_scale, guidance
        denoiser = denoiser_from_pipeline(self, class_labels=class_labels)
        count = denoiser.conditioning.batch_size
        if latents is not None and len(latents) != count:
            raise ValueError(f"latents has {len(latents)} rows for {count} labels; give one per image")
        return denoiser, NoiseStream.from_generator(generator, count, sample_ids=sample_ids)

    def _start(
        self,
        denoiser: Denoiser,
        noise: NoiseStream,
        solver: str | Solver | None,
        num_inference_steps: int | None,
        diffusion: Diffusion | None,
        latents: Tensor | None,
        rows: slice,
    ) -> Iterator[StepState]:
        """The walk of some rows, not yet begun; every argument is checked here."""
        part = noise.select(rows)
        chosen = choose_solver(denoiser, solver, num_inference_steps, diffusion, part)
        self._num_timesteps = len(chosen.times) - 1
        start = initial_latents(denoiser, chosen, part, None if latents is None else latents[rows])
        return walk(denoiser, denoiser.conditioning.rows(rows), chosen, start, part, _InForce(self))

    def _call_back(self, callback: Any, state: StepState, names: Sequence[str]) -> None:
        kwargs = {name: getattr(state, name) for name in names}
        returned = callback(self, state.step, state.denoiser.timestep(state.at[1]), kwargs)
        state.latents = (returned or {}).get("latents", state.latents)

    def _freeing(self, states: Iterator[StepState]) -> Iterator[StepState]:
        try:
            yield from states
        finally:
            self.maybe_free_model_hooks()


class _InForce:
    """The pipeline's guidance as it stands at each step, so that callbacks can change it."""

    def __init__(self, pipe: ClassConditionalPipeline) -> None:
        self._pipe = pipe

    @property
    def has_memory(self) -> bool:
        return self._pipe.guidance.has_memory

    def __call__(
        self, x: Tensor, t: float | Tensor, denoise: Denoise, cond: Conditioning, state: object
    ) -> Guided:
        return self._pipe.guidance(x, t, denoise, cond, state)


def _batches(count: int, batch_size: int | None) -> list[slice]:
    if batch_size is None:
        return [slice(0, count)]
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size!r} must be a whole number of at least 1 (None: all at once)"
        )
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
