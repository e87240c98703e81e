"""Couplings: which base sample starts the path to which data sample, and what else the network is told.

Every coupling is called ``coupling(x0, labels, keys) -> Coupled`` on a batch and draws only from ``keys``, the rows'
noise streams, so a training step stays a pure function of its inputs.  Any coupling with the right two marginals
gives a valid interpolant (Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797, definition 2.1); what changes is how
straight the paths are and what the conditional law is.

Shapes: B = rows; x0, base: (B, C, H, W) or (B, ...); labels: (B,); condition: (B, channels, H, W);
known: (B, 1, H, W) bool.

Sources: Albergo et al., arXiv 2310.03725 (data-dependent couplings: inpainting, super-resolution); Tong et al., arXiv
2302.00482, and Pooladian et al., arXiv 2304.14772 (minibatch optimal transport); Liu et al., arXiv 2209.03003
(rectification); Chen et al., arXiv 2403.13724 (point source).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gensample.interpolants.transport import assignment, plan_draws, sinkhorn, squared_distances
from gensample.noise import NoiseStream, philox_generator

OTMethod = Literal["exact", "entropic"]

_TOLERANCE = 1e-3  # of a batch's plan: rows are drawn from it normalised, and batches add far more noise


@dataclass(frozen=True)
class Coupled:
    """A batch of pairs, row r of ``base`` with row r of everything else.

    base, x0, labels: the ends and the labels of x0, permuted or replaced where the coupling does that.
    condition: channels that the network sees beside x_t; known: where x_t is x0 at every time, and nothing moves.
    """

    base: Tensor
    x0: Tensor
    labels: Tensor | None = None
    condition: Tensor | None = None
    known: Tensor | None = None


class Coupling(Protocol):
    """Chooses the base of each row."""

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled: ...


@dataclass(frozen=True)
class Independent:
    """Base and data do not depend on each other: the base is standard normal, or a random row of ``pool``
    (N, ...), such as the images of another class."""

    pool: Tensor | None = None

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        if self.pool is None:
            return Coupled(_normal(x0, keys), x0, labels)
        if self.pool.shape[1:] != x0.shape[1:]:
            raise ValueError(
                f"pool of shape {tuple(self.pool.shape)} holds no rows of shape {tuple(x0.shape[1:])}"
            )
        rows = (_uniforms(keys, "pool") * len(self.pool)).long()
        return Coupled(self.pool[rows].to(x0), x0, labels)


@dataclass(frozen=True)
class MinibatchOT:
    """Pairs of the batch that optimal transport of the cost |base - x0|^2 prefers.

    Args:
        inner: where the base comes from before x0 is permuted.
        method: ``exact`` is the best permutation (scipy); ``entropic`` draws each base's partner from the plan of
            Sinkhorn's algorithm, with replacement, so a row of x0 may serve twice.
        regularisation: of ``entropic``: 4 eps gives, as batches grow, the Schroedinger bridge of reference noise
            sqrt(2 eps) on the linear path with gamma = sqrt(2 eps t(1-t)) (:func:`bridge_regularisation`).
        within_labels: pair only rows of one label, so that the base keeps its law for each of them.  Without it a
            label says something of the base, and sampling a label from the whole base law is wrong: a warning.

    Labels move with their x0.  Raises ValueError for an unknown method, or a regularisation that does not belong.
    """

    inner: Coupling = field(default_factory=Independent)
    method: OTMethod = "exact"
    regularisation: float | None = None
    within_labels: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(OTMethod):
            raise ValueError(f"method={self.method!r} is unknown; use one of {get_args(OTMethod)}")
        if (self.method == "entropic") != (self.regularisation is not None):
            raise ValueError(
                f"regularisation={self.regularisation} with method={self.method!r}: 'entropic' needs one (4 eps for a "
                "bridge), 'exact' takes none"
            )

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        pair = self.inner(x0, labels, keys)
        if pair.condition is not None or pair.known is not None:
            raise ValueError("inner ties its base to its x0 by a condition; such pairs cannot be permuted")
        labels = pair.labels
        partner = torch.arange(len(x0))
        groups = [partner.clone()]
        if labels is not None and self.within_labels:
            groups = [torch.nonzero(labels.cpu() == value)[:, 0] for value in labels.cpu().unique()]
        elif labels is not None:
            warnings.warn(
                "minibatch OT across labels makes the base depend on the label; use within_labels=True for "
                "class-conditional models",
                UserWarning,
                stacklevel=2,
            )
        u = _uniforms(keys, "plan")
        for rows in groups:
            cost = squared_distances(pair.base[rows], pair.x0[rows])
            if self.regularisation is None:
                chosen = assignment(cost)
            else:
                chosen = plan_draws(sinkhorn(cost, self.regularisation, tolerance=_TOLERANCE), u[rows])
            partner[rows] = rows[chosen]
        moved = None if labels is None else labels[partner.to(labels.device)]
        return Coupled(pair.base, pair.x0[partner.to(x0.device)], moved)


def bridge_regularisation(eps: float) -> float:
    """The entropic regularisation 4 eps whose plan, exp(-|x - y|^2/(4 eps)) times two scalings, is the coupling of
    the Schroedinger bridge with reference dX = sqrt(2 eps) dW over unit time."""
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps={eps} must be positive and finite")
    return 4.0 * eps


@dataclass(frozen=True)
class Inpainting:
    """The base is the image with its unknown pixels replaced by noise; the mask is told to the network.

    ``masks(x0, keys)`` gives ``known`` (B, 1, H, W).  Known pixels never move.
    """

    masks: Callable[[Tensor, NoiseStream], Tensor]

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        known = self.masks(x0, keys)
        base = inpainting_base(x0, known, _normal(x0, keys))
        return Coupled(base, x0, labels, known.to(x0), known)


def inpainting_base(image: Tensor, known: Tensor, noise: Tensor) -> Tensor:
    """``image`` where ``known``, ``noise`` elsewhere."""
    if known.dtype != torch.bool:
        raise ValueError(f"known is {known.dtype}; give a boolean mask, true where the image is given")
    return torch.where(known, image, noise.to(image))


@dataclass(frozen=True)
class SuperResolution:
    """The base is the image at 1/``factor`` of its resolution, enlarged, with noise of ``noise_std`` added; the
    enlarged image is told to the network.  With no noise the map from low to high resolution is deterministic."""

    factor: int = 2
    noise_std: float = 0.5

    def __post_init__(self) -> None:
        if self.factor < 2 or not 0.0 <= self.noise_std < float("inf"):
            raise ValueError(
                f"factor={self.factor} must be at least 2, noise_std={self.noise_std} not negative"
            )

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        low = enlarge(reduce_resolution(x0, self.factor), self.factor)
        return Coupled(low + self.noise_std * _normal(x0, keys), x0, labels, low)


def reduce_resolution(image: Tensor, factor: int) -> Tensor:
    """Means of ``factor`` x ``factor`` pixels, (B, C, H, W) to (B, C, H/factor, W/factor); H and W must divide."""
    if image.shape[-1] % factor or image.shape[-2] % factor:
        raise ValueError(
            f"factor={factor} does not divide images of {image.shape[-2]} x {image.shape[-1]} pixels"
        )
    return F.avg_pool2d(image, factor)


def enlarge(image: Tensor, factor: int) -> Tensor:
    """Every pixel ``factor`` x ``factor`` times: (B, C, H, W) to (B, C, H factor, W factor)."""
    return image.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


@dataclass(frozen=True)
class Rectified:
    """Pairs made by a trained model: ``flow_map(base, labels)`` is the end of its ODE from ``base`` (any shape).

    The data of the batch give only shape and labels.  The new flow makes the same map along straighter paths.
    """

    flow_map: Callable[[Tensor, Tensor | None], Tensor]
    inner: Coupling = field(default_factory=Independent)

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        base = self.inner(x0, labels, keys).base
        return Coupled(base, self.flow_map(base, labels).detach(), labels)


@dataclass(frozen=True)
class PointSource:
    """The base is known when sampling: one point (...) for all rows, or ``point(x0)``, such as the frame before.
    It is told to the network."""

    point: Tensor | Callable[[Tensor], Tensor]

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        base = self.point.to(x0).expand_as(x0) if isinstance(self.point, Tensor) else self.point(x0)
        return Coupled(base, x0, labels, base)


@dataclass(frozen=True)
class SamePoint:
    """The base is x0 itself: for the ``mirror`` interpolant, whose path leaves it and comes back."""

    def __call__(self, x0: Tensor, labels: Tensor | None, keys: NoiseStream) -> Coupled:
        return Coupled(x0, x0, labels)


@dataclass(frozen=True)
class BoxMask:
    """``known`` is false in a square of ``size`` pixels: in the middle, or at a random place of each row."""

    size: int = 14
    centred: bool = False

    def __call__(self, x0: Tensor, keys: NoiseStream) -> Tensor:
        height, width = x0.shape[-2:]
        if not 0 < self.size <= min(height, width):
            raise ValueError(f"size={self.size} of the box must lie in 1..{min(height, width)}")
        place = torch.full((2, len(x0)), 0.5, dtype=torch.float64)
        if not self.centred:
            place = torch.stack([_uniforms(keys, "top"), _uniforms(keys, "left")])
        top = (place[0] * (height - self.size + 1)).long()[:, None, None]
        left = (place[1] * (width - self.size + 1)).long()[:, None, None]
        y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
        hidden = (y >= top) & (y < top + self.size) & (x >= left) & (x < left + self.size)
        return ~hidden[:, None].to(x0.device)


@dataclass(frozen=True)
class TileMask:
    """``known`` is false in random tiles of ``size`` x ``size`` pixels, each hidden with probability ``hidden``."""

    size: int = 4
    hidden: float = 0.5

    def __call__(self, x0: Tensor, keys: NoiseStream) -> Tensor:
        height, width = x0.shape[-2:]
        if height % self.size or width % self.size or not 0.0 < self.hidden <= 1.0:
            raise ValueError(
                f"size={self.size} must divide {height} x {width} pixels, hidden={self.hidden} lie in (0, 1]"
            )
        tiles = _uniforms(keys, "tiles", (height // self.size) * (width // self.size)) >= self.hidden
        known = tiles.reshape(len(x0), 1, height // self.size, width // self.size)
        return enlarge(known, self.size).to(x0.device)


def _normal(x0: Tensor, keys: NoiseStream) -> Tensor:
    if len(keys) != len(x0):
        raise ValueError(f"keys of {len(keys)} rows for {len(x0)} samples; give one stream per row")
    return keys.normal(x0.shape[1:], purpose="base").to(x0)


def _uniforms(keys: NoiseStream, purpose: str, count: int | None = None) -> Tensor:
    """Uniforms on [0, 1), (B,) or (B, count) float64, one stream per row."""
    rows = zip(keys.seeds, keys.samples, keys.prefixes, strict=True)
    draws = [philox_generator(seed, sample, prefix, purpose).random(count) for seed, sample, prefix in rows]
    return torch.stack([torch.as_tensor(draw, dtype=torch.float64) for draw in draws])
