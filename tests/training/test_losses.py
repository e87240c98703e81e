"""The two loss steps against what they should compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gensample.interpolants import loss_weight, make_interpolant, target
from gensample.training import ClassificationLoss, Draws, InterpolantLoss
from gensample.training.batches import Batch
from gensample.training.losses import shift_and_flip

ROWS = slice(0, 6)


class _Spy:
    """Stands where the network stands and answers with what the test says."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def __call__(self, x_t: Tensor, timestep: Tensor, **kwargs: object) -> tuple[Tensor]:
        self.x_t, self.timestep, self.kwargs = x_t, timestep, kwargs
        return (self.answer,)


def _batch(loss: InterpolantLoss) -> Batch:
    draws = Draws(5, 9, 6, ROWS)
    images = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (6, 1, 4, 4), np.uint8)
    )
    return {"images": images, "labels": torch.arange(6), **loss.draw(draws, (1, 4, 4))}


def test_the_network_sees_the_linear_path_and_regresses_on_its_flow() -> None:
    loss = InterpolantLoss(label_dropout=0.5)
    batch = _batch(loss)
    x0 = batch["images"].float() / 127.5 - 1
    noise, t = batch["noise"], torch.from_numpy(batch["times"])
    spy = _Spy(noise - x0)
    assert float(loss(spy, batch).loss.max()) < 1e-10  # the exact flow has no loss
    rows = t.float()[:, None, None, None]
    torch.testing.assert_close(spy.x_t, (1 - rows) * noise + rows * x0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spy.timestep, (1000 * (1 - t)).float())
    assert spy.kwargs["class_labels"] is batch["labels"]
    assert spy.kwargs["label_drop"] is batch["label_drop"]
    spy.answer = noise - x0 + torch.arange(6.0)[:, None, None, None]
    torch.testing.assert_close(loss(spy, batch).loss, torch.arange(6.0).square())  # mean square of each row


@pytest.mark.parametrize("path", ["linear", "gvp", "vp", "sbdm", "polynomial"])
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "score"])
def test_a_weighted_loss_is_the_weight_times_the_unweighted_one(path: str, kind: str) -> None:
    options = {"path": path, "prediction_type": kind, "label_dropout": 0.5}
    plain = InterpolantLoss(**options)  # type: ignore[arg-type]
    batch = _batch(plain)
    spy = _Spy(torch.tanh(batch["noise"]))
    unweighted = plain(spy, batch).loss
    interpolant = make_interpolant(path)
    spies = spy.x_t
    wanted = target(interpolant, kind, batch["images"].float() / 127.5 - 1, batch["noise"], batch["times"])
    torch.testing.assert_close(unweighted, (spy.answer - wanted).square().flatten(1).mean(1).float())
    assert torch.equal(InterpolantLoss(**options, loss_weight="none")(spy, batch).loss, unweighted)  # type: ignore[arg-type]
    for name in ("velocity", "likelihood"):
        found = InterpolantLoss(**options, loss_weight=name)(spy, batch).loss  # type: ignore[arg-type]
        assert torch.equal(spy.x_t, spies)
        weight = torch.from_numpy(loss_weight(interpolant, kind, batch["times"], name))
        torch.testing.assert_close(found, unweighted * weight.float())
        assert found.dtype == torch.float32


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_laws_of_times_and_of_dropped_labels(law: str) -> None:
    loss = InterpolantLoss(time_law=law, label_dropout=0.3)  # type: ignore[arg-type]
    draws = Draws(0, 0, 20_000, slice(0, 20_000))
    drawn = loss.draw(draws, (1,))
    times = drawn["times"]
    assert times.dtype == np.float64
    spread = {"uniform": 1 / np.sqrt(12), "logit_normal": 0.208}[law]
    assert abs(times.mean() - 0.5) < 0.01
    assert abs(times.std() - spread) < 0.005
    assert abs(float(drawn["label_drop"].float().mean()) - 0.3) < 0.01


def test_shift_moves_the_image_down_and_right_with_zeros() -> None:
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    moved = shift_and_flip(image.expand(2, 1, 3, 3), torch.tensor([[1, 0], [0, -2]]))
    assert moved[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert moved[1, 0].tolist() == [[3, 0, 0], [6, 0, 0], [9, 0, 0]]


def test_flip_mirrors_chosen_rows_before_the_shift() -> None:
    image = torch.arange(1.0, 4.0).reshape(1, 1, 1, 3).expand(2, 2, 1, 3)
    moved = shift_and_flip(image, torch.tensor([[0, 1], [0, 1]]), torch.tensor([True, False]))
    assert moved[0, 1].tolist() == [[0, 3, 2]]
    assert moved[1, 0].tolist() == [[0, 1, 2]]


def test_classification_is_cross_entropy_and_accuracy() -> None:
    loss = ClassificationLoss(max_shift=0)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    batch = {"images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, 1, 1])}
    output = loss(lambda images: logits, batch)
    torch.testing.assert_close(output.loss, -logits.log_softmax(1)[torch.arange(3), batch["labels"]])
    assert output.logs["accuracy"].tolist() == [1.0, 1.0, 0.0]


def test_augmentation_and_smoothing_are_for_training_only() -> None:
    loss = ClassificationLoss(max_shift=2, horizontal_flip=True, label_smoothing=0.2)
    drawn = loss.draw(Draws(0, 0, 64, slice(0, 64)), (1, 4, 4))
    assert drawn["shift"].abs().max() == 2
    assert 10 < int(drawn["flip"].sum()) < 54
    assert loss.draw_validation(Draws(0, 0, 64, slice(0, 64)), (1, 4, 4)) == {}
    images = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    batch = {"images": images, "labels": torch.tensor([0, 1])}
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    plain = loss(lambda x: logits, batch).loss
    smoothed = loss(lambda x: logits, {**batch, "shift": torch.zeros(2, 2, dtype=torch.long)}).loss
    torch.testing.assert_close(smoothed - plain, torch.full((2,), 0.1 * 9.0))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"time_std": 0.0}, "time_std"),
        ({"path": "cubic"}, "cubic"),
        ({"prediction_type": "noise"}, "prediction_type='noise'"),
        ({"loss_weight": "snr"}, "loss_weight='snr'"),
    ],
)
def test_interpolant_settings_out_of_range(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        InterpolantLoss(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"max_shift": -1}, {"label_smoothing": 1.0}])
def test_classification_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ClassificationLoss(**settings)  # type: ignore[arg-type]
