"""Acceptance of DTS on toys with exact answers: values, Z, target and i.i.d. floor (../docs/dts.md has the reading).

    OMP_NUM_THREADS=1 python recipes/dts_oracle.py                 (everything; about 15 minutes of a free core)
    OMP_NUM_THREADS=1 python recipes/dts_oracle.py --only T1 T7    (parts; the JSON file keeps the others)

Budgets are denoiser evaluations of T = 100 step chains: 1e5 is 1000 plain rollouts.  MMD2: unbiased, five RBF kernels,
of 1500 draws against 1500 exact ones; TV: of the modes' masses; ESS: of the leaves; Z: the estimate over the truth.
Trees of all seeds grow as a forest, 8 tickets a tree.  Automatic levels pay for their pilot from the budget.  RATIO of
the placement was chosen on seeds 100-105 of resp8; the figures are from seeds 0 and up.
"""

# ruff: noqa: T201  (a script that prints its results)
from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dts_exact import discrete_p_values, gaussian_posteriors
from dts_toys import CASES, PUBLISHED, Case, mode_tv, squared_mmd

from gensample.search import DTS, SMC, BestOfN, DTSStar, ImportanceResampling, Method, Population
from gensample.search.dts import grow_forest
from gensample.search.tree_run import TreeRun

Rows = list[dict[str, Any]]
COLUMNS = ("mmd2", "tv", "ess", "z")


def judged(reward: Any, pop: Population, seed: int) -> dict[str, float]:
    """One population against exact draws."""
    rng, target = np.random.default_rng(1000 + seed), reward.tilted()
    x = pop.latents[torch.from_numpy(pop.draws(1500, rng))]
    z = math.nan if pop.log_z is None else math.exp(pop.log_z - reward.log_z)
    gap = pop.info.get("log_z_gap", math.nan)
    mmd2 = squared_mmd(x, target.sample(rng, 1500))
    return {"mmd2": mmd2, "tv": mode_tv(x, target), "ess": pop.ess, "z": z, "gap": gap}


def floor(case: Case, seeds: Sequence[int]) -> Rows:
    """Exact draws against exact draws."""
    target, found = case.reward().tilted(), []
    for seed in seeds:
        rng = np.random.default_rng(2000 + seed)
        x = target.sample(rng, 1500)
        mmd2 = squared_mmd(x, target.sample(rng, 1500))
        found.append({"mmd2": mmd2, "tv": mode_tv(x, target), "ess": 1500.0, "z": 1.0})
    return found


def forest(case: Case, method: DTS | DTSStar, seeds: Sequence[int], budget: int) -> tuple[Any, list[TreeRun]]:
    """One tree a seed."""
    reward = case.reward()
    *_, runs = grow_forest(method, [case.problem(s, reward) for s in seeds], budget)
    return reward, runs


def trees(case: Case, method: DTS | DTSStar, seeds: Sequence[int], budget: int) -> Rows:
    """The judgement of one tree a seed."""
    reward, runs = forest(case, method, seeds, budget)
    found = []
    for run, seed in zip(runs, seeds, strict=True):
        found.append(judged(reward, run.population(), seed) | {"levels": run.tree.rules.levels})
    return found


def baseline(case: Case, method: Method, seeds: Sequence[int], budget: int) -> Rows:
    """The judgement of another method, seed by seed."""
    found = []
    for seed in seeds:
        problem = case.problem(seed)
        *_, pop = method.run(problem, budget)
        found.append(judged(problem.reward, pop, seed))
    return found


def mean(rows: Rows, name: str) -> float:
    """Of one column."""
    return float(np.mean([row[name] for row in rows]))


def line(name: str, rows: Rows) -> str:
    """Means and standard errors of one configuration."""
    cells = []
    for column in COLUMNS:
        values = np.array([row[column] for row in rows])
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        cells.append(
            f"{values.mean():.2e}±{error:.0e}" if column == "mmd2" else f"{values.mean():.3g}±{error:.1g}"
        )
    extra = " ".join(str(row["levels"][0]) for row in rows if "levels" in row)
    return (
        f"  {name:34s}"
        + "".join(f"{cell:>18s}" for cell in cells)
        + (f"   first level {extra}" if extra else "")
    )


def table(name: str, seeds: Sequence[int]) -> dict[str, Rows]:
    """All methods on one toy at 1e5."""
    case, budget = CASES[name], 100_000
    return {
        "exact draws": floor(case, seeds),
        "importance resampling": baseline(case, ImportanceResampling(batch=500), seeds, budget),
        "SMC (FK), published levels": baseline(case, SMC(levels=PUBLISHED), seeds, budget),
        "SMC (FK), late levels": baseline(case, SMC(levels=case.grid), seeds, budget),
        "DTS, automatic levels": trees(case, DTS(rows=8), seeds, budget),
        "DTS w (2, .8), late levels": trees(case, DTS.paper(levels=case.grid, rows=8), seeds, budget),
        "DTS.paper, published levels": trees(case, DTS.paper(rows=8), seeds, budget),
    }


def show(results: dict[str, Rows]) -> list[str]:
    """The lines of a table."""
    return [f"  {'':34s}" + "".join(f"{c:>18s}" for c in COLUMNS)] + [line(n, r) for n, r in results.items()]


def t1() -> tuple[dict[str, Any], list[str]]:
    """Uniform selection: E Zhat = Z, 400 trees at 1e4 on resp8; selection by w (100 trees) beside it."""
    found = {}
    for name, method, trees_of in (("uniform", DTS.paper(power=0.0), 400), ("w", DTS.paper(), 100)):
        reward, runs = forest(CASES["resp8"], method, range(trees_of), 10_000)
        ratios = np.array([math.exp(r.log_z - reward.log_z) for r in runs])
        found[name] = {"mean": float(ratios.mean()), "se": float(ratios.std(ddof=1) / math.sqrt(trees_of))}
    u = found["uniform"]
    passed = abs(u["mean"] - 1.0) < 3 * u["se"]
    lines = [f"  {n:10s} Zhat/Z = {f['mean']:.4f} ± {f['se']:.4f}" for n, f in found.items()]
    return {**found, "passed": passed}, [*lines, f"  uniform within 3 SE of 1: {passed}"]


def t2() -> tuple[dict[str, Any], list[str]]:
    """resp8 at 1e5, automatic levels: TV < .05, MMD2 < 4e-3 and below IS, ESS > 1.5 IS."""
    found = table("resp8", range(8))
    ours, control = found["DTS, automatic levels"], found["importance resampling"]
    checks = {
        "TV < .05": mean(ours, "tv") < 0.05,
        "MMD2 < 4e-3": mean(ours, "mmd2") < 4e-3,
        "MMD2 < IS": mean(ours, "mmd2") < mean(control, "mmd2"),
        "ESS > 1.5 IS": mean(ours, "ess") > 1.5 * mean(control, "ess"),
    }
    return {"table": found, "checks": checks}, [*show(found), f"  {checks}"]


def t3() -> tuple[dict[str, Any], list[str]]:
    """rare64 at 1e5, automatic levels: MMD2 < .6 IS and < SMC at late levels."""
    found = table("rare64", range(8))
    ours = mean(found["DTS, automatic levels"], "mmd2")
    checks = {
        "MMD2 < .6 IS": ours < 0.6 * mean(found["importance resampling"], "mmd2"),
        "MMD2 < SMC": ours < mean(found["SMC (FK), late levels"], "mmd2"),
    }
    return {"table": found, "checks": checks}, [*show(found), f"  {checks}"]


def t4() -> tuple[dict[str, Any], list[str]]:
    """checker at 1e5, published levels, 16 seeds: DTS(2, .8) MMD2 < SMC's."""
    case, seeds = CASES["checker"], range(16)
    found = {
        "exact draws": floor(case, seeds),
        "importance resampling": baseline(case, ImportanceResampling(batch=500), seeds, 100_000),
        "SMC (FK), published levels": baseline(case, SMC(levels=PUBLISHED), seeds, 100_000),
        "DTS.paper, published levels": trees(case, DTS.paper(rows=8), seeds, 100_000),
        "DTS, automatic levels": trees(case, DTS(rows=8), range(8), 100_000),
    }
    ours, theirs = found["DTS.paper, published levels"], found["SMC (FK), published levels"]
    checks = {"MMD2 < SMC, published levels": mean(ours, "mmd2") < mean(theirs, "mmd2")}
    return {"table": found, "checks": checks}, [*show(found), f"  {checks}"]


def t5() -> tuple[dict[str, Any], list[str]]:
    """Values of nodes with N >= 50 at t <= 40 against r(E[x0 | x]): ratio of RMSEs (asked: < 1/3), 1e5, 8 seeds, C = 1,
    alpha = .5 (a wide tree has no such node so late)."""
    found = {}
    for name in ("resp8", "checker", "hd"):
        method = DTS(levels=(60, 70, 80, 90), coefficient=1.0, exponent=0.5, rows=8)
        reward, runs = forest(CASES[name], method, range(8), 100_000)
        tree_errors, tweedie_errors = [], []
        for run in runs:
            for depth in range(1, 5):
                level = run.tree.grid[depth - 1]
                nodes = run.tree.arena.at_depth(depth)
                nodes = nodes[run.tree.arena.visits[nodes] >= 50]
                if not len(nodes):
                    continue
                x, at = run.tree.latents.take(depth, run.tree.arena.row[nodes]), np.full(len(nodes), level)
                exact = reward.value(x, at).numpy()
                chain = reward.chain
                guess = reward(chain.x0(x, at, chain.answer(x, at, at))).numpy()
                tree_errors.append(run.tree.arena.log_weight[nodes] - exact)
                tweedie_errors.append(guess - exact)
        if not tree_errors:
            found[name] = {"nodes": 0, "tree": math.nan, "tweedie": math.nan, "ratio": math.nan}
            continue
        tree_rmse = float(np.sqrt(np.mean(np.square(np.concatenate(tree_errors)))))
        tweedie_rmse = float(np.sqrt(np.mean(np.square(np.concatenate(tweedie_errors)))))
        nodes_seen = sum(map(len, tree_errors))
        found[name] = {
            "nodes": nodes_seen,
            "tree": tree_rmse,
            "tweedie": tweedie_rmse,
            "ratio": tree_rmse / tweedie_rmse,
        }
    return found, [
        f"  {n:8s} {f['nodes']:4d} nodes: RMSE tree {f['tree']:.3f}, Tweedie {f['tweedie']:.3f}, ratio {f['ratio']:.2f}"
        for n, f in found.items()
    ]


def t6() -> tuple[dict[str, Any], list[str]]:
    """MMD2 against the budget, 1e4 to 1e6 on resp8 (asked: slope <= -.4 on automatic levels), 8 seeds."""
    found: dict[str, Any] = {}
    lines = []
    configs: dict[str, Callable[[Sequence[int], int], Rows]] = {
        "importance resampling": lambda s, b: baseline(CASES["resp8"], ImportanceResampling(batch=500), s, b),
        "DTS, automatic levels": lambda s, b: trees(CASES["resp8"], DTS(rows=16 if b > 1e5 else 8), s, b),
        "DTS.paper, published levels": lambda s, b: trees(
            CASES["resp8"], DTS.paper(rows=16 if b > 1e5 else 8), s, b
        ),
    }
    for name, run in configs.items():
        curve = {}
        for budget in (10_000, 100_000, 1_000_000):
            rows = run(range(8), budget)
            curve[budget] = mean(rows, "mmd2")
            lines.append(line(f"{name} @{budget:.0e}", rows))
        slope = math.log10(max(curve[1_000_000], 1e-4) / curve[10_000]) / 2
        found[name] = {"mmd2": curve, "slope": slope}
        lines.append(f"  {name}: slope {slope:.2f} (MMD2 below 1e-4, the floor's noise, counts as 1e-4)")
    return found, lines


def t7() -> tuple[dict[str, Any], list[str]]:
    """hd: the best reward of DTS* at 2e4 against best-of-N at 1e5, 12 seeds."""
    seeds, found = range(12), {}
    case = CASES["hd"]
    for budget in (5_000, 20_000, 100_000):
        for name, method in {"DTS*": DTSStar(rows=4), "DTS*.paper": DTSStar.paper(rows=4)}.items():
            _, runs = forest(case, method, seeds, budget)
            pops = [r.population() for r in runs]
            found[f"{name} best seen @{budget}"] = [float(p.rewards.max()) for p in pops]
            found[f"{name} map leaf @{budget}"] = [float(p.rewards[p.info["map_leaf"]]) for p in pops]
        best = []
        for seed in seeds:
            *_, pop = BestOfN(batch=500).run(case.problem(seed), budget)
            best.append(float(pop.rewards.max()))
        found[f"best of N @{budget}"] = best
    ours, control = np.mean(found["DTS* best seen @20000"]), np.mean(found["best of N @100000"])
    lines = [
        f"  {n:28s} {np.mean(v):8.3f} (median {np.median(v):.3f}, worst {min(v):.3f})"
        for n, v in found.items()
    ]
    return {**found, "passed": bool(ours >= control)}, [
        *lines,
        f"  DTS*@2e4 >= best of N@1e5: {ours >= control}",
    ]


def t8() -> tuple[dict[str, Any], list[str]]:
    """Linear-Gaussian data through Diffusers' DDIM, eta .5 and 1, 10 and 50 steps: posterior mean and variance."""
    found = gaussian_posteriors(seeds=16)
    lines = [
        f"  {n}: mean off by {f['mean_se']:+.2f} SE, variance by {f['variance_se']:+.2f} SE, log Z by {f['log_z']:+.3f}"
        for n, f in found.items()
    ]
    passed = all(abs(f[k]) < 3 for f in found.values() for k in ("mean_se", "variance_se"))
    return {**found, "passed": passed}, [*lines, f"  all within 3 SE: {passed}"]


def t9() -> tuple[dict[str, Any], list[str]]:
    """Masked diffusion, enumerated: chi-squared of draws against the target (asked: p > .001), 8 seeds."""
    p = discrete_p_values(seeds=8)
    return {"p": p, "passed": min(p) > 1e-3}, [
        f"  p = {' '.join(f'{v:.3f}' for v in p)}; all > .001: {min(p) > 1e-3}"
    ]


def t10() -> tuple[dict[str, Any], list[str]]:
    """Tickets under way, 1 against 16, paired seeds, at 1e5: ratio of MMD2 (asked: < 1.5)."""
    found: dict[str, Any] = {}
    lines = []
    for name in ("resp8",):
        levels = CASES[name].grid
        one, many = (trees(CASES[name], DTS(levels=levels, rows=b), range(8), 100_000) for b in (1, 16))
        ratio = mean(many, "mmd2") / max(mean(one, "mmd2"), 1e-4)
        found[name] = {"one": one, "many": many, "ratio": ratio}
        lines += [
            line(f"{name}, 1 at a time", one),
            line(f"{name}, 16 at a time", many),
            f"  ratio {ratio:.2f}",
        ]
    return found, lines


def t11() -> tuple[dict[str, Any], list[str]]:
    """log(Z_tree / Z_IS) is exported and flags |.| > .5: how often on hd, by levels, 8 seeds at 1e5."""
    found = {}
    for name, method in {"automatic": DTS(rows=8), "published": DTS.paper(rows=8)}.items():
        rows = trees(CASES["hd"], method, range(8), 100_000)
        found[name] = {
            "gaps": [row["gap"] for row in rows],
            "suspect": sum(abs(row["gap"]) > 0.5 for row in rows),
        }
        found[name] |= {column: mean(rows, column) for column in COLUMNS}
    return found, [
        f"  {n} levels: mean gap {np.mean(f['gaps']):+.2f}, suspect {f['suspect']} of 8, Zhat/Z {f['z']:.2f}, "
        f"MMD2 {f['mmd2']:.1e}, ESS {f['ess']:.0f}"
        for n, f in found.items()
    ]


def t12() -> tuple[dict[str, Any], list[str]]:
    """SMC on resp8: E Zhat = Z with exact values, adaptive or not; and the tail of Tweedie values, 64 seeds at 1e4."""
    case, found = CASES["resp8"], {}
    for name, exact, threshold in (
        ("exact V, always", True, 1.0), ("exact V, ESS < .5", True, 0.5),
        ("Tweedie, always", False, 1.0), ("Tweedie, ESS < .5", False, 0.5), ("never", False, 0.0),
    ):  # fmt: skip
        z = []
        for seed in range(64):
            problem = case.problem(seed)
            value = problem.reward.value if exact else None
            *_, pop = SMC(levels=PUBLISHED, ess_threshold=threshold, value=value).run(problem, 10_000)
            z.append(math.exp(pop.log_z - problem.reward.log_z))
        found[name] = {
            "mean": float(np.mean(z)), "se": float(np.std(z, ddof=1) / 8.0), "median": float(np.median(z)),
            "largest": float(np.max(z)),
        }  # fmt: skip
    passed = all(abs(f["mean"] - 1.0) < 3 * f["se"] for f in found.values())
    lines = [
        f"  {n:18s} Zhat/Z = {f['mean']:.3f} ± {f['se']:.3f}, median {f['median']:.3f}, largest {f['largest']:.2f}"
        for n, f in found.items()
    ]
    note = "  Tweedie values put a fifth of Z on states whose weight is under a hundredth: rare runs carry it"
    return {**found, "passed": passed}, [*lines, f"  all within 3 SE of 1: {passed}", note]


def hd() -> tuple[dict[str, Any], list[str]]:
    """hd at 1e5, all methods (reference, no threshold)."""
    found = table("hd", range(8))
    return {"table": found}, show(found)


PARTS = {"T1": t1, "T2": t2, "T3": t3, "T4": t4, "T5": t5, "T6": t6, "T7": t7, "T8": t8, "T9": t9, "T10": t10,
         "T11": t11, "T12": t12, "HD": hd}  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """All parts done so far, as text."""
    head = [
        "# recipes/dts_oracle.py, 2-core AMD EPYC (shared), CPU, one thread. See its module text for the columns.",
        "# Not run: " + (", ".join(name for name in PARTS if name not in record) or "nothing"),
    ]
    return (
        "\n".join([*head, *(line for k in PARTS if k in record for line in ("", *record[k]["text"]))]) + "\n"
    )


def main() -> None:
    """Run the parts, keeping those of earlier runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dts_oracle.json")
    args = parser.parse_args()
    for name in args.only:
        began = time.process_time()
        found, lines = PARTS[name]()
        took = time.process_time() - began
        record = json.loads(args.out.read_text()) if args.out.exists() else {}
        text = [f"{name}: {PARTS[name].__doc__}  [{took:.0f} s CPU]", *lines]
        record[name] = {"found": found, "text": text, "cpu_s": took}
        part = args.out.with_suffix(".part")
        part.write_text(
            json.dumps({k: record[k] for k in PARTS if k in record}, indent=1, default=float) + "\n"
        )
        part.replace(args.out)
        args.out.with_suffix(".txt").write_text(report(record))
        print("\n".join(text), flush=True)


if __name__ == "__main__":
    main()
