"""The loss of interpolants between coupled samples: two data sets, or a corruption of the data and the data.

    x_t = alpha base + beta x0 + gamma noise        (gensample.interpolants.two_sided)

``pairs`` reads base and x0 from the data's channels (``FashionPairs``).  ``inpainting`` and ``super_resolution`` make
base and conditioning channels from x0 (Albergo et al., arXiv 2310.03725): the network sees the mask, or the enlarged
small image, beside x_t.  ``independent`` and ``minibatch_ot`` start from noise.

Shapes: B = rows of the micro-batch; images (B, C, H, W) uint8, (B, 2 C, H, W) of pairs; labels, times: (B,).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gensample.interpolants import heads_of, make_two_sided
from gensample.interpolants.couplings import (
    BoxMask,
    Coupled,
    Coupling,
    Independent,
    Inpainting,
    MinibatchOT,
    SuperResolution,
)
from gensample.interpolants.gammas import GammaKind
from gensample.interpolants.paths import Float64
from gensample.interpolants.two_sided_objectives import two_sided_loss
from gensample.noise import NoiseStream
from gensample.training.batches import Batch, Draws
from gensample.training.losses import LossOutput, Model

CouplingName = Literal["pairs", "independent", "minibatch_ot", "inpainting", "super_resolution"]

_VALIDATION = 1  # where the streams of validation stand, apart from training's


class CoupledLoss:
    """Regression of the heads of a two-sided network on an interpolant between coupled samples.

    Images are scaled to [-1, 1]; the network sees timestep 1000 (1 - t), the labels, and its conditioning channels
    behind those of x_t.

    Args:
        coupling: ``pairs`` of the data; ``inpainting`` of a square at a random place; ``super_resolution``; from
            noise ``independent``, or ``minibatch_ot``, exact and within each label.
        path: ``linear``, ``trig`` or ``encoding_decoding``.
        gamma, gamma_scale: the latent noise between the ends; see ``gensample.interpolants.gammas``.  ``zero`` leaves
            an ODE only.
        prediction_type: the heads; "velocity+noise" serves ODE and SDE, "velocity" the ODE.
        antithetic: average over noise and -noise; for a gamma of infinite slope.
        time_margin: times are uniform on [margin, 1 - margin].
        mask_size: side of the square that inpainting hides.
        factor, noise_std: of super_resolution: how many times larger, and the noise added to the enlarged image.
        label_dropout: chance of training a row without its label; None leaves it to the recipe's model.
        num_train_timesteps: model timestep at the base.

    Raises ValueError for numbers out of range, or heads that the path cannot train.
    """

    def __init__(
        self,
        *,
        coupling: CouplingName = "pairs",
        path: Literal["linear", "trig", "encoding_decoding"] = "linear",
        gamma: GammaKind = "quadratic",
        gamma_scale: float = 1.0,
        prediction_type: str = "velocity+noise",
        antithetic: bool = False,
        time_margin: float = 1e-3,
        mask_size: int = 14,
        factor: int = 2,
        noise_std: float = 0.5,
        label_dropout: float | None = None,
        num_train_timesteps: int = 1000,
    ) -> None:
        if label_dropout is not None and not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout={label_dropout} must lie in [0, 1]")
        if not 0 <= time_margin < 0.5:
            raise ValueError(f"time_margin={time_margin} must lie in [0, 0.5)")
        self.heads = heads_of(prediction_type)
        if gamma == "zero" and self.heads != ("velocity",):
            raise ValueError(
                f"prediction_type={prediction_type!r}: gamma='zero' has no noise to predict, use 'velocity'"
            )
        self.path = make_two_sided(path, gamma=gamma, scale=gamma_scale)
        self.coupling = make_coupling(coupling, mask_size=mask_size, factor=factor, noise_std=noise_std)
        self.label_dropout, self._prediction_type = label_dropout, prediction_type
        self._antithetic, self._margin = antithetic, time_margin
        self._num_train_timesteps = num_train_timesteps

    def channels(self, data_channels: int) -> tuple[int, int]:
        """The network's input and output channels for data of so many; raises ValueError for an odd number of pairs."""
        if self.coupling is None:
            if data_channels % 2:
                raise ValueError(
                    f"coupling='pairs' needs base and target stacked; the data have {data_channels} channels"
                )
            data_channels //= 2
        told = {Inpainting: 1, SuperResolution: data_channels}.get(type(self.coupling), 0)
        return data_channels + told, len(self.heads) * data_channels

    def draw(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """keys of the coupling, noise (B, C, H, W), times (B,) float64, label_drop (B,) bool."""
        rows = range(draws.size)[draws.rows]
        branch = _VALIDATION if draws.purpose == "validation" else 0
        keys = NoiseStream(
            (draws.seed,) * len(rows), tuple(draws.step * draws.size + row for row in rows), ((branch,),) * len(rows)
        )  # fmt: skip
        shape = image_shape if self.coupling is not None else (image_shape[0] // 2, *image_shape[1:])
        times = self._margin + (1.0 - 2.0 * self._margin) * draws.uniform("times")
        dropped = torch.from_numpy(draws.uniform("label_drop") < (self.label_dropout or 0.0))
        return {"keys": keys, "noise": draws.normal("noise", shape), "times": times, "label_drop": dropped}

    def draw_validation(self, draws: Draws, image_shape: tuple[int, ...]) -> Batch:
        """As in training, every label kept."""
        drawn = self.draw(draws, image_shape)
        return {**drawn, "label_drop": torch.zeros_like(drawn["label_drop"])}

    def coupled(self, batch: Batch) -> Coupled:
        """Base, x0 and conditioning of a batch."""
        images = batch["images"].float() / 127.5 - 1.0
        if self.coupling is None:
            base, x0 = images.chunk(2, dim=1)
            return Coupled(base, x0, batch["labels"])
        return self.coupling(images, batch["labels"], batch["keys"])

    def __call__(self, model: Model, batch: Batch) -> LossOutput:
        """The heads' mean squared errors over each image, added up."""
        pair = self.coupled(batch)

        def predict(x_t: Tensor, t: Float64) -> Tensor:
            timestep = torch.from_numpy(self._num_train_timesteps * (1.0 - t)).float().to(x_t.device)
            state = x_t if pair.condition is None else torch.cat([x_t, pair.condition], dim=1)
            return model(
                state, timestep, class_labels=pair.labels, label_drop=batch["label_drop"], return_dict=False
            )[0]  # fmt: skip

        return LossOutput(
            two_sided_loss(
                predict, self.path, self._prediction_type, pair.base, pair.x0, batch["noise"], batch["times"],
                antithetic=self._antithetic, known=pair.known,
            )
        )  # fmt: skip


def make_coupling(name: str, *, mask_size: int, factor: int, noise_std: float) -> Coupling | None:
    """The coupling called ``name``; None for pairs that the data bring."""
    if name == "pairs":
        return None
    if name == "independent":
        return Independent()
    if name == "minibatch_ot":
        return MinibatchOT()
    if name == "inpainting":
        return Inpainting(BoxMask(mask_size))
    if name == "super_resolution":
        return SuperResolution(factor, noise_std)
    raise ValueError(f"coupling={name!r} is unknown; use one of {get_args(CouplingName)}")
