"""Our Inception network against torch-fidelity's, by golden outputs (benchmarks/inception_golden.py)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from gensample.metrics.errors import InputError
from gensample.metrics.features import inception_extractor
from gensample.metrics.inception import NUM_FEATURES, InceptionV3
from gensample.metrics.resize import resize

GOLDEN = Path(__file__).parent / "golden" / "inception.safetensors"


@pytest.fixture(scope="module")
def network(synthetic: ModuleType) -> InceptionV3:
    module = InceptionV3()
    module.load_state_dict(synthetic.synthetic_state_dict(module))
    return module.eval()


@pytest.mark.parametrize(
    ("name", "size"), [("exact", (299, 299)), ("enlarged", (64, 48)), ("reduced", (360, 512))]
)
def test_features_equal_torch_fidelity(
    network: InceptionV3, synthetic: ModuleType, name: str, size: tuple[int, int]
) -> None:
    image = synthetic.synthetic_images(name, 1, *size)[0]
    with torch.no_grad():
        features = network(resize(image, 299, "legacy-tf")[None])[0]
    golden = load_file(GOLDEN)[name]
    assert features.shape == (NUM_FEATURES,)
    assert float((features - golden).abs().max() / golden.abs().max()) < 1e-5


def test_extractor_reads_safetensors_and_scales_as_the_mode_says(
    network: InceptionV3, synthetic: ModuleType, tmp_path: Path
) -> None:
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    levels = synthetic.synthetic_images("levels", 1, 80, 80).float()
    clean = inception_extractor(tmp_path / "w.safetensors")
    legacy = inception_extractor(tmp_path / "w.safetensors", resize="legacy-torch")
    assert clean.weights_sha256 == legacy.weights_sha256 != ""
    with torch.no_grad():
        assert torch.equal(clean(levels), network(levels))
        # pytorch-fid feeds 2·x − 1 with x in [0, 1].
        expected = network((2 * levels / 255 - 1) * 128 + 128)
        torch.testing.assert_close(legacy(levels), expected, rtol=1e-4, atol=1e-4)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    save_file({"conv": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name, message in [
        ("other.safetensors", "not the FID Inception weights"),
        ("cut.safetensors", "not readable safetensors"),
        ("missing.safetensors", "not readable safetensors"),
        ("published.pth", "convert-weights"),
    ]:
        with pytest.raises(InputError, match=message):
            inception_extractor(tmp_path / name)
