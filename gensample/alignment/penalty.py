"""The divergence from the reference along whole paths, to be taken off the reward.

With KL_j(x) the divergence of step j's law from the reference's at x, the objective E[r - lambda sum_j KL_j] has the
gradient

    E[ sum_i grad log p_i (r - lambda sum_{j > i} KL_j) - lambda sum_i grad KL_i ].

``Objective.kl`` alone is its last term, as in published codes, and ignores how an edge changes what later steps pay.
With lambda times :func:`path_divergence` taken off the reward as well, advantages left out of their own baseline
(``leave_one_out``) and not divided by a std (``scale=1``), and clips that do not bind, the update follows the whole
gradient.  Where x_T does not depend on the start (eps "sbdm" of scale 1) and steps are fine, its optimum is the
reference's law of x_T tilted by exp(r/lambda).

Shapes: P = prompts, L = leaves of a tree, n_i = nodes of level i.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gensample.alignment.objectives import kl_to_reference
from gensample.alignment.policy import Policy
from gensample.alignment.rollout import TreeRollout
from gensample.trees import Answer


def path_divergence(policy: Policy, rollout: TreeRollout, *, micro_batch: int = 64) -> Tensor:
    """The sum over trained steps of KL_j at the nodes of each leaf's path, summed over dimensions: (P L,) float64.

    Asks "reference" once a parent, and "main" too unless the rollout kept its outputs.
    """
    plan, total = rollout.plan, torch.zeros(len(rollout.final), dtype=torch.float64)
    for i in plan.trained_steps:
        prompt, parts = rollout.prompt_of(i), []
        for first in range(0, len(prompt), micro_batch):
            rows = slice(first, first + micro_batch)
            x = rollout.levels[i][rows]
            steps, scale = np.full(len(x), i), np.full(len(x), plan.scale(i))
            answer = (
                Answer(rollout.outputs[i][rows])
                if i in rollout.outputs
                else policy.answer(x, steps, prompt[rows])
            )
            law = policy.law(x, steps, answer, scale)
            there = policy.law(x, steps, policy.answer(x, steps, prompt[rows], net="reference"), scale)
            parts.append(kl_to_reference(law.mean, there.mean, law.std).double().cpu() * rollout.dimensions)
        total += torch.cat(parts).repeat_interleave(plan.leaves // plan.nodes[i])
    return total
