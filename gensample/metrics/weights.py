"""The published FID Inception weights: fetching on request, and conversion to safetensors.

`convert_weights` is the only function of the project that opens the published file, and it does so with
`weights_only=True` and after the checksum.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from .errors import InputError
from .features import file_sha256
from .inception import InceptionV3

# The PyTorch port of TensorFlow's inception-2015-12-05 graph that the FID is defined by. The first eight
# digits of the hash are part of the published file's name.
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_MAX_BYTES = 2**28


def default_weights_path() -> Path:
    """Return where converted weights are looked for: $XDG_CACHE_HOME/gensample or ~/.cache/gensample."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "gensample" / "inception-2015-12-05.safetensors"


def convert_weights(source: str | Path, target: str | Path, *, sha256: str = SHA256) -> Path:
    """Write the published Inception weights as safetensors, atomically, and return the target.

    Args:
        source: the published PyTorch file.
        target: the safetensors file to write.
        sha256: what the source must hash to, checked before it is opened; default: the published file's.

    Raises:
        InputError: missing file, wrong checksum, or not the weights of this network.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    actual = file_sha256(path)
    if actual != sha256.lower():
        raise InputError(f"{path}: SHA-256 is {actual}, expected {sha256}; the file was not opened")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a plain PyTorch state dictionary ({error})") from error
    with torch.device("meta"):
        expected = InceptionV3().state_dict()
    tensors = {}
    for name, example in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not isinstance(state, dict) or name not in state or state[name].shape != example.shape:
            raise InputError(f"{path}: not the FID Inception weights: {name} is missing or misshapen")
        tensors[name] = state[name].to(torch.float32).contiguous()
    out = Path(target)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, suffix=".tmp")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata={"source_sha256": actual})
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return out


def _open(url: str) -> Any:
    return urllib.request.urlopen(url, timeout=60)  # noqa: S310 - `url` is this module's constant


def download_weights(target: str | Path, *, url: str = URL, sha256: str = SHA256) -> Path:
    """Fetch the published file, check it, convert it to `target` and keep only that.

    Raises:
        InputError: the network or the checksum fails; nothing is left behind.
    """
    out = Path(target)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, suffix=".download")
    digest, received = hashlib.sha256(), 0
    try:
        with os.fdopen(descriptor, "wb") as stream, _open(url) as reply:
            length = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=length, unit="B", unit_scale=True, desc="weights") as bar:
                while block := reply.read(2**20):
                    received += len(block)
                    if received > _MAX_BYTES:
                        raise InputError(f"{url}: more than {_MAX_BYTES} bytes; stopped")
                    digest.update(block)
                    stream.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != sha256:
            raise InputError(f"{url}: SHA-256 is {digest.hexdigest()}, expected {sha256}; discarded")
        return convert_weights(temporary, out, sha256=sha256)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"{url}: download failed ({error}); fetch the file elsewhere and run "
            "`gensample fid convert-weights FILE`"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
