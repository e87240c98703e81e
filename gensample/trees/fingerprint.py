"""What a chain is, as short strings: a saved tree is only resumed on the chain that it was grown on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensample.trees.chain import Answer, Chain
from gensample.trees.denoiser_chain import DenoiserChain
from gensample.trees.masked import MaskedChain
from gensample.trees.oracles import MixtureChain


@singledispatch
def details(chain: Chain) -> dict[str, str]:
    """What tells chains of one class apart, besides their steps and shape; extend it for classes of your own."""
    return {}


@details.register
def _(chain: DenoiserChain) -> dict[str, str]:
    names = sorted(chain.denoiser.nets)
    weights = (t for n in names for _, t in sorted(_state(chain.denoiser.nets[n]).items()))
    conditioning = chain.denoiser.conditioning
    return {
        "networks": hash_tensors(weights),
        "conditioning": hash_tensors(t for _, t in sorted(conditioning.batched.items())),
        "times": hash_tensors([torch.from_numpy(chain.times)]),
        "guidance": re.sub(r" at 0x[0-9a-f]+", "", repr(chain.guidance)),
        "transition law": _probe(chain),
    }


@details.register
def _(chain: MixtureChain) -> dict[str, str]:
    m = chain.mixture
    parts = [torch.from_numpy(chain.times), m.weights, m.means, m.covariances]
    return {"mixture": hash_tensors(parts), "path": repr(chain.path)}


@details.register
def _(chain: MaskedChain) -> dict[str, str]:
    x = torch.full((1, *chain.shape), chain.num_tokens, dtype=torch.int64)
    before = chain.evaluations
    answer = chain.answer(x, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)).output
    chain.evaluations = before
    rounded = (answer.double() * 1e3).round()
    return {"tokens": str(chain.num_tokens), "logits of the blank": hash_tensors([rounded])}


def fingerprint(chain: Chain) -> dict[str, str]:
    """Names and hashes of everything that the law of ``chain`` depends on."""
    own = {
        "chain": type(chain).__name__,
        "steps": str(chain.num_steps),
        "shape": json.dumps(list(chain.shape)),
    }
    return {**own, **details(chain)}


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """blake2b of types, shapes and contents."""
    h = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        h.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        if flat.numel():
            h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()


def _state(network: Any) -> dict[str, Tensor]:
    return dict(network.state_dict()) if hasattr(network, "state_dict") else {}


def _probe(chain: DenoiserChain) -> str:
    """The law's means and spreads at two probes a step, to five digits."""
    one, zero = torch.ones(1, *chain.shape), torch.zeros(1, *chain.shape)
    values: list[float] = []
    for x, output in ((one, zero), (zero, one)):
        for step in range(chain.num_steps):
            law: Any = chain.transition(x, np.array([step]), Answer(output, zero))
            values += [float(law.mean.flatten()[0]), float(torch.as_tensor(law.std).flatten()[0])]
    return hashlib.blake2b(" ".join(f"{v:.4e}" for v in values).encode(), digest_size=16).hexdigest()
