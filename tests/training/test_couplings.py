"""CoupledLoss: what is drawn, what the network sees, minimisers, and runs of the shared loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.models.dit import DiT
from gensample.training import CoupledLoss, DataError, Draws, FashionPairs, LabelledImages
from gensample.training.couplings import make_coupling
from gensample.training.recipe import check_images, read_recipe
from tests.training.tiny_runs import stripes, tiny_trainer, write_fashion

RECIPES = Path(__file__).parents[2] / "recipes"


def pairs() -> LabelledImages:
    """Stripes beside their negatives."""
    data = stripes()
    return LabelledImages(torch.cat([255 - data.images, data.images], dim=1), data.labels, data.class_names)


def batch_of(
    loss: CoupledLoss, data: LabelledImages, rows: slice = slice(0, 6), purpose: str = "train"
) -> Any:
    drawn = loss.draw(Draws(3, 2, 6, rows, purpose), data.shape)
    return {"images": data.images[:6][rows], "labels": data.labels[:6][rows], **drawn}


def exact_network(loss: CoupledLoss, batch: Any, seen: list[Tensor]) -> Any:
    """Answers the targets of the batch; notes what it is shown."""
    pair = loss.coupled(batch)
    c = loss.path.coefficients(batch["times"])

    def network(x: Tensor, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        seen.append(x)
        row = lambda value: torch.as_tensor(np.asarray(value)).float()[:, None, None, None]  # noqa: E731
        velocity = row(c.d_alpha) * pair.base + row(c.d_beta) * pair.x0
        heads = {"noise": batch["noise"], "velocity": velocity}
        if np.isfinite(c.d_gamma).all():
            heads["velocity"] = velocity + row(c.d_gamma) * batch["noise"]
        return (torch.cat([heads[head] for head in loss.heads], dim=1),)

    return network


@pytest.mark.parametrize(
    "options",
    [
        {"coupling": "pairs", "path": "trig", "gamma": "sin2", "gamma_scale": 0.5},
        {"coupling": "independent", "gamma": "zero", "prediction_type": "velocity"},
        {"coupling": "minibatch_ot", "gamma": "zero", "prediction_type": "velocity"},
        {"coupling": "inpainting", "gamma": "zero", "prediction_type": "velocity", "mask_size": 4},
        {"coupling": "super_resolution", "gamma": "quadratic", "prediction_type": "velocity"},
    ],
)
def test_the_targets_are_the_interpolants_and_the_loss_is_zero_at_them(options: Any) -> None:
    loss = CoupledLoss(**options)
    data = pairs() if options["coupling"] == "pairs" else stripes()
    batch, seen = batch_of(loss, data), list[Tensor]()
    value = loss(exact_network(loss, batch, seen), batch).loss
    torch.testing.assert_close(value, torch.zeros(6), rtol=0, atol=1e-9)
    inputs, outputs = loss.channels(data.shape[0])
    assert seen[0].shape == (6, inputs, 8, 8)
    assert outputs == len(loss.heads)
    if options["coupling"] == "inpainting":
        pair = loss.coupled(batch)
        known = pair.known.expand_as(pair.x0)
        assert torch.equal(seen[0][:, :1][known], pair.x0[known])
        assert torch.equal(seen[0][:, 1:].bool(), pair.known)


def test_draws_follow_the_row_and_validation_has_its_own() -> None:
    loss = CoupledLoss(
        coupling="inpainting", gamma="zero", prediction_type="velocity", mask_size=4, label_dropout=1.0
    )
    whole, part = (loss.coupled(batch_of(loss, stripes(), rows)) for rows in (slice(0, 6), slice(2, 4)))
    assert torch.equal(whole.base[2:4], part.base)
    validation = batch_of(loss, stripes(), purpose="validation")
    assert not torch.equal(loss.coupled(validation).base, whole.base)
    assert batch_of(loss, stripes())["label_drop"].all()
    assert not loss.draw_validation(Draws(3, 2, 6, slice(0, 6), "validation"), (1, 8, 8))["label_drop"].any()


def test_a_run_learns_to_turn_images_into_their_negatives(tmp_path: Path) -> None:
    data = pairs()
    loss = CoupledLoss(label_dropout=0.1, antithetic=True)
    model = DiT(
        sample_size=8, in_channels=1, out_channels=2, patch_size=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_classes=4,
    )  # fmt: skip
    trainer = tiny_trainer(
        tmp_path, loss=loss, model=model, data=data, validate=True, steps=40, evaluate_every=40
    )
    batch = {**batch_of(loss, data), "label_drop": torch.zeros(6, dtype=torch.bool)}
    before = float(loss(model, batch).loss.detach().mean())
    result = trainer.run()
    assert result.reason == "finished"
    assert float(loss(model, batch).loss.detach().mean()) < 0.8 * before
    assert np.isfinite(result.figures["validation/ema-0.5/loss"])


def test_pairs_of_classes_use_every_base_before_one_repeats(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    data = FashionPairs(source="trouser", target="bag", pairings=2, root=str(tmp_path))
    data._images.verify = False
    found = data.load()
    assert found.images.shape == (2 * 5500, 2, 28, 28)
    position = found.images[:, :, 0, 0].long() * 256 + found.images[:, :, 0, 1].long()
    assert set((position % 10).unique(dim=0).flatten().tolist()) == {1, 8}
    assert int(position[:5500, 0].unique().numel()) == 5500
    assert not torch.equal(position[:5500, 0], position[5500:, 0])
    assert len(data.load_validation()) == 500
    data.source = "hat"
    with pytest.raises(DataError, match="class 'hat' is unknown"):
        data.load_validation()


@pytest.mark.parametrize("name", ["translation", "inpainting", "superresolution"])
def test_the_recipes_fit_their_networks(name: str) -> None:
    recipe = read_recipe(str(RECIPES / f"fashion_{name}.yaml"))
    assert isinstance(recipe.loss, CoupledLoss)
    channels = 2 if name == "translation" else 1
    images = LabelledImages(
        torch.zeros(1, channels, 28, 28, dtype=torch.uint8), torch.zeros(1).long(), ("a",) * 10
    )
    check_images(recipe.model, images, recipe.loss)
    with pytest.raises(ValueError, match="make them agree"):
        check_images(DiT(sample_size=28, in_channels=3), images, recipe.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": "zero"}, "gamma='zero' has no noise to predict"),
        ({"time_margin": 0.5}, "time_margin=0.5"),
        ({"label_dropout": 2.0}, "label_dropout=2.0"),
        ({"coupling": "rectified"}, "coupling='rectified' is unknown"),
    ],
)
def test_bad_settings(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoupledLoss(**options)
    with pytest.raises(ValueError, match="needs base and target stacked"):
        CoupledLoss().channels(3)
    assert make_coupling("pairs", mask_size=2, factor=2, noise_std=0.0) is None
