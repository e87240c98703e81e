"""The two classifiers: shapes, probabilities, independence of the batch, gradients, saving, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gensample.models.classifier import Classifier
from tests.models.tiny_models import use_torch_initialisers

ARCHITECTURES = ["plain", "residual"]


def images(batch: int = 5, *, size: int = 28) -> torch.Tensor:
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_sizes_and_probabilities(architecture: str) -> None:
    model = Classifier(architecture=architecture)
    assert 0.25e6 < sum(p.numel() for p in model.parameters()) < 1e6
    x, labels = images(), torch.tensor([0, 3, 9, 1, 1])
    features, logits = model.features(x), model(x)
    assert features.shape == (5, 64)
    assert logits.shape == (5, 10)
    assert torch.equal(model.head(features), logits)
    expected = logits - logits.exp().sum(-1, keepdim=True).log()
    assert torch.allclose(model.log_prob(x, labels), expected[torch.arange(5), labels], atol=1e-6)
    assert model.to(torch.bfloat16).log_prob(x, labels).dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_depend_on_neither_batch_nor_mode(architecture: str) -> None:
    model = Classifier(architecture=architecture)
    before = torch.get_rng_state()
    together = model.train()(images())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model.eval()(images()), together)
    alone = torch.cat([model(row[None]) for row in images()])
    assert (alone - together).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_with_respect_to_the_image(architecture: str) -> None:
    model = Classifier(architecture=architecture, width=8, feature_dim=8).double()
    x = images(1, size=12).double().requires_grad_()
    label = torch.tensor([4])
    (gradient,) = torch.autograd.grad(model.log_prob(x, label).double().sum(), x)
    direction = gradient / gradient.norm()
    step = 1e-6
    with torch.no_grad():
        shift = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
        slope = shift[0, 4] - (model(x).softmax(-1) * shift).sum()
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_learns_a_small_task(architecture: str) -> None:
    """Do stripes run along the rows or along the columns: 16 images, 15 steps."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 2
    stripes = torch.arange(8).remainder(2).float().expand(8, 8)
    patterns = torch.where(labels[:, None, None] == 0, stripes, stripes.T)[:, None]
    x = 0.5 * patterns + 0.5 * torch.rand(16, 1, 8, 8, generator=generator)
    model = Classifier(architecture=architecture, num_classes=2, width=8, feature_dim=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        (-model.log_prob(x, labels).mean()).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == labels).all()
    assert model.log_prob(x, labels).mean() > -0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load(tmp_path: Path, architecture: str) -> None:
    model = Classifier(architecture=architecture, width=8, feature_dim=12, num_classes=3)
    model.initialize_weights(seed=7)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path, use_safetensors=True)
    assert loaded.config.architecture == architecture
    assert torch.equal(loaded(images()), model(images()))


def test_weights_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torch_initialisers(monkeypatch)
    before = torch.get_rng_state()
    a, b, c = Classifier(width=8), Classifier(width=8), Classifier(width=8)
    c.initialize_weights(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a(images()), b(images()))
    assert not torch.equal(a(images()), c(images()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "vit"}, "architecture must be one of plain, residual, got 'vit'"),
        ({"width": 12}, "width must be a positive multiple of 8, got 12"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
    ],
)
def test_bad_configuration(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Classifier(**options)


def test_bad_images_and_labels() -> None:
    model = Classifier(width=8)
    for bad in (images()[:, 0], images().expand(5, 3, 28, 28), images()[..., :3]):
        with pytest.raises(ValueError, match=r"images must have shape \(B, 1, H, W\)"):
            model(bad)
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        model((255 * images()).to(torch.uint8))
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\)"):
        model.log_prob(images(), torch.tensor([1]))
