"""Feature extractors: a frozen network with its input size, its input range and a hash of its weights.

Shapes: M images, C channels, S × S levels in 0..255; D features.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import InputError
from .inception import InceptionV3

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network as evaluation runs it: levels (M, C, S, S) in 0..255 to features (M, D).

    `image_size` is None where the network takes any size. `prepare` maps levels to the module's own input.
    `micro_batch` is part of the result's definition to about 1e-6, not a tuning knob.
    """

    name: str
    module: nn.Module
    image_size: int | None
    channels: int = 3
    prepare: Callable[[Tensor], Tensor] = lambda levels: levels / 255.0
    weights_sha256: str = ""
    micro_batch: int = 32

    def __call__(self, levels: Tensor) -> Tensor:
        """Return features (M, D) of levels (M, C, S, S), on the module's device in float32."""
        parameter = next(self.module.parameters(), None)
        device = parameter.device if parameter is not None else levels.device
        # TF32 convolutions, cuDNN's default, keep 10 bits of mantissa.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features: Tensor = self.module(self.prepare(levels.to(device)))
        return features


def make_extractor(
    name: str, module: nn.Module, *, image_size: int | None, device: str = "cpu", **options: Any
) -> FeatureExtractor:
    """Freeze a module (eval mode, float32, no gradients), move it and hash its weights."""
    module = module.to(torch.float32).eval().requires_grad_(False)
    digest = weights_sha256(module)
    return FeatureExtractor(name, module.to(device), image_size, weights_sha256=digest, **options)


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's state: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\t{value.dtype}\t{tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inception_extractor(
    weights: str | Path, *, resize: str = "clean", device: str = "cpu"
) -> FeatureExtractor:
    """Return the FID's Inception network with weights from a safetensors file.

    Under `legacy-torch` the input is scaled as that tool does, 2·level/255 - 1; else (level - 128)/128.

    Raises:
        InputError: the file is missing, not safetensors, or not this network's weights.
    """
    path = Path(weights)
    if path.suffix.lower() in (".pth", ".pt", ".bin", ".ckpt", ".pkl"):
        raise InputError(f"{path}: run `gensample fid convert-weights {path} --sha256 HASH` first")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not readable safetensors weights ({error})") from error
    # On the meta device: no memory, no time and no draw from the global generator for weights to be replaced.
    with torch.device("meta"):
        module = InceptionV3()
    counters = {n: torch.zeros(()) for n in module.state_dict() if n.endswith("num_batches_tracked")}
    wanted = {n: t for n, t in module.state_dict().items() if n not in counters}
    wrong = [n for n, t in wanted.items() if n not in state or state[n].shape != t.shape]
    if wrong:
        raise InputError(f"{path}: not the FID Inception weights; missing or misshapen: {wrong[:3]}")
    module.load_state_dict({**counters, **{n: state[n] for n in wanted}}, assign=True)
    prepare = _same if resize != "legacy-torch" else _legacy_torch_levels
    return make_extractor("inception", module, image_size=299, device=device, prepare=prepare)


def transformers_extractor(
    name: str, weights: str, *, download: bool = False, device: str = "cpu"
) -> FeatureExtractor:
    """Return `dinov2` (the class token after the last norm) or `clip` (the image embedding).

    Args:
        name: "dinov2" or "clip".
        weights: folder, or Hub id; an id is read from the local cache unless `download`.
        download: allow the Hub to be asked.
        device: torch device.

    Raises:
        InputError: transformers is absent, the weights are not there, or not safetensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"--features {name} needs transformers: pip install gensample[text]") from error
    kind = transformers.CLIPVisionModelWithProjection if name == "clip" else transformers.Dinov2Model
    try:
        model = kind.from_pretrained(
            weights, local_files_only=not download, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--features {name}: cannot load {weights!r} ({error}); give --weights a folder with safetensors "
            "weights, or a Hub id together with --download"
        ) from error
    mean, std = _OPENAI if name == "clip" else _IMAGENET
    return make_extractor(
        name,
        _Pooled(model, "image_embeds" if name == "clip" else "pooler_output", mean, std),
        image_size=_image_size(Path(weights), model.config, name),
        device=device,
        prepare=_same,
    )


def module_extractor(
    entry_point: str, *, image_size: int | None = None, device: str = "cpu"
) -> FeatureExtractor:
    """Return an nn.Module named `module:attribute`: the module itself, or something callable that makes it.

    It maps float32 images (M, C, H, W) in [0, 1] to (M, D). Its attributes `image_size` and `in_channels`
    (1 or 3), when present, say what it expects.

    Raises:
        InputError: nothing of that name, or not an nn.Module.
    """
    module_name, _, attribute = entry_point.partition(":")
    try:
        target = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--features {entry_point}: cannot import ({error})") from error
    module = target if isinstance(target, nn.Module) else target() if callable(target) else target
    if not isinstance(module, nn.Module):
        raise InputError(f"--features {entry_point}: expected an nn.Module, got {type(module).__name__}")
    size = image_size if image_size is not None else getattr(module, "image_size", None)
    channels = getattr(module, "in_channels", 3)
    if channels not in (1, 3):
        raise InputError(f"--features {entry_point}: in_channels must be 1 or 3, got {channels!r}")
    return make_extractor(entry_point, module, image_size=size, device=device, channels=channels)


class _Pooled(nn.Module):
    """A transformers vision model on levels, returning one field of its output, (M, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, field: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model, self.field = model, field
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1) * 255, persistent=False)

    def forward(self, levels: Tensor) -> Tensor:
        """Map levels (M, 3, S, S) to (M, D)."""
        features: Tensor = getattr(self.model(pixel_values=(levels - self.mean) / self.std), self.field)
        return features


def _image_size(folder: Path, config: Any, name: str) -> int:
    """Return the crop of the model's own preprocessor, else its input size (DINOv2: at most 224)."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        crop = json.loads(file.read_text()).get("crop_size")
        size = crop.get("height") if isinstance(crop, dict) else crop
        if isinstance(size, int):
            return size
    return int(config.image_size) if name == "clip" else min(int(config.image_size), 224)


def _same(levels: Tensor) -> Tensor:
    return levels


def _legacy_torch_levels(levels: Tensor) -> Tensor:
    # The module computes (x - 128) / 128; this x makes that 2·level/255 - 1.
    return levels * (256.0 / 255.0)
