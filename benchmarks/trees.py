"""What the tree engine costs and saves; every comparison in one run, in CPU seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/trees.py              (about five minutes of a free core)

1. Rollouts a second on the shipped DiT (5.5 M parameters, 16 steps of ``exp``): a plain batched loop against DTS of
   as many denoiser evaluations, batch 16 against 1, continuous against lockstep batching.
2. Bookkeeping: microseconds an iteration of selection, insertion and backup, rewards given, at 10^3 to 10^4
   iterations of (2, 0.8) over five depths, beside Python objects that recompute each mean over all children.
3. Memory: bytes of the arena and of the states, half precision at branch levels against every step in float32.
4. Draws a second: the leaf identity against walking down.

Times are CPU seconds (time.process_time, best of the repeats), since other work shares the machine.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gensample
from gensample.denoisers import denoiser_from_pipeline
from gensample.noise import NoiseStream
from gensample.search import DTS, SearchProblem
from gensample.search.tree import Tree
from gensample.search.tree_rules import TreeRules
from gensample.solvers import Diffusion, make_solver
from gensample.trees import Chain, DenoiserChain
from gensample.trees.chain import Answer, Int64

STEPS = 16


def shipped_chain(micro_batch: int = 16) -> DenoiserChain:
    """The shipped model, label 3, under the marginal-preserving SDE."""
    denoiser = denoiser_from_pipeline(gensample.load("fashion"), class_labels=[3])
    solver = make_solver(
        "exp", path=denoiser.path, prediction_type=denoiser.prediction_type, times=denoiser.times(STEPS),
        diffusion=Diffusion("sigma", 1.0),
    )  # fmt: skip
    return DenoiserChain.from_solver(denoiser, solver, micro_batch=micro_batch)


def brightness(images: Tensor, cond: object = None) -> Tensor:
    """A reward that costs nothing."""
    return 20.0 * images.mean((1, 2, 3))


def plain_loop(chain: DenoiserChain, rollouts: int, batch: int) -> None:
    """Batches of plain rollouts, scored: network, transition law and keyed noise, nothing else."""
    for first in range(0, rollouts, batch):
        rows = min(batch, rollouts - first)
        noise = NoiseStream.from_generator(0, rows, sample_ids=range(first, first + rows))
        x, sample = chain.initial(noise), np.zeros(rows, dtype=np.int64)
        for step in range(chain.num_steps):
            level = np.full(rows, step)
            law = chain.transition(x, level, chain.answer(x, level, sample))
            x = law.sample(law.draw_noise(noise.extend(level), path=()))
        brightness(chain.decode(x))


def cpu_time(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def engine(evaluations: int, repeats: int) -> None:
    """Part 1."""
    chain = shipped_chain()
    plain_loop(chain, 16, 16)

    def grow(method: DTS) -> tuple[float, int, int]:
        problem = SearchProblem(chain, brightness, seed=1)
        before = chain.evaluations
        run = method.plant(problem, evaluations)
        took = cpu_time(lambda: run.grow_to(evaluations))
        return took, chain.evaluations - before, run.tree.leaves

    late = (8, 10, 12, 14)
    methods = {
        "16 rows, roots only (equal work)": DTS(levels=(), exponent=1.0, rows=16),
        "16 rows, (2, .8), lockstep": DTS(levels=late, rows=16),
        "16 rows, (2, .8), continuous": DTS(levels=late, rows=16, batching="continuous"),
        "16 rows, (1, .5), lockstep": DTS(levels=late, coefficient=1.0, exponent=0.5, rows=16),
        "16 rows, (1, .5), continuous": DTS(
            levels=late, coefficient=1.0, exponent=0.5, rows=16, batching="continuous"
        ),
        "1 row, (2, .8)": DTS(levels=late),
    }
    best: dict[str, tuple[float, int, int]] = {}
    plain = math.inf
    rollouts = evaluations // STEPS
    for _ in range(repeats):  # interleaved, so that a busy minute hits all
        plain = min(plain, cpu_time(lambda: plain_loop(chain, rollouts, 16)))
        for name, method in methods.items():
            best[name] = min(best.get(name, (math.inf, 0, 0)), grow(method))
    print(f"  {'plain loop, batch 16':34s} {plain:7.2f} s  {rollouts / plain:7.1f} rollouts/s", end="")
    print(f"  {rollouts * STEPS / plain:7.0f} evaluations/s")
    for name, (took, spent, leaves) in best.items():
        print(
            f"  {name:34s} {took:7.2f} s  {leaves / took:7.1f} rollouts/s  {spent / took:7.0f} evaluations/s"
        )
    rates = {name: spent / took for name, (took, spent, _) in best.items()}
    reference = rollouts * STEPS / plain
    for name in list(methods)[:5]:
        print(f"  overhead of {name}: {100 * (reference / rates[name] - 1):+.1f} % an evaluation")
    print(f"  batch 16 against 1: {rates['16 rows, (2, .8), lockstep'] / rates['1 row, (2, .8)']:.2f} x")
    for setting in ("(2, .8)", "(1, .5)"):
        ratio = rates[f"16 rows, {setting}, continuous"] / rates[f"16 rows, {setting}, lockstep"]
        print(f"  continuous against lockstep, {setting}: {ratio:.2f} x evaluations a second")
    occupancy()


def occupancy() -> None:
    """Rows in a network call, lockstep against continuous: what a device with idle lanes would gain."""
    for coefficient, exponent in ((2.0, 0.8), (1.0, 0.5)):
        mean_rows = {}
        for batching in ("lockstep", "continuous"):
            chain = FreeChain(100)
            method = DTS(
                levels=(20, 40, 60, 80), coefficient=coefficient, exponent=exponent, rows=16,
                batching=batching, stride=1, power=1.0, epsilon=0.0,
            )  # fmt: skip
            run = method.plant(SearchProblem(chain, first_coordinate, seed=0), 60_000)
            run.grow_to(60_000)
            mean_rows[batching] = chain.evaluations / chain.calls
        ratio = mean_rows["continuous"] / mean_rows["lockstep"]
        text = ", ".join(f"{name} {rows:.1f}" for name, rows in mean_rows.items())
        print(
            f"  rows a call of 16, ({coefficient:g}, {exponent:g}), published levels, T = 100: {text}: {ratio:.2f} x"
        )


class FreeChain(Chain):
    """Brownian motion, of two coordinates by default: costs nothing, counts calls, keeps its states if asked to."""

    def __init__(self, num_steps: int, shape: tuple[int, ...] = (2,), *, keep: bool = False) -> None:
        self.num_steps, self.shape, self.evaluations, self.calls = num_steps, shape, 0, 0
        self.kept: list[Tensor] | None = [] if keep else None

    def initial(self, noise: NoiseStream) -> Tensor:
        return noise.normal(self.shape)

    def answer(self, x: Tensor, level: Int64, sample: Int64, *, grad: bool = False) -> Answer:
        self.evaluations += len(x)
        self.calls += 1
        if self.kept is not None:
            self.kept.append(x.clone())
        return Answer(x)

    def transition(self, x: Tensor, level: Int64, answer: Answer) -> gensample.GaussianTransition:
        from gensample.transitions import GaussianTransition

        return GaussianTransition(x, 0.1)

    def x0(self, x: Tensor, level: Int64, answer: Answer) -> Tensor:
        return x

    def decode(self, x: Tensor, *, grad: bool = False) -> Tensor:
        return x

    def is_stochastic(self, step: int) -> bool:
        return True


def first_coordinate(x: Tensor, cond: object = None) -> Tensor:
    """A reward."""
    return x.flatten(1)[:, 0]


@dataclass
class Node:
    """A node of the per-node tree: what a direct implementation of the paper's algorithm keeps."""

    parent: Node | None
    depth: int
    value: float = 0.0
    visits: int = 1
    children: list[Node] = field(default_factory=list)
    state: Tensor | None = None


def python_tree(rewards: np.ndarray, rng: np.random.Generator, depths: int = 5) -> int:
    """DTS over Python objects, torch softmax and logsumexp over all children of every node passed."""
    root, count = Node(None, 0), 0
    for reward in rewards.tolist():
        node = root
        while node.depth < depths and len(node.children) >= 2.0 * node.visits**0.8:
            values = torch.tensor([c.value for c in node.children], dtype=torch.float64)
            p = torch.softmax(values, 0).numpy()
            node = node.children[int(np.searchsorted(p.cumsum(), rng.random() * 0.999999))]
        parent = node
        while node.depth < depths:
            child = Node(node, node.depth + 1, value=reward)
            node.children.append(child)
            node, count = child, count + 1
        up: Node | None = parent
        while up is not None:
            if up.children:
                values = torch.tensor([c.value for c in up.children], dtype=torch.float64)
                up.value = float(torch.logsumexp(values, 0)) - math.log(len(up.children))
            up.visits += 1
            up = up.parent
    return count


def our_tree(rewards: np.ndarray) -> Tree:
    """The same with our arena; no states, no chain: bookkeeping alone."""
    rules = TreeRules((20, 40, 60, 80), 2.0, 0.8)
    tree = Tree(SearchProblem(FreeChain(100), first_coordinate), rules)
    trail = [torch.zeros(2)] * 5
    for reward in rewards.tolist():
        while (ticket := tree.issue()) is None:
            pass
        tree.commit(ticket, trail[len(ticket.nodes) - 1 :], reward)
    return tree


def bookkeeping(repeats: int) -> None:
    """Part 2."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal(10_000)
    times: dict[tuple[str, int], float] = {}
    for n in (1_000, 3_000, 10_000):
        ours = min(cpu_time(lambda n=n: our_tree(rewards[:n])) for _ in range(repeats))
        times["arena", n] = ours
        times["objects", n] = cpu_time(lambda n=n: python_tree(rewards[:n], np.random.default_rng(1)))
        print(
            f"  {n:6d} iterations: arena {1e6 * ours / n:6.1f} us each, Python objects "
            f"{1e6 * times['objects', n] / n:8.1f} us: {times['objects', n] / ours:5.1f} x"
        )
    for name in ("arena", "objects"):
        growth = math.log10(times[name, 10_000] / times[name, 1_000])
        print(f"  {name}: total time grows as M^{growth:.2f} from 1e3 to 1e4")


def memory() -> None:
    """Part 3."""
    tree = our_tree(np.random.default_rng(0).standard_normal(10_000))
    nodes, leaves = tree.arena.size - 1, tree.leaves
    print(
        f"  arena: {tree.arena.nbytes / nodes:.0f} bytes a node with spare room ({nodes} nodes, {leaves} leaves)"
    )
    chain, budget = shipped_chain(), 640
    sizes = {}
    for name, storage in (("float16", "float16"), ("float32", None)):
        run = DTS(levels=(8, 10, 12, 14), rows=16, storage=storage).plant(
            SearchProblem(chain, brightness, seed=1), budget
        )
        run.grow_to(budget)
        sizes[name] = run.tree.latents.nbytes
        spent = run.tree.evaluations
    each = 4 * math.prod(chain.shape)
    every = spent * each
    for name, size in sizes.items():
        print(f"  states, branch levels in {name}: {size / 1e6:.2f} MB; every step in float32: {every / 1e6:.2f} MB: "
              f"{every / size:.1f} x")  # fmt: skip
    sd = 4 * 64 * 64
    profile = np.bincount(tree.arena.depth[1 : tree.arena.size], minlength=6)[1:]
    branch, ends = profile[:-1].sum(), profile[-1]
    steps = 50 / 100  # the same tree over 50 steps
    grid = np.array([0, 20, 40, 60, 80, 100])
    tops = (tree.arena.ordinal[1 : tree.arena.size] > 0) | (tree.arena.parent[1 : tree.arena.size] == 0)
    starts = tree.arena.depth[1 : tree.arena.size][tops].astype(int) - 1
    walked = steps * (100 - grid[starts]).sum()
    print(f"  64 x 64 x 4 latents, 50 steps, this tree: {(2 * branch + 4 * ends) * sd / 1e6:.0f} MB against "
          f"{4 * walked * sd / 1e6:.0f} MB: {4 * walked / (2 * branch + 4 * ends):.1f} x")  # fmt: skip


def peak_memory() -> None:
    """Part 3, measured: peak resident memory above the start, each in a process of its own."""
    context = multiprocessing.get_context("fork")
    peaks = {}
    for name, keep, storage in (
        ("every step in float32", True, None),
        ("branch levels in float16", False, "float16"),
    ):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_grow_large, args=(keep, storage, theirs))
        child.start()
        peaks[name] = ours.recv()
        child.join()
    for name, peak in peaks.items():
        print(f"  peak, 64 x 64 x 4 latents, 50 steps, 10 000 evaluations, {name}: {peak / 1e6:.0f} MB")
    whole, half = peaks.values()
    print(f"  {whole / half:.1f} x")


def _grow_large(keep: bool, storage: str | None, answer: Any) -> None:
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chain = FreeChain(50, (4, 64, 64), keep=keep)
    run = DTS(levels=(10, 20, 30, 40), rows=16, storage=storage).plant(
        SearchProblem(chain, first_coordinate, seed=1), 10_000
    )
    run.grow_to(10_000)
    answer.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began))


def draws() -> None:
    """Part 4."""
    tree = our_tree(np.random.default_rng(0).standard_normal(10_000))
    rng = np.random.default_rng(0)

    def identity() -> None:
        p = np.exp(tree.leaf_log_weights()[0])
        edges = p.cumsum()
        np.searchsorted(edges / edges[-1], rng.random(100_000))

    def walk(n: int) -> None:
        for _ in range(n):
            node = 0
            for _ in tree.grid:
                choices = tree.arena.choices_of(node).cumsum()
                node = int(tree.arena.children_of(node)[choices.searchsorted(rng.random() * choices[-1])])

    fast, slow = cpu_time(identity) / 100_000, cpu_time(lambda: walk(2_000)) / 2_000
    print(
        f"  {1 / fast:,.0f} draws/s by the leaf identity, {1 / slow:,.0f} by walking down: {slow / fast:.0f} x"
    )


def main() -> None:
    """Run and print all four parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--evaluations", type=int, default=640, help="denoiser evaluations of each run of part 1"
    )
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"# benchmarks/trees.py, {datetime.date.today()}, 2-core AMD EPYC, CPU, one thread, CPU seconds, best of "
          f"{args.repeats}; torch {torch.__version__}")  # fmt: skip
    print(f"1. rollouts, shipped DiT, {STEPS} steps, {args.evaluations} evaluations")
    engine(args.evaluations, args.repeats)
    print("2. bookkeeping, (2, .8), five levels")
    bookkeeping(args.repeats)
    print("3. memory")
    memory()
    peak_memory()
    print("4. draws from a tree of 1e4 leaves")
    draws()


if __name__ == "__main__":
    main()
