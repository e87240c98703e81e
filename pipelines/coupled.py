"""Image to image on interpolants between coupled samples: translation, inpainting, super-resolution.

Each is a Diffusers pipeline over ``gensample.sampling.sample``: the walk starts from a picture, not from noise, and the
scheduler is a ``StochasticInterpolantScheduler`` with a ``gamma`` (two-sided).  Trained by
``gensample.training.CoupledLoss``; recipes/fashion_translation.yaml and its neighbours.

Shapes: B = images, C = channels, H = W = the transformer's sample_size; states (B, C, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from gensample.denoisers import Denoiser, denoiser_from_pipeline
from gensample.denoisers.labels import Labels
from gensample.interpolants.couplings import enlarge, inpainting_base
from gensample.models.dit import DiT
from gensample.noise import GeneratorLike, NoiseStream
from gensample.sampling import OutputType, checked_output_type, sample
from gensample.solvers import PRESETS, SOLVERS, Diffusion, is_two_sided, make_solver


class _CoupledPipeline(DiffusionPipeline):
    """What the three share: their parts, reading pictures, and the walk."""

    model_cpu_offload_seq = "transformer"

    def __init__(
        self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None, **config: Any
    ) -> None:
        super().__init__()
        if not is_two_sided(getattr(scheduler, "path", None)):  # type: ignore[arg-type]
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} of a path from noise; this pipeline needs a "
                "StochasticInterpolantScheduler with gamma=, such as gamma='zero', prediction_type='velocity'"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names or []), **config)
        self.labels = {name: index for index, name in enumerate(class_names or [])}

    def _labels(self, class_labels: Labels | None, count: int) -> Labels:
        """The labels given, one for all repeated; without them the null label."""
        if class_labels is None:
            return [int(self.transformer.config.num_classes)] * count
        return [class_labels] * count if isinstance(class_labels, int | str) else class_labels

    @torch.no_grad()
    def _walk(
        self,
        denoiser: Denoiser,
        start: Tensor,
        num_inference_steps: int,
        *,
        solver: str | None,
        diffusion: Diffusion | None,
        generator: GeneratorLike,
        sample_ids: Sequence[int] | None,
        output_type: OutputType,
        return_dict: bool,
        backward: bool = False,
    ) -> Any:
        chosen: Any = solver
        if backward:
            if solver in PRESETS:
                raise ValueError(
                    f"solver={solver!r} is a published sampler, and those walk forward only; give one of {SOLVERS}, "
                    "with diffusion= for a stochastic one"
                )
            options: dict[str, Any] = {"diffusion": diffusion}
            if solver is None:  # the scheduler's own solver, with all that belongs to it
                own = self.scheduler.config
                solver, options["last_step"] = own.solver, own.last_step
                options["diffusion"] = diffusion or self.scheduler.diffusion
            chosen = make_solver(
                solver, path=denoiser.path, prediction_type=denoiser.prediction_type, backward=True,
                times=denoiser.times(num_inference_steps)[::-1], **options,
            )  # fmt: skip
            diffusion = None
        bar = not getattr(self, "_progress_bar_config", {}).get("disable", False)
        images = sample(
            denoiser, solver=chosen, diffusion=diffusion, num_inference_steps=num_inference_steps, latents=start,
            generator=generator, sample_ids=sample_ids, output_type=output_type, progress=bar,
        )  # fmt: skip
        self.maybe_free_model_hooks()
        result = images.latents if output_type == "latent" else images.images
        return ImagePipelineOutput(images=result) if return_dict else (result,)


class ImageTranslationPipeline(_CoupledPipeline):
    """Turns images of one kind into images of another, and back, on a two-sided interpolant.

    Args:
        transformer: the network, its heads (``velocity+noise`` for ODE and SDE) stacked on the channels.
        scheduler: a ``StochasticInterpolantScheduler`` with the path, gamma and heads that it was trained on.
        class_names: one name per class, or None.
        target_class: the label the network was trained with.
    """

    def __init__(
        self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None, target_class: int = 0
    ) -> None:  # fmt: skip
        """See the class."""
        super().__init__(transformer, scheduler, class_names, target_class=target_class)

    def __call__(
        self,
        images: Any,
        num_inference_steps: int = 32,
        *,
        backward: bool = False,
        solver: str | None = None,
        diffusion: Diffusion | None = None,
        generator: GeneratorLike = None,
        sample_ids: Sequence[int] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Translate ``images``.

        Args:
            images: uint8 or [0, 1] float (B, C, H, W), float (B, H, W, C) arrays, or PIL images.
            num_inference_steps: steps of the walk.
            backward: from target to source.
            solver: a name of ``gensample.solvers.SOLVERS``, or forward of ``PRESETS``; None is the scheduler's, with
                its diffusion and last step.  ODE solvers give one answer per image; stochastic ones another for every
                seed.
            diffusion: of a stochastic ``solver``; backward also instead of the scheduler's.
            generator, sample_ids: the noise of a stochastic solver; see ``NoiseStream``.
            output_type, return_dict: as ``ClassConditionalPipeline``.

        Raises ValueError for bad arguments, FloatingPointError if the walk stops being finite.
        """
        checked_output_type(output_type)
        start = states_of(images)
        denoiser = denoiser_from_pipeline(self, class_labels=[self.config.target_class] * len(start))
        return self._walk(
            denoiser, start, num_inference_steps, solver=solver, diffusion=diffusion, generator=generator,
            sample_ids=sample_ids, output_type=output_type, return_dict=return_dict, backward=backward,
        )  # fmt: skip


class InpaintingPipeline(_CoupledPipeline):
    """Fills in the unknown part of images; known pixels come back as they were given.

    Args:
        transformer: takes the mask of known pixels as one more channel; predicts the velocity.
        scheduler: of a two-sided path with ``gamma="zero"`` and ``prediction_type="velocity"``.
        class_names: one name per class, or None.
    """

    def __init__(
        self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None
    ) -> None:  # fmt: skip
        """See the class."""
        super().__init__(transformer, scheduler, class_names)

    def __call__(
        self,
        images: Any,
        mask: Any,
        class_labels: Labels | None = None,
        num_inference_steps: int = 32,
        *,
        solver: str | None = None,
        generator: GeneratorLike = None,
        sample_ids: Sequence[int] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Fill ``images`` where ``mask`` is true.

        Args:
            images: as :class:`ImageTranslationPipeline`; what lies under the mask is not looked at.
            mask: bool (B, 1, H, W) or (1, 1, H, W), true where pixels are to be made.
            class_labels: an index or name for all, or one per image; None is the null label.
            num_inference_steps, solver: of the ODE.
            generator, sample_ids: the noise under the mask; see ``NoiseStream``.
            output_type, return_dict: as ``ClassConditionalPipeline``.

        Raises ValueError for bad arguments, FloatingPointError if the walk stops being finite.
        """
        checked_output_type(output_type)
        images = states_of(images)
        known = _known(mask, images)
        noise = NoiseStream.from_generator(generator, len(images), sample_ids=sample_ids)
        start = inpainting_base(images, known, noise.normal(images.shape[1:], purpose="init"))
        denoiser = denoiser_from_pipeline(
            self, class_labels=self._labels(class_labels, len(images)), condition=known.float(), known=known
        )
        return self._walk(
            denoiser, start, num_inference_steps, solver=solver, diffusion=None, generator=generator,
            sample_ids=sample_ids, output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


class SuperResolutionPipeline(_CoupledPipeline):
    """Draws images of the transformer's size from smaller ones.

    Args:
        transformer: takes the enlarged image as further channels.
        scheduler: of a two-sided path.
        class_names: one name per class, or None.
        noise_std: of the noise on the enlarged image that the walk starts from.
    """

    def __init__(
        self, transformer: DiT, scheduler: Any, class_names: Sequence[str] | None = None, noise_std: float = 0.5
    ) -> None:  # fmt: skip
        """See the class."""
        super().__init__(transformer, scheduler, class_names, noise_std=noise_std)

    def __call__(
        self,
        images: Any,
        class_labels: Labels | None = None,
        num_inference_steps: int = 32,
        *,
        solver: str | None = None,
        generator: GeneratorLike = None,
        sample_ids: Sequence[int] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw a large image for every one of ``images``, (B, C, h, w) with h a divisor of the sample size.

        Arguments and errors as :class:`InpaintingPipeline`; ``generator`` draws the noise on the enlarged image.
        """
        checked_output_type(output_type)
        low, size = states_of(images), self.transformer.config.sample_size
        if low.shape[-1] != low.shape[-2] or size % low.shape[-1]:
            raise ValueError(f"images are {tuple(low.shape[-2:])}; give squares whose side divides {size}")
        large = enlarge(low, size // low.shape[-1])
        noise = NoiseStream.from_generator(generator, len(low), sample_ids=sample_ids)
        start = large + self.config.noise_std * noise.normal(large.shape[1:], purpose="init")
        denoiser = denoiser_from_pipeline(
            self, class_labels=self._labels(class_labels, len(low)), condition=large
        )
        return self._walk(
            denoiser, start, num_inference_steps, solver=solver, diffusion=None, generator=generator,
            sample_ids=sample_ids, output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


def states_of(images: Any) -> Tensor:
    """Pictures as states (B, C, H, W) float32 in [-1, 1].

    Tensors are (B, C, H, W) and arrays (B, H, W, C), uint8 or float in [0, 1]; else a PIL image or a list of them.
    Raises ValueError for other shapes and for floats outside [0, 1].
    """
    if not isinstance(images, Tensor | np.ndarray):
        pictures = images if isinstance(images, Sequence) else [images]
        arrays = [np.asarray(picture) for picture in pictures]
        images = np.stack([a[..., None] if a.ndim == 2 else a for a in arrays])
    tensor = torch.as_tensor(images)
    if tensor.ndim != 4:
        raise ValueError(f"images have shape {tuple(tensor.shape)}; give (B, C, H, W), or PIL images")
    if not isinstance(images, Tensor):
        tensor = tensor.permute(0, 3, 1, 2)
    unit = tensor.float() / 255.0 if tensor.dtype == torch.uint8 else tensor.float()
    if not bool(((unit >= 0) & (unit <= 1)).all()):
        raise ValueError(
            f"images range from {float(unit.min()):g} to {float(unit.max()):g}; give uint8, or [0, 1]"
        )
    return 2.0 * unit - 1.0


def _known(mask: Any, images: Tensor) -> Tensor:
    """The complement of a mask, for every row."""
    mask = torch.as_tensor(mask)
    rows, _, height, width = images.shape
    if mask.dtype != torch.bool or tuple(mask.shape[1:]) != (1, height, width) or len(mask) not in (1, rows):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; give bool ({rows}, 1, {height}, {width}), true where "
            "pixels are to be made"
        )
    return ~mask.expand(rows, -1, -1, -1)
