"""The peers' half of benchmarks/fid.py: reads one JSON request a line, answers one JSON line, in their environment.

Every answer carries CPU seconds of this process and its finished children (loader workers), and wall seconds.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import scipy.linalg

warnings.filterwarnings("ignore")


def cpu_seconds() -> float:
    """CPU seconds, user and system, of this process and its finished children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def timed(function: Callable[[], Any]) -> dict[str, Any]:
    """Run once; return value, CPU and wall seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    value = function()
    return {"value": value, "cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}


def frechet(tool: str, mu1: Any, s1: Any, mu2: Any, s2: Any) -> float:
    """Call the tool's own function."""
    if tool == "pytorch-fid":
        from pytorch_fid.fid_score import calculate_frechet_distance

        return float(calculate_frechet_distance(mu1, s1, mu2, s2))
    if tool == "clean-fid":
        from cleanfid.fid import frechet_distance

        return float(frechet_distance(mu1, s1, mu2, s2))
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    stats = ({"mu": mu1, "sigma": s1}, {"mu": mu2, "sigma": s2})
    return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])


def without_disp(shimmed: bool) -> dict[str, str]:
    """Say what each tool does where scipy.linalg.sqrtm has lost its argument `disp` (SciPy 1.18)."""
    original = scipy.linalg.sqrtm

    def modern(a: Any) -> Any:
        return original(a)

    def shim(a: Any, disp: bool = True) -> Any:
        root = original(a)
        return root if disp else (root, 0.0)

    scipy.linalg.sqrtm = shim if shimmed else modern
    outcome = {}
    for tool in ("pytorch-fid", "clean-fid", "torch-fidelity"):
        try:
            value = frechet(tool, np.zeros(3), np.eye(3), np.ones(3), np.eye(3))
            outcome[tool] = f"runs, {value:.6g}"
        except TypeError as error:
            outcome[tool] = f"TypeError: {error}"
    scipy.linalg.sqrtm = original
    return outcome


def load(files: list[str], workers: int) -> int:
    """Decode and resize as clean-fid's get_files_features does, up to the network."""
    import torch
    from cleanfid.utils import ResizeDataset

    dataset = ResizeDataset(files, mode="clean")
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=False, num_workers=workers)
    return sum(len(batch) for batch in loader)


def resize(folder: str, files: list[str]) -> float:
    """Resize decoded images in this process; return CPU seconds an image, and keep the first for comparison."""
    from cleanfid.resize import build_resizer
    from PIL import Image

    function = build_resizer("clean")
    images = [np.array(Image.open(f).convert("RGB")) for f in files]
    start = time.process_time()
    out = [function(image) for image in images]
    seconds = (time.process_time() - start) / len(files)
    np.save(os.path.join(folder, "cleanfid.npy"), np.stack(out[:8]))
    return seconds


def decode(files: list[str]) -> float:
    """Decode in this process; CPU seconds an image."""
    from PIL import Image

    start = time.process_time()
    for f in files:
        np.array(Image.open(f).convert("RGB"))
    return (time.process_time() - start) / len(files)


def answer(request: dict[str, Any]) -> Any:
    """Serve one request."""
    what, folder = request["what"], request.get("folder", ".")
    if what == "versions":
        import cleanfid
        import PIL
        import pytorch_fid
        import torch
        import torch_fidelity

        torch.set_num_threads(1)
        from importlib.metadata import version

        names = [cleanfid, pytorch_fid, torch_fidelity, PIL]
        assert all(names)
        packages = ("clean-fid", "pytorch-fid", "torch-fidelity", "torch", "scipy", "numpy", "pillow")
        return {package: version(package) for package in packages}
    if what == "frechet":
        arrays = [np.load(os.path.join(folder, f"{n}.npy")) for n in ("mu1", "s1", "mu2", "s2")]
        return timed(lambda: frechet(request["tool"], *arrays))
    if what == "without_disp":
        return without_disp(request["shimmed"])
    if what == "load":
        return timed(lambda: load(request["files"], request["workers"]))
    if what == "resize":
        return resize(folder, request["files"])
    return decode(request["files"])


if __name__ == "__main__":
    for line in sys.stdin:
        # Libraries print; only the marked line is the answer.
        print("ANSWER" + json.dumps(answer(json.loads(line))), flush=True)
