"""Couplings: marginals, permutations, masks, plans against closed forms and brute force; only keyed randomness.

Statistical tests use fixed streams, so they do not flake.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import interpolate_two_sided, make_two_sided
from gensample.interpolants.couplings import (
    BoxMask,
    Coupled,
    Coupling,
    Independent,
    Inpainting,
    MinibatchOT,
    PointSource,
    Rectified,
    SamePoint,
    SuperResolution,
    TileMask,
    bridge_regularisation,
    enlarge,
    inpainting_base,
    reduce_resolution,
)
from gensample.interpolants.transport import assignment, plan_draws, sinkhorn, squared_distances
from gensample.noise import NoiseStream, philox_generator

ROWS = 12


def keys(rows: int = ROWS, seed: int = 5) -> NoiseStream:
    return NoiseStream.from_generator(seed, rows)


def images(rows: int = ROWS, size: int = 8, purpose: str = "images") -> Tensor:
    rng = philox_generator(1, 0, purpose=purpose)
    return torch.from_numpy(rng.standard_normal((rows, 1, size, size), dtype=np.float32))


def labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % 3


COUPLINGS: dict[str, Coupling] = {
    "independent": Independent(),
    "pool": Independent(pool=images(30, purpose="pool")),
    "exact": MinibatchOT(),
    "entropic": MinibatchOT(method="entropic", regularisation=200.0),
    "inpainting": Inpainting(BoxMask(4)),
    "tiles": Inpainting(TileMask(2)),
    "super-resolution": SuperResolution(),
    "rectified": Rectified(lambda base, _: 2.0 * base),
    "point": PointSource(torch.zeros(1, 8, 8)),
    "same": SamePoint(),
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_coupling_is_a_pure_function_of_its_keys(name: str) -> None:
    coupling, x0 = COUPLINGS[name], images()
    first, again = coupling(x0, labels(), keys()), coupling(x0, labels(), keys())
    other = coupling(x0, labels(), keys(seed=6))
    for a, b in zip(parts(first), parts(again), strict=True):
        assert torch.equal(a, b)
    assert first.base.shape == first.x0.shape == x0.shape
    assert first.base.dtype == x0.dtype
    drawn = name not in ("point", "same")
    assert torch.equal(first.base, other.base) is not drawn


@pytest.mark.parametrize(
    "name", ["independent", "pool", "inpainting", "tiles", "super-resolution", "rectified"]
)
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    coupling, x0 = COUPLINGS[name], images()
    whole, part = coupling(x0, labels(), keys()), coupling(x0[3:6], labels()[3:6], keys().select(slice(3, 6)))
    for a, b in zip(parts(whole), parts(part), strict=True):
        assert torch.equal(a[3:6], b)


def parts(pair: Coupled) -> list[Tensor]:
    return [v for v in (pair.base, pair.x0, pair.labels, pair.condition, pair.known) if v is not None]


# ---- optimal transport -----------------------------------------------------------------------------------------


def test_exact_transport_is_the_best_of_all_permutations() -> None:
    x0 = images(6)
    pair = MinibatchOT()(x0, None, keys(6))
    cost = squared_distances(pair.base, x0)
    best = min(sum(float(cost[i, p[i]]) for i in range(6)) for p in itertools.permutations(range(6)))
    assert float((pair.base - pair.x0).double().square().sum()) == pytest.approx(best)


@pytest.mark.parametrize("method", ["exact", "entropic"])
def test_labels_move_with_the_plan_and_stay_within_their_class(method: str) -> None:
    x0, given = images(), labels()
    options = {"method": method, "regularisation": 50.0 if method == "entropic" else None}
    pair = MinibatchOT(**options)(x0, given, keys())  # type: ignore[arg-type]
    found = squared_distances(pair.x0, x0).argmin(1)
    assert torch.equal(given[found], pair.labels)
    assert torch.equal(pair.labels, given)  # each base keeps the label that its row was drawn for
    if method == "exact":
        assert sorted(found.tolist()) == list(range(ROWS))
        assert not torch.equal(found, torch.arange(ROWS))


def test_transport_across_labels_warns_and_still_permutes_them() -> None:
    x0, given = images(), labels()
    with pytest.warns(UserWarning, match="within_labels=True"):
        pair = MinibatchOT(within_labels=False)(x0, given, keys())
    found = squared_distances(pair.x0, x0).argmin(1)
    assert torch.equal(given[found], pair.labels)
    assert not torch.equal(pair.labels, given)


def test_transport_shortens_paths_and_keeps_the_marginals() -> None:
    x0 = images(64, 2)
    plain, best = Independent()(x0, None, keys(64)), MinibatchOT()(x0, None, keys(64))
    assert torch.equal(plain.base, best.base)
    ordered = [sorted(v.flatten(1).tolist()) for v in (x0, best.x0)]
    assert ordered[0] == ordered[1]
    assert float((best.base - best.x0).square().sum()) < 0.5 * float((plain.base - x0).square().sum())


def test_sinkhorn_has_its_marginals_and_its_form() -> None:
    rng = philox_generator(2, 0, purpose="cost")
    cost = torch.from_numpy(rng.random((7, 5)))
    a, b = torch.from_numpy(rng.dirichlet(np.ones(7))), torch.from_numpy(rng.dirichlet(np.ones(5)))
    log_plan = sinkhorn(cost, 0.1, row_weights=a, column_weights=b)
    torch.testing.assert_close(log_plan.exp().sum(1), a, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_plan.exp().sum(0), b, rtol=0, atol=1e-9)
    scalings = log_plan + cost / 0.1  # log u_i + log v_j: all its 2 x 2 contrasts vanish
    contrast = scalings[1:, 1:] - scalings[:-1, 1:] - scalings[1:, :-1] + scalings[:-1, :-1]
    assert float(contrast.abs().max()) < 1e-10


def test_sinkhorn_tends_to_the_best_permutation_and_to_independence() -> None:
    cost = squared_distances(images(6), images(6, purpose="others"))
    sharp, flat = sinkhorn(cost, 0.3, tolerance=1e-4).exp(), sinkhorn(cost, 1e6).exp()
    assert torch.equal(sharp.argmax(1), assignment(cost))
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 36), rtol=1e-3, atol=0)
    u = torch.from_numpy(philox_generator(3, 0, purpose="u").random(6))
    assert torch.equal(plan_draws(sinkhorn(cost, 0.3, tolerance=1e-4), u), assignment(cost))


def test_draws_from_a_plan_follow_it() -> None:
    """Chi-square at level 1e-3 on four columns."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    u = torch.from_numpy(philox_generator(4, 0, purpose="u").random(4000))
    counts = torch.bincount(plan_draws(p.log().expand(4000, 4), u), minlength=4)
    assert float(((counts - 4000 * p) ** 2 / (4000 * p)).sum()) < 16.27
    assert plan_draws(p.log()[None], torch.tensor([1.0 - 1e-16], dtype=torch.float64)).item() == 3


# ---- data-dependent bases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [BoxMask(5), BoxMask(4, centred=True), TileMask(2, 0.3)])
def test_known_pixels_never_move(masks: BoxMask | TileMask) -> None:
    x0 = images()
    pair = Inpainting(masks)(x0, labels(), keys())
    assert pair.known is not None
    assert pair.condition is not None
    assert pair.known.shape == pair.condition.shape == (ROWS, 1, 8, 8)
    assert 0 < float(pair.condition.mean()) < 1
    noise = images(purpose="latent")
    for gamma in ("zero", "brownian"):
        x_t = interpolate_two_sided(
            make_two_sided("trig", gamma=gamma, scale=0.5), pair.base, x0, noise, np.linspace(0, 1, ROWS),
            known=pair.known,
        )  # fmt: skip
        assert torch.equal(x_t[pair.known], x0[pair.known])
        assert not torch.equal(x_t[~pair.known], x0[~pair.known])


def test_masks_have_their_sizes_and_cover_every_place() -> None:
    x0 = images(400)
    box = BoxMask(5)(x0, keys(400))
    assert torch.equal((~box).sum((1, 2, 3)), torch.full((400,), 25))
    assert bool((~box).any(0).all())
    assert torch.equal((~BoxMask(4, centred=True)(x0[:1], keys(1)))[0, 0].nonzero()[0], torch.tensor([2, 2]))
    tiles = TileMask(2, 0.3)(x0, keys(400))
    share = float((~tiles).double().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 6400) ** 0.5
    assert torch.equal(tiles, enlarge(tiles[..., ::2, ::2], 2))


def test_super_resolution_starts_from_the_enlarged_image() -> None:
    x0 = images()
    pair = SuperResolution(factor=2, noise_std=0.3)(x0, None, keys())
    low = enlarge(reduce_resolution(x0, 2), 2)
    torch.testing.assert_close(pair.condition, low)
    assert float(low[0, 0, :2, :2].std()) == 0.0
    torch.testing.assert_close(low[..., 0, 0], x0[..., :2, :2].mean((-1, -2)))
    assert float((pair.base - low).std()) == pytest.approx(0.3, rel=0.15)
    assert torch.equal(SuperResolution(noise_std=0.0)(x0, None, keys()).base, low)


def test_rectified_pairs_come_from_the_map_of_their_base() -> None:
    pair = Rectified(lambda base, given: base + given[:, None, None, None])(images(), labels(), keys())
    torch.testing.assert_close(
        pair.x0 - pair.base, labels()[:, None, None, None].expand_as(pair.base).float()
    )


def test_point_source_and_mirror() -> None:
    x0, point = images(), torch.full((1, 8, 8), 0.25)
    pair = PointSource(point)(x0, None, keys())
    assert torch.equal(pair.base, point.expand_as(x0))
    assert torch.equal(pair.condition, pair.base)
    assert torch.equal(PointSource(lambda x: x.flip(0))(x0, None, keys()).base, x0.flip(0))
    assert torch.equal(SamePoint()(x0, None, keys()).base, x0)


# ---- refusals --------------------------------------------------------------------------------------------------


def test_bad_arguments_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = images()
    with pytest.raises(ValueError, match="'entropic' needs one"):
        MinibatchOT(method="entropic")
    with pytest.raises(ValueError, match="'exact' takes none"):
        MinibatchOT(regularisation=1.0)
    with pytest.raises(ValueError, match="method='emd'"):
        MinibatchOT(method="emd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be permuted"):
        MinibatchOT(inner=SuperResolution())(x0, None, keys())
    with pytest.raises(ValueError, match="keys of 3 rows for 12"):
        Independent()(x0, None, keys(3))
    with pytest.raises(ValueError, match="pool of shape"):
        Independent(pool=torch.zeros(4, 1, 7, 7))(x0, None, keys())
    with pytest.raises(ValueError, match="factor=3 does not divide"):
        SuperResolution(factor=3)(x0, None, keys())
    with pytest.raises(ValueError, match="size=9 of the box"):
        BoxMask(9)(x0, keys())
    with pytest.raises(ValueError, match="size=3 must divide"):
        TileMask(3)(x0, keys())
    with pytest.raises(ValueError, match="boolean mask"):
        inpainting_base(x0, x0, x0)
    with pytest.raises(ValueError, match="raise regularisation"):
        sinkhorn(squared_distances(x0, images(purpose="others")), 1.0, tolerance=1e-12, max_iterations=2)
    with pytest.raises(ValueError, match="row_weights must be 2"):
        sinkhorn(torch.zeros(2, 2), 1.0, row_weights=torch.tensor([0.5, 0.6]).double())
    with pytest.raises(ValueError, match="square"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="eps=0"):
        bridge_regularisation(0.0)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"gensample\[couplings\]"):
        MinibatchOT()(x0, None, keys())
