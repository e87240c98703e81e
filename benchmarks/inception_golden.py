"""Regenerate tests/metrics/golden/inception.safetensors from torch-fidelity's Inception network.

Runs in the peers' environment (see benchmarks/fid.py), not in gensample's:

    /tmp/fidpeers/venv/bin/python benchmarks/inception_golden.py

Weights and images come from the formula in tests/metrics/synthetic_weights.py; the file holds only outputs.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
import torch_fidelity
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"exact": (299, 299), "enlarged": (64, 48), "reduced": (360, 512)}


def main() -> None:
    """Compute and write the golden features."""
    spec = importlib.util.spec_from_file_location("synthetic", ROOT / "tests/metrics/synthetic_weights.py")
    assert spec is not None
    assert spec.loader is not None
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    torch.set_num_threads(1)
    # The constructor insists on a file; the shapes come from a first, empty construction.
    original = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, *args, **kwargs: None
    with tempfile.NamedTemporaryFile(suffix=".pt") as empty:
        torch.save({}, empty.name)
        network = FeatureExtractorInceptionV3("golden", ["2048"], feature_extractor_weights_path=empty.name)
    FeatureExtractorInceptionV3.load_state_dict = original
    network.load_state_dict(synthetic.synthetic_state_dict(network))
    with torch.no_grad():
        features = {
            name: network(synthetic.synthetic_images(name, 1, *size))[0] for name, size in SIZES.items()
        }
    target = ROOT / "tests/metrics/golden/inception.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    note = f"torch-fidelity {torch_fidelity.__version__}, torch {torch.__version__}"
    save_file(features, target, metadata={"made_by": note})
    print(note, {name: tuple(value.shape) for name, value in features.items()})


if __name__ == "__main__":
    main()
