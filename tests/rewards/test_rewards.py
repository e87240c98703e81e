"""Rewards of classifiers and file sizes, and sums of rewards."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gensample.denoisers import Conditioning
from gensample.rewards import ClassLogProbability, Compressibility, WeightedSum, describe, for_prompt


def images(rows: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(rows))


def linear_classifier(classes: int = 4) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()
    with torch.no_grad():
        net[1].weight.normal_(generator=torch.Generator().manual_seed(0))
        net[1].bias.zero_()
    return net


def test_a_class_and_a_set_of_classes() -> None:
    net, x = linear_classifier(), images(5)
    p = net(x).softmax(1)
    assert torch.allclose(ClassLogProbability(net, 2)(x), p[:, 2].log(), atol=1e-5)
    assert torch.allclose(ClassLogProbability(net, (3, 0))(x), (p[:, 3] + p[:, 0]).log(), atol=1e-5)
    assert torch.allclose(ClassLogProbability(net, (0, 1, 2, 3))(x), torch.zeros(5), atol=1e-5)
    cool = (net(x) / 2.0).softmax(1)
    assert torch.allclose(ClassLogProbability(net, 1, temperature=2.0)(x), cool[:, 1].log(), atol=1e-5)


def test_a_set_that_is_nearly_impossible_keeps_its_logarithm() -> None:
    logits = torch.tensor([[0.0, -500.0, -500.0]])
    reward = ClassLogProbability(lambda x: logits, (1, 2))(images(1))
    assert float(reward) == pytest.approx(-500.0 + math.log(2.0), abs=1e-3)


def test_rows_own_labels() -> None:
    net, x = linear_classifier(), images(3)
    cond = Conditioning(batched={"class_labels": torch.tensor([2, 0, 3])})
    expected = net(x).log_softmax(1)[torch.arange(3), torch.tensor([2, 0, 3])]
    assert torch.allclose(ClassLogProbability(net)(x, cond), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no class_labels of their own; give classes="):
        ClassLogProbability(net)(x)
    null = Conditioning(batched={"class_labels": torch.tensor([4, 4, 4])})
    with pytest.raises(ValueError, match=r"labels \[4, 4, 4\] are beyond the 4 classes"):
        ClassLogProbability(net)(x, null)


def test_a_gradient_reaches_the_images() -> None:
    x = images(2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(ClassLogProbability(linear_classifier(), (0, 1))(x).sum(), x)
    assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ()}, "at least one"),
        ({"classes": (1, 1)}, "different indices"),
        ({"classes": -1}, "from 0"),
        ({"classes": 1, "temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_classes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassLogProbability(linear_classifier(), **options)


def test_bad_classifiers_are_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        ClassLogProbability(linear_classifier().train(), 0)
    with pytest.raises(ValueError, match=r"classes=\(7,\) are beyond the classifier's 4 classes"):
        ClassLogProbability(linear_classifier(), 7)(images(2))
    with pytest.raises(ValueError, match=r"answered shape \(2,\); expected logits \(2, K\)"):
        ClassLogProbability(lambda x: torch.zeros(2), 0)(images(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_compressibility_is_the_size_of_the_file(channels: int) -> None:
    x = images(2, channels, 32)
    x[1] = 0.5  # flat: small
    reward = Compressibility(quality=80)(x)
    pixels = (x[0] * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format="JPEG", quality=80)
    assert float(reward[0]) == pytest.approx(-len(buffer.getvalue()) / 1000.0)
    assert reward[1] > reward[0]
    assert torch.equal(Compressibility("large", 80)(x), -reward)


def test_what_compressibility_refuses() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        Compressibility()(images(1).requires_grad_(True))
    with pytest.raises(ValueError, match=r"expected \(B, 1 or 3, H, W\)"):
        Compressibility()(images(1, 4))
    with pytest.raises(ValueError, match="quality=0"):
        Compressibility(quality=0)
    with pytest.raises(ValueError, match="wanted='tiny'"):
        Compressibility("tiny")  # type: ignore[arg-type]


class Prompted:
    """A reward that reads prompts: the length of its own."""

    def __init__(self, prompt: str = "") -> None:
        self.prompt = prompt

    def __call__(self, images: Tensor, cond: Conditioning | None = None) -> Tensor:
        return torch.full((len(images),), float(len(self.prompt)))

    def for_prompt(self, prompt: str) -> Prompted:
        return Prompted(prompt)


def test_sums_weigh_their_terms_and_hand_the_prompt_on() -> None:
    def brightness(images: Tensor, cond: object = None) -> Tensor:
        return images.mean((1, 2, 3))

    x = images(3)
    total = WeightedSum([(brightness, 2.0), (Prompted(), 0.5)])
    assert torch.allclose(total(x), 2.0 * brightness(x))
    assert torch.allclose(for_prompt(total, "four")(x), 2.0 * brightness(x) + 2.0)
    assert for_prompt(brightness, "four") is brightness
    assert for_prompt(total, None) is total
    with pytest.raises(ValueError, match="terms is empty"):
        WeightedSum([])
    with pytest.raises(ValueError, match="weight=nan"):
        WeightedSum([(brightness, math.nan)])
    with pytest.raises(TypeError, match="must be callable"):
        WeightedSum([(3.0, 1.0)])  # type: ignore[list-item]


def test_rewards_of_one_class_are_told_apart() -> None:
    """A saved tree is refused under another reward by these."""
    net = linear_classifier()
    one, other = ClassLogProbability(net, 1), ClassLogProbability(net, (1, 2))
    assert describe(one) == "ClassLogProbability(classes=(1,), temperature=1)" != describe(other)
    total = WeightedSum([(one, 1.0), (Compressibility("large", 80), 0.5)])
    assert describe(total) == f"1*{describe(one)} + 0.5*Compressibility(large, 80)"
    assert describe(Prompted()) == "Prompted"
    assert describe(linear_classifier) == "linear_classifier"
