"""Side by side with pytorch-fid, clean-fid and torch-fidelity, in one run with interleaved repeats.

    python3 -m venv /tmp/fidpeers/venv          # torchvision does not import beside CPU torch 2.13
    /tmp/fidpeers/venv/bin/pip install torch==2.14.1 torchvision==0.29.1 torch-fidelity pytorch-fid clean-fid
    OMP_NUM_THREADS=1 python benchmarks/fid.py --peers /tmp/fidpeers/venv/bin/python | tee benchmarks/results/fid.txt

Times are CPU seconds (loader workers included) and ratios are of medians: this is meant for a shared machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fid_peers import timed
from PIL import Image

from gensample.metrics import frechet_distance, frechet_distance_from_features
from gensample.metrics.decode import ImagePolicy, decode_image
from gensample.metrics.loading import Preparation, load_chunks
from gensample.metrics.sources import FolderSource

TOOLS = ("pytorch-fid", "clean-fid", "torch-fidelity")


class Peers:
    """The other environment's process."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("fid_peers.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str, **more: Any) -> Any:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **more}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise RuntimeError(f"the peers' process ended while asked for {what}")


def commuting(d: int, rank1: int, rank2: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Two covariances with common eigenvectors and their exact distance."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    w1 = np.where(np.arange(d) < rank1, rng.random(d) + 0.01, 0.0)
    w2 = np.where(np.arange(d) < rank2, rng.random(d) + 0.01, 0.0)
    s1, s2 = (q * w1) @ q.T, (q * w2) @ q.T
    return (s1 + s1.T) / 2, (s2 + s2.T) / 2, float(((np.sqrt(w1) - np.sqrt(w2)) ** 2).sum())


def bench_frechet(peers: Peers, folder: str, repeats: int, d: int) -> None:
    """Time the Fréchet step on full-rank, rank-deficient and N < D statistics."""
    print(f"\nFréchet step, D = {d}, one thread, median CPU seconds of {repeats} interleaved repeats")
    rng = np.random.default_rng(1)
    features = [rng.standard_normal((d // 4, d)), rng.standard_normal((d // 4, d)) * 1.1 + 0.1]
    gram = [(x.mean(0), np.cov(x, rowvar=False)) for x in features]
    zero = np.zeros(d)
    cases: list[tuple[str, Any, float | None]] = []
    for name, ranks in (("full rank", (d, d)), ("rank deficient", (d * 1000 // 2048, d * 1300 // 2048))):
        s1, s2, truth = commuting(d, *ranks)
        cases.append((name, (zero, s1, zero, s2), truth))
    cases.append((f"N = {d // 4} < D", (*gram[0], *gram[1]), None))
    for name, arrays, truth in cases:
        for label, array in zip(("mu1", "s1", "mu2", "s2"), arrays, strict=True):
            np.save(os.path.join(folder, f"{label}.npy"), array)
        rows: dict[str, list[dict[str, Any]]] = {tool: [] for tool in ("gensample", *TOOLS)}
        for _ in range(repeats):
            if truth is None:
                rows["gensample"].append(timed(lambda: frechet_distance_from_features(*features).value))
            else:
                rows["gensample"].append(timed(lambda a=arrays: frechet_distance(*a).value))
            for tool in TOOLS:
                rows[tool].append(peers.ask("frechet", folder=folder, tool=tool))
        ours = statistics.median(r["cpu"] for r in rows["gensample"])
        for tool, results in rows.items():
            seconds = statistics.median(r["cpu"] for r in results)
            value = results[0]["value"]
            error = f"error {value - truth:+.1e}" if truth is not None else f"value {value:.9f}"
            print(
                f"  {name:16} {tool:15} {seconds:8.3f} s   {seconds / ours:6.1f} x ours   {error}", flush=True
            )


def make_images(folder: Path, unique: int, count: int) -> dict[str, list[str]]:
    """Write `unique` 512 px pictures with a natural 1/f spectrum as PNG and JPEG, hard-linked to `count` names."""
    files: dict[str, list[str]] = {}
    rng = np.random.default_rng(0)
    for kind in ("png", "jpeg"):
        (folder / kind).mkdir()
        files[kind] = [str(folder / kind / f"{i}.{kind}") for i in range(count)]
    for i in range(unique):
        levels = np.zeros((512, 512, 3))
        for octave in range(1, 8):
            n = 2**octave
            noise = Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8))
            levels += np.asarray(noise.resize((512, 512), Image.Resampling.BICUBIC), float) / n
        levels += rng.normal(0, 0.012, levels.shape)
        levels = (levels - levels.min()) / (levels.max() - levels.min()) * 255
        image = Image.fromarray(levels.astype(np.uint8))
        image.save(files["png"][i])
        image.save(files["jpeg"][i], quality=90)
        for j in range(i + unique, count, unique):
            for kind in files:
                os.link(files[kind][i], files[kind][j])
    return files


def load_ours(source: FolderSource, indices: list[int], workers: int) -> int:
    """Decode and resize as `gensample fid` does, up to the network."""
    chunks = load_chunks(
        source, indices, Preparation((299, 299)), micro_batch=32, batch_size=32, num_workers=workers
    )
    return sum(int(chunk.valid.sum()) for chunk in chunks)


def bench_loading(peers: Peers, folder: str, args: argparse.Namespace) -> None:
    """Time decode, resize, and both together in loader workers."""
    print(f"\nDecode and resize to 299, 512 px, {args.images} files ({args.unique} pictures, hard-linked)")
    files = make_images(Path(folder), args.unique, args.images)
    for kind in ("png", "jpeg"):
        size = statistics.mean(os.path.getsize(f) for f in files[kind][: args.unique])
        source = FolderSource(Path(folder) / kind)
        names = [source.name(i) for i in range(len(source))]
        single = names[:100]
        ours = {"decode": [], "resize": [], "load": []}  # type: dict[str, list[float]]
        theirs = {"decode": [], "resize": [], "load": []}  # type: dict[str, list[float]]
        walls: tuple[list[float], list[float]] = ([], [])
        prepare = Preparation((299, 299))
        for block in range(args.repeats):
            part = list(range(block * args.images // args.repeats, (block + 1) * args.images // args.repeats))
            ours["decode"].append(
                timed(lambda p=single: [decode_image(f, ImagePolicy()) for f in p])["cpu"] / 100
            )
            theirs["decode"].append(peers.ask("decode", files=single))
            decoded = [decode_image(f, ImagePolicy()) for f in single]
            ours["resize"].append(timed(lambda d=decoded, to=prepare: [to(x) for x in d])["cpu"] / 100)
            theirs["resize"].append(peers.ask("resize", folder=folder, files=single))
            mine = timed(lambda s=source, p=part: load_ours(s, p, args.workers))
            other = peers.ask("load", files=[names[i] for i in part], workers=args.workers)
            assert mine["value"] == other["value"] == len(part)
            for times, wall, result in ((ours, walls[0], mine), (theirs, walls[1], other)):
                times["load"].append(result["cpu"] / len(part))
                wall.append(result["wall"] / len(part))
        reference = np.load(os.path.join(folder, "cleanfid.npy")).transpose(0, 3, 1, 2)
        difference = max(
            float(np.abs(prepare(x).numpy() - y).max()) for x, y in zip(decoded, reference, strict=False)
        )
        print(
            f"  {kind}: {size / 1024:.0f} KiB a file; largest difference of the output {difference:.1e} levels"
        )
        for step, note in (
            ("decode", "one process"),
            ("resize", "one process"),
            ("load", f"{args.workers} workers"),
        ):
            a, b = statistics.median(ours[step]), statistics.median(theirs[step])
            print(
                f"    {step:7} ({note:11}) ours {a * 1e3:6.2f} ms CPU, clean-fid {b * 1e3:6.2f}: {b / a:.2f} x"
            )
        a, b = (statistics.median(w) for w in walls)
        print(
            f"    load by wall clock      ours {1 / a:6.0f} images/s, clean-fid {1 / b:6.0f}: {b / a:.2f} x",
            flush=True,
        )


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", required=True, help="python of the peers' environment")
    parser.add_argument("--part", choices=["all", "frechet", "loading"], default="all")
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--frechet-repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--unique", type=int, default=250)
    parser.add_argument(
        "--repeats", type=int, default=5, help="interleaved blocks that the images are split into"
    )
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    peers = Peers(args.peers)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?")  # noqa: SIM115
    print("command: " + " ".join(["benchmarks/fid.py", *sys.argv[1:]]))
    print(f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    print(
        f"machine: {cpu}, {os.cpu_count()} cores (shared), load {os.getloadavg()[0]:.1f}; {platform.platform()}"
    )
    print(f"ours: torch {torch.__version__}, numpy {np.__version__}; peers: {peers.ask('versions')}")
    print("\nWhere scipy.linalg.sqrtm has no `disp` (SciPy 1.18):")
    for shimmed in (False, True):
        for tool, outcome in peers.ask("without_disp", shimmed=shimmed).items():
            print(f"  {tool:15} {'with our shim' if shimmed else 'as it ships':14} {outcome}")
    with tempfile.TemporaryDirectory() as folder:
        if args.part in ("all", "frechet"):
            bench_frechet(peers, folder, args.frechet_repeats, args.dimension)
        if args.part in ("all", "loading"):
            bench_loading(peers, folder, args)
    assert peers.process.stdin is not None
    peers.process.stdin.close()


if __name__ == "__main__":
    main()
