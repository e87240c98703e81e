"""What one iteration of tree GRPO costs: rollout, reward, gradient and optimizer step, every comparison in one run.

    OMP_NUM_THREADS=1 python benchmarks/tree_grpo.py              (under a minute of a free core)

The model is a DiT of 1 M parameters (3 blocks, width 128, 64 tokens of 16 numbers) with random weights; T = 20
steps, time shift 3, the DanceGRPO kernel with eta = 0.3, 16 leaves of one prompt, the last step deterministic and not
trained, one on-policy AdamW step an iteration, a reward that costs nothing.  Peers first; both are written here from
the equations and share no code with gensample.alignment:

    flat, batched      16 trajectories in one batch, updates in the micro-batches that suit it best
    tree, per edge     one network call a node in the rollout, one forward and backward pass an edge in the update, as
                       released tree code does it;  "batched" is the same per-edge update in micro-batches

Times are CPU seconds (time.process_time) or, with --device cuda, seconds between synchronisations; the best of the
repeats, interleaved so that a busy minute hits all.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gensample.alignment.advantages import AdvantageRule
from gensample.alignment.objectives import Objective
from gensample.alignment.policy import Policy, scheduler_kernel
from gensample.alignment.presets import branch, branch_mix, dynamic_tree, flat_grpo, split_only
from gensample.alignment.pruning import Pruning, informative
from gensample.alignment.rollout import roll_out
from gensample.alignment.schedule import TreeSchedule
from gensample.alignment.update import accumulate
from gensample.denoisers import Conditioning, Denoiser
from gensample.models.dit import DiT
from gensample.noise import NoiseStream

STEPS, LEAVES, ETA, SHIFT = 20, 16, 0.3, 3.0
SPLITS = (0, 3, 6, 9)
SHAPE = (4, 16, 16)
Rows = tuple[int, int]  # network rows of a rollout and of its update


def model(device: str) -> DiT:
    """The network, with weights that make it a non-trivial function."""
    made = DiT(
        sample_size=16,
        in_channels=4,
        patch_size=2,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return made.to(device).eval()


def levels() -> Tensor:
    """sigma_0 = 1 > ... > sigma_T = 0."""
    u = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)
    return SHIFT * u / (1.0 + (SHIFT - 1.0) * u)


class Peer:
    """The DanceGRPO step and its log-probability, from equation (1) of its SDE, and loops over it."""

    def __init__(self, network: DiT) -> None:
        self.network, self.sigma = network, levels().tolist()
        self.device = next(network.parameters()).device
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
        self.generator = torch.Generator(self.device).manual_seed(1)

    def mean_std(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """mu = x - d v + d (eta^2/2) score, s = eta sqrt(d); at the last step x0 without noise."""
        sigma = torch.tensor(self.sigma, device=self.device, dtype=torch.float32)
        now, following = (sigma[step + k].view(-1, 1, 1, 1) for k in (0, 1))
        labels = torch.zeros(len(x), dtype=torch.long, device=self.device)
        v = self.network(x, 1000.0 * now.flatten(), labels).sample
        d = now - following
        score = -(x + (1.0 - now) * v) / now
        noisy = (following > 0).float()
        return x - d * v + noisy * d * 0.5 * ETA**2 * score, noisy * ETA * d.sqrt()

    def step(self, x: Tensor, i: int, children: int = 1) -> Tensor:
        mean, std = self.mean_std(x, torch.full((len(x),), i, device=self.device))
        mean = mean.repeat_interleave(children, 0)
        return mean + std.repeat_interleave(children, 0) * torch.randn(
            mean.shape, generator=self.generator, device=self.device
        )

    def loss(self, x: Tensor, child: Tensor, step: Tensor, advantage: Tensor) -> Tensor:
        mean, std = self.mean_std(x, step)
        log_prob = (-0.5 * ((child - mean) / std) ** 2 - std.log()).flatten(1).mean(1)
        ratio = (log_prob - log_prob.detach()).exp()
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4)).sum()

    def train(self, edges: list[tuple[Tensor, Tensor, int, float]], micro_batch: int) -> int:
        """One optimizer step over (parent, child, step, advantage) edges."""
        for first in range(0, len(edges), micro_batch):
            part = edges[first : first + micro_batch]
            x, child = (torch.stack([e[k] for e in part]) for k in (0, 1))
            steps = torch.tensor([e[2] for e in part], device=self.device)
            advantage = torch.tensor([e[3] for e in part], device=self.device)
            (self.loss(x, child, steps, advantage) / len(edges)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(edges)

    def flat(self, micro_batch: int, fraction: float = 1.0) -> Rows:
        """Batched flat GRPO."""
        x = torch.randn(LEAVES, *SHAPE, generator=self.generator, device=self.device)
        path = [x]
        with torch.no_grad():
            for i in range(STEPS):
                path.append(self.step(path[-1], i))
        reward = path[-1].mean((1, 2, 3))
        advantage = ((reward - reward.mean()) / reward.std()).tolist()
        steps = np.random.default_rng(0).permutation(STEPS - 1)[: int(fraction * (STEPS - 1))]
        edges = [(path[i][g], path[i + 1][g], int(i), advantage[g]) for i in steps for g in range(LEAVES)]
        return STEPS * LEAVES, self.train(edges, micro_batch)

    def tree(self, micro_batch: int) -> Rows:
        """A binary tree node by node, trained edge by edge (``micro_batch`` 1) or edges in batches."""
        path = [torch.randn(1, *SHAPE, generator=self.generator, device=self.device)]
        with torch.no_grad():
            for i in range(STEPS):
                k = 2 if i in SPLITS else 1
                path.append(torch.cat([self.step(x[None], i, k) for x in path[-1]]))
        value, edges = path[-1].mean((1, 2, 3)), []
        for i in reversed(range(STEPS - 1)):
            k, child = len(path[i + 1]) // len(path[i]), value.view(len(path[i + 1]), -1).mean(1)
            spread = child.std() if len(child) > 1 else torch.ones((), device=self.device)
            advantage = ((child - child.mean()) / spread.clamp(min=1e-12)).tolist()
            edges += [(path[i][j // k], path[i + 1][j], i, advantage[j]) for j in range(len(child))]
        return sum(len(x) for x in path[:-1]), self.train(edges, micro_batch)


class Ours:
    """The engine, on the same network."""

    def __init__(self, network: DiT) -> None:
        grid = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        grid.set_timesteps(sigmas=np.linspace(1.0, 1.0 / STEPS, STEPS))
        self.device = next(network.parameters()).device
        denoiser = Denoiser.from_model(
            lambda x, timestep, label: network(x, timestep, label).sample, latent_shape=SHAPE, scheduler=grid,
            conditioning=Conditioning({"label": torch.zeros(1, dtype=torch.long)}), device=self.device,
        )  # fmt: skip
        times = (1.0 - grid.sigmas.double()).tolist()
        self.policy = Policy(denoiser, scheduler_kernel(grid, diffusion="dance", scale=ETA), times)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
        self.count = 0

    def iterate(
        self,
        schedule: TreeSchedule,
        *,
        mode: str = "recompute",
        pruning: Pruning | None = None,
        baseline: str = "depth",
    ) -> Rows:
        """One iteration."""
        self.count += 1
        plan = schedule.at(self.count)
        keys = NoiseStream.from_generator(self.count, 1)
        retain = mode == "retain_graph"
        rollout = roll_out(self.policy, plan, keys, np.zeros(1, dtype=np.int64), retain_graph=retain)
        reward = rollout.final.mean((1, 2, 3)).double().cpu()
        advantages = AdvantageRule(baseline=baseline)(plan, reward)  # type: ignore[arg-type]
        masks = informative(plan, baseline, (pruning or Pruning()).masks(plan, advantages.fused, 0))  # type: ignore[arg-type]
        update = accumulate(self.policy, rollout, advantages, Objective(), masks=masks, mode=mode)  # type: ignore[arg-type]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rollout.evaluations, update.evaluations


def same_gradient(network: DiT, peer: Peer, ours: Ours) -> float:
    """Relative distance of the engine's gradient from the peer's per-edge one on the engine's own tree."""
    plan = branch(steps=STEPS, splits=SPLITS).at(0)
    rollout = roll_out(ours.policy, plan, NoiseStream.from_generator(5, 1), np.zeros(1, dtype=np.int64))
    advantages = AdvantageRule()(plan, rollout.final.mean((1, 2, 3)).double().cpu())
    accumulate(ours.policy, rollout, advantages, Objective())
    first = taken(network)
    edges = [(i, j) for i in plan.trained_steps for j in range(plan.nodes[i + 1])]
    for i, j in edges:
        parent = rollout.levels[i][j // plan.branching[i]][None]
        step = torch.tensor([i], device=peer.device)
        advantage = advantages.values[i][j : j + 1].float().to(peer.device)
        (peer.loss(parent, rollout.levels[i + 1][j : j + 1], step, advantage) / len(edges)).backward()
    second = taken(network)
    return float((first - second).norm() / second.norm())


def taken(network: DiT) -> Tensor:
    """The gradients as one vector, set to None."""
    parts = [p.grad.flatten().clone() for p in network.parameters() if p.grad is not None]
    for p in network.parameters():
        p.grad = None
    return torch.cat(parts)


def timed(work: Callable[[], Rows], cuda: bool) -> tuple[float, Rows]:
    """Seconds of one call, and what it returned."""
    if not cuda:
        began = time.process_time()
        rows = work()
        return time.process_time() - began, rows
    torch.cuda.synchronize()
    began = time.perf_counter()
    rows = work()
    torch.cuda.synchronize()
    return time.perf_counter() - began, rows


def entries(peer: Peer, ours: Ours) -> dict[str, Callable[[], Rows]]:
    """Name -> one iteration."""
    dense, flat = branch(steps=STEPS, splits=SPLITS), flat_grpo(steps=STEPS, group=LEAVES)
    mix, only = branch_mix(steps=STEPS, splits=SPLITS, every=0), split_only(steps=STEPS, splits=SPLITS)
    sparse = split_only(steps=STEPS, splits=(0, 5, 10, 15))
    top, depth = Pruning(width="parent_top1"), Pruning.depth(dense.at(0))
    return {
        "peer: flat, micro-batch 16": lambda: peer.flat(16),
        "peer: flat, micro-batch 64": lambda: peer.flat(64),
        "peer: flat, 60 % of steps": lambda: peer.flat(64, 0.6),
        "peer: tree per edge": lambda: peer.tree(1),
        "peer: tree per edge, batched": lambda: peer.tree(64),
        "flat_grpo": lambda: ours.iterate(flat),
        "branch, recompute": lambda: ours.iterate(dense),
        "branch, retain_graph": lambda: ours.iterate(dense, mode="retain_graph"),
        "branch, width pruning": lambda: ours.iterate(dense, pruning=top),
        "branch, depth pruning": lambda: ours.iterate(dense, pruning=depth),
        "branch_mix": lambda: ours.iterate(mix),
        "split_only, recompute": lambda: ours.iterate(only),
        "split_only, retain_graph": lambda: ours.iterate(only, mode="retain_graph"),
        "split_only, sparse splits": lambda: ours.iterate(sparse),
        "dynamic_tree": lambda: ours.iterate(dynamic_tree(steps=STEPS)),
    }


def report(best: dict[str, float]) -> None:
    """The ratios that the issue asks for, and the papers' figures with what they count."""
    flat = min(best["peer: flat, micro-batch 16"], best["peer: flat, micro-batch 64"])
    edge = best["peer: tree per edge"]
    print("ratios of iteration times")
    for name, base, of, aim in (
        ("split_only, recompute", flat, "batched flat", ">= 3"),
        ("split_only, retain_graph", flat, "batched flat", ""),
        ("split_only, sparse splits", flat, "batched flat", ""),
        ("branch, recompute", edge, "per-edge tree", ">= 1.6"),
        ("branch, retain_graph", edge, "per-edge tree", ">= 2.3"),
        ("branch, recompute", best["peer: tree per edge, batched"], "batched per-edge tree", ""),
        ("branch, retain_graph", best["peer: tree per edge, batched"], "batched per-edge tree", ""),
        ("flat_grpo", flat, "batched flat (the engine's overhead)", ""),
    ):
        print(f"  {name:28s} {base / best[name]:5.2f} x faster than {of}{'   aim ' + aim if aim else ''}")
    print("papers' time per iteration beside ours (both against flat GRPO that trains every step)")
    for name, paper in (
        ("branch, width pruning", "BranchGRPO with pruning: -55 % (698 -> 314 s)"),
        ("branch, depth pruning", "BranchGRPO with pruning: -55 % (698 -> 314 s)"),
        ("branch_mix", "BranchGRPO-Mix: 4.7 x (698 -> 148 s, -79 %)"),
    ):
        print(f"  {name:28s} {100 * (best[name] / flat - 1):+.0f} % ({flat / best[name]:.1f} x);  {paper}")
    print(
        "  theirs: FLUX.1-dev on 16 H200, whole iterations with decoding and rewards, against DanceGRPO at batch 1;"
    )
    print(
        "  ours: network, noise, advantages and optimizer only, against a batched loop, which is faster than batch 1"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuda = args.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else "2-core AMD EPYC, CPU, one thread, CPU seconds"
    network = model(args.device)
    peer, ours = Peer(network), Ours(network)
    size = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"# benchmarks/tree_grpo.py, {datetime.date.today()}, {where}, best of {args.repeats}; torch "
          f"{torch.__version__}, Python {platform.python_version()}; DiT of {size:.2f} M parameters; "
          f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    distance = same_gradient(network, peer, ours)
    print(f"gradient of shared parents against one pass an edge: relative distance {distance:.1e}")
    work = entries(peer, ours)
    peer.flat(16)
    ours.iterate(split_only(steps=STEPS, splits=SPLITS))
    best: dict[str, tuple[float, Rows]] = {}
    for _ in range(args.repeats):
        for name, iterate in work.items():
            best[name] = min(best.get(name, (math.inf, (0, 0))), timed(iterate, cuda))
    print("seconds an iteration, and network rows (rollout + update)")
    for name, (took, (rollout, update)) in best.items():
        print(f"  {name:32s} {took:7.3f}   {rollout} + {update}")
    report({name: took for name, (took, _) in best.items()})


if __name__ == "__main__":
    main()
