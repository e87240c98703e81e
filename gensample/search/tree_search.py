"""``gensample.TreeSearch``: search with any live Diffusers pipeline, one of ours, or a ``Denoiser``.

    search = gensample.TreeSearch(pipe, reward=my_reward)
    out = search("a red cube", method="dts*", budget=2000, generator=0)       # out.images, out.rewards, out.info
    for state in search.stream("a red cube", method="dts", budget=2000): ...  # closing it cancels

Shapes: P = prompts (rows of the conditioning), n = images returned, ... = latent shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gensample.denoisers import Denoiser
from gensample.guidance import Guidance
from gensample.interpolants import Float64
from gensample.noise import GeneratorLike, NoiseStream
from gensample.rewards import Reward, for_prompt
from gensample.sampling import OutputType, as_denoiser, checked_output_type, choose_solver, to_output
from gensample.search.best_of_n import BestOfN, ImportanceResampling
from gensample.search.dps import DPS
from gensample.search.dts import DTS, DTSStar, TreeMethod
from gensample.search.noise_search import PathSearch, RandomSearch, ZeroOrderSearch
from gensample.search.particles import SMC, TDS
from gensample.search.problem import Method, Population, SearchProblem
from gensample.search.states import SearchState, denoiser_of, forest, sequential, single_tree
from gensample.search.svdd import SVDD
from gensample.solvers import Diffusion, Solver
from gensample.trees import DenoiserChain, Int64

ROWS = 8  # tickets under way at a time, over all trees

#: Methods by name, with their defaults.
METHODS: dict[str, Method] = {
    "dts": DTS(), "dts*": DTSStar(), "importance": ImportanceResampling(batch=16), "smc": SMC(), "tds": TDS(),
    "dps": DPS(batch=16), "svdd": SVDD(), "best_of_n": BestOfN(batch=16), "random": RandomSearch(batch=16),
    "zero_order": ZeroOrderSearch(), "paths": PathSearch(),
}  # fmt: skip
#: Their result is the best samples; that of the others, draws of the target.
SEARCHES = (DTSStar, BestOfN, RandomSearch, ZeroOrderSearch, PathSearch)
#: These vary only the initial noise or go back in noise themselves, so the sampler may be deterministic.
FREE_OF_STEP_NOISE = (BestOfN, ImportanceResampling, RandomSearch, ZeroOrderSearch, PathSearch)


@dataclass(frozen=True)
class SearchOutput:
    """images: as ``output_type``, prompt after prompt; rewards (n,) float64; prompts (n,), whose image it is;
    latents (n, ...); info: one dict a prompt (log_z, ess, evaluations, and the method's own diagnostics);
    populations: one a prompt, everything that was found; evaluations: denoiser evaluations of this call."""

    images: Any
    rewards: Float64
    prompts: Int64
    latents: Tensor
    info: list[dict[str, Any]]
    populations: list[Population]
    evaluations: int


class TreeSearch:
    """Search at inference time for samples of high reward, or for draws of p(x) exp(lambda r(x)) / Z.

    model: a live pipeline (DiT, SD, SDXL, SD3, Flux, DDPM, DDIM, ours) or a Denoiser with its conditioning bound.
    reward: ``reward(images, cond) -> (B,)``; one with ``for_prompt(text)`` is told each prompt.
    solver: a one-stage stochastic solver, "exp" (the marginal-preserving SDE, for flow and diffusion models alike) or
        "em", or a Solver; None is the pipeline's own scheduler: DDPM, DDIM at eta 1, or FlowMatchEuler's ``flow``
        kernel, with ``law``, keyword arguments of ``gensample.schedulers.law_of``.
    diffusion: of the solver.
    guidance: a rule without memory; the guided model is the prior.
    num_inference_steps: N.  The target depends on it, as on everything that shapes the sampler's law.
    inverse_temperature: lambda; only lambda times the reward matters to samplers.
    micro_batch: rows of one network call.
    """

    def __init__(
        self,
        model: Any,
        *,
        reward: Reward,
        solver: str | Solver | None = "exp",
        diffusion: Diffusion | None = None,
        law: dict[str, Any] | None = None,
        guidance: Guidance | None = None,
        num_inference_steps: int = 32,
        inverse_temperature: float = 1.0,
        micro_batch: int = 16,
    ) -> None:
        """See the class.  Raises TypeError for a reward or guidance that cannot be called."""
        if not callable(reward):
            raise TypeError(f"reward={reward!r} must be callable as reward(images, cond) -> (B,)")
        if guidance is not None and not callable(guidance):
            raise TypeError(f"guidance={guidance!r} must be a rule, such as CFG({guidance!r})")
        if law is not None and solver is not None:
            raise ValueError(f"law={law} is of the pipeline's own scheduler; give solver=None with it")
        self.model, self.reward, self.solver, self.diffusion, self.law = model, reward, solver, diffusion, law
        self.guidance, self.num_inference_steps = guidance, num_inference_steps
        self.inverse_temperature, self.micro_batch = inverse_temperature, micro_batch

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        method: str | Method = "dts*",
        budget: int = 2000,
        generator: GeneratorLike = None,
        num_images: int = 1,
        save_to: str | Path | None = None,
        resume_from: str | Path | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        **conditioning: Any,
    ) -> SearchOutput:
        """Search, and return images of every prompt.

        prompt, conditioning: the pipeline's own prompt arguments, such as ``class_labels=``; several rows make a
            forest, one search each.
        method: a name of ``METHODS`` or a Method.  budget: denoiser evaluations for each prompt; never exceeded.
        generator: an int, a ``torch.Generator`` or None.
        num_images: for each prompt: its best ones for methods that search (dts*, best_of_n, random, zero_order,
            paths), draws for methods that sample.
        save_to, resume_from: of tree methods with one prompt: where the tree is kept, and a kept tree to go on with
            until ``budget`` evaluations are spent in all.

        Raises ValueError for arguments that do not fit, before anything is evaluated, FloatingPointError for values
        that stop being finite.
        """
        checked_output_type(output_type)
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        chosen = named_method(method)
        with tqdm(disable=not progress, unit="evaluation") as bar:
            problems = self._problems(chosen, prompt, generator, conditioning, _updater(bar))
            bar.total = budget * len(problems)
            state, mark = None, 0
            with closing(self._states(chosen, problems, budget, save_to, resume_from)) as states:
                for state in states:
                    if (
                        progress and state.evaluations >= mark
                    ):  # what a state holds is computed when asked for
                        mark = state.evaluations + bar.total // 20
                        bar.set_postfix_str(_shown(state), refresh=False)
            bar.n = min(problems[0].evaluations, bar.total)
        assert state is not None
        populations = [p for p in state.populations if p is not None]
        return _output(chosen, problems, populations, num_images, output_type)

    def stream(
        self,
        prompt: str | list[str] | None = None,
        *,
        method: str | Method = "dts*",
        budget: int = 2000,
        generator: GeneratorLike = None,
        save_to: str | Path | None = None,
        resume_from: str | Path | None = None,
        **conditioning: Any,
    ) -> Generator[SearchState, None, None]:
        """The states of the search as it goes; arguments as the call.  Closing the iterator cancels (a tree with
        ``save_to`` is kept).  Everything is checked before the first evaluation."""
        chosen = named_method(method)
        problems = self._problems(chosen, prompt, generator, conditioning, None)
        return self._states(chosen, problems, budget, save_to, resume_from)

    def _problems(
        self, method: Method, prompt: str | list[str] | None, generator: GeneratorLike,
        conditioning: dict[str, Any], on_evaluations: Callable[[int], None] | None,
    ) -> list[SearchProblem]:  # fmt: skip
        """One problem a row of the conditioning, on one chain."""
        if isinstance(generator, list | tuple):
            raise ValueError(
                "generator is a list; give one seed or torch.Generator, each prompt has its own streams"
            )
        if prompt is not None:
            conditioning = {**conditioning, "prompt": prompt}
        denoiser = as_denoiser(self.model, None, conditioning)
        rows = denoiser.conditioning.batch_size
        noise = NoiseStream.from_generator(generator, rows)
        chain = self._chain(denoiser, method, noise, on_evaluations)
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        return [
            SearchProblem(
                chain, for_prompt(self.reward, texts[row * len(texts) // rows] if texts else None),
                inverse_temperature=self.inverse_temperature, seed=noise.seeds[row], sample=row,
                micro_batch=self.micro_batch,
            )
            for row in range(rows)
        ]  # fmt: skip

    def _chain(
        self, denoiser: Denoiser, method: Method, noise: NoiseStream,
        on_evaluations: Callable[[int], None] | None,
    ) -> DenoiserChain:  # fmt: skip
        """The policy: ValueError for a sampler that ``method`` cannot branch, with the fix named."""
        options: dict[str, Any] = {
            "guidance": self.guidance, "micro_batch": self.micro_batch, "on_evaluations": on_evaluations
        }  # fmt: skip
        if self.solver is None:
            try:
                return DenoiserChain.from_scheduler(
                    denoiser, self.num_inference_steps, law=self.law, **options
                )
            except TypeError as error:
                raise ValueError(f"{error}; or give solver='exp', which walks any of them") from error
        solver = choose_solver(denoiser, self.solver, self.num_inference_steps, self.diffusion, noise)
        if isinstance(method, FREE_OF_STEP_NOISE) and solver.is_markov:
            return DenoiserChain(denoiser, solver.transition, solver.times, initial=solver.initial, **options)
        return DenoiserChain.from_solver(denoiser, solver, **options)

    def _states(
        self, method: Method, problems: list[SearchProblem], budget: int, save_to: str | Path | None,
        resume_from: str | Path | None,
    ) -> Generator[SearchState, None, None]:  # fmt: skip
        budget = _checked_budget(budget)
        kept = [
            name for name, path in (("save_to", save_to), ("resume_from", resume_from)) if path is not None
        ]
        if kept and not isinstance(method, TreeMethod):
            raise ValueError(
                f"{' and '.join(kept)} keep trees; method={method} grows none: use 'dts' or 'dts*'"
            )
        if kept and len(problems) > 1:
            raise ValueError(
                f"{' and '.join(kept)} keep one tree; search the {len(problems)} prompts one by one"
            )
        if not isinstance(method, TreeMethod):
            return sequential(method, problems, budget)
        method = replace(method, rows=max(1, method.rows // len(problems)))
        if len(problems) > 1:
            return forest(method, problems, budget)
        if resume_from is None:
            return single_tree(method, problems[0], None, budget, save_to)
        run = method.resume(resume_from, problems[0])
        if run.tree.evaluations > budget:
            raise ValueError(
                f"budget={budget} is less than the {run.tree.evaluations:g} evaluations spent on {resume_from}; "
                "the budget counts them, give a larger one"
            )
        return single_tree(method, problems[0], run, budget, save_to)


def named_method(method: str | Method) -> Method:
    """The method called ``method``, or it itself; ValueError for an unknown name, TypeError for what is no method."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; use one of {sorted(METHODS)}, or a Method")
        chosen = METHODS[method]
        return replace(chosen, rows=ROWS) if isinstance(chosen, TreeMethod) else chosen
    if isinstance(method, type) or not callable(getattr(method, "run", None)):
        raise TypeError(f"method={method!r} must be a name or a Method, such as SMC(potential='max')")
    return method


def _checked_budget(budget: Any) -> int:
    try:
        value = operator.index(budget)
    except TypeError:
        value = 0
    if value < 1 or isinstance(budget, bool):
        raise ValueError(f"budget={budget!r} must be a whole number of denoiser evaluations, at least 1")
    return value


def _updater(bar: Any) -> Callable[[int], None]:
    def update(evaluations: int) -> None:
        bar.update(evaluations - bar.n)

    return update


def _shown(state: SearchState) -> str:
    best = [b for b in state.best_rewards if b is not None]
    return f"best {max(best):.4g}" if best else ""


def _output(
    method: Method, problems: list[SearchProblem], populations: list[Population], num_images: int,
    output_type: OutputType,
) -> SearchOutput:  # fmt: skip
    latents, rewards, prompts, info = [], [], [], []
    for row, (problem, population) in enumerate(zip(problems, populations, strict=True)):
        if isinstance(method, SEARCHES):
            picked = np.argsort(-population.rewards, kind="stable")[:num_images].astype(np.int64)
        else:
            picked = population.draws(num_images, problem.generator(purpose="draws"))
        latents.append(population.latents[torch.as_tensor(picked, device=population.latents.device)])
        rewards.append(population.rewards[picked])
        prompts.append(np.full(len(picked), row, dtype=np.int64))
        info.append(
            {
                **population.info, "log_z": population.log_z, "ess": population.ess,
                "evaluations": population.evaluations, "best": float(population.rewards.max()),
            }
        )  # fmt: skip
    chosen = torch.cat(latents)
    images = (
        None if output_type == "latent" else to_output(denoiser_of(problems[0]).decode(chosen), output_type)
    )
    return SearchOutput(
        images, np.concatenate(rewards), np.concatenate(prompts), chosen, info, populations,
        problems[0].evaluations,
    )  # fmt: skip
