"""One network call of somebody else's loop, remembered so that it can be repeated with other conditioning fields.

Shapes: B rows; the network's input and answer (B, ...); fields (B, ...); a repeat may ask for any rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class CapturedCall:
    """The next call of a network: its module, arguments and answer."""

    ROW = "_row"  # the batched field that says which row of the captured batch a row is

    def __init__(self, module: nn.Module) -> None:
        """Use :meth:`listen`."""
        self.module = module
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.answer: Tensor | None = None
        self._handles: list[Any] = []

    @classmethod
    def listen(cls, module: nn.Module) -> CapturedCall:
        """Capture the next call of ``module``."""
        call = cls(module)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.args, call.kwargs = args, kwargs

        def after(_: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
            call.answer = first_of(answer) if answer is not None else None
            call.stop()

        call._handles = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),  # also when the network raises
        ]
        return call

    def stop(self) -> None:
        """Remove the listeners."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self, prediction: Tensor) -> None:
        """Raise TypeError unless the block handed the network's answer on as it was."""
        if self.answer is None:
            raise TypeError("the denoise block did not call the network that it had prepared")
        same = prediction is self.answer or (
            prediction.shape == self.answer.shape and torch.equal(prediction, self.answer)
        )
        if not same:
            raise TypeError(
                "this pipeline's denoise block alters the network's answer (a slice, a sign), which our guiders "
                "cannot repeat; use gensample.sample with the monolithic pipeline"
            )

    def input_like(self, prediction: Tensor) -> Tensor:
        """The network's input: the first argument of the prediction's shape, scaled as the scheduler scales it.

        Raises TypeError where there is none (an inpainting network with mask channels).
        """
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.shape == prediction.shape:
                return value
        raise TypeError(
            f"the network was called with no input of the prediction's shape {tuple(prediction.shape)}"
        )

    def network(
        self,
        fields: Mapping[str, Tensor],
        *,
        module: nn.Module | None = None,
        answer: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """The call as a network ``(x, timestep, **fields)`` over rows of the captured batch, for ``Denoiser``.

        fields: those of the captured call.  module: another network for the same arguments.  answer: what to give,
        without a call, for rows under the captured fields.  x and timestep stay the captured ones.
        """
        run = module if module is not None else self.module

        def repeat(x: Tensor, timestep: Tensor, **given: Any) -> Tensor:
            row = given.pop(self.ROW).to(x.device)
            if answer is not None and all(torch.equal(given[n].to(v), v[row]) for n, v in fields.items()):
                return answer[row].to(x)
            parts = []
            for start in range(0, len(row), len(next(iter(fields.values())))):
                chunk = slice(start, start + len(next(iter(fields.values()))))
                parts.append(self._run(run, fields, {n: given[n][chunk] for n in fields}, row[chunk]))
            return torch.cat(parts).to(x)

        return repeat

    def _run(
        self, module: nn.Module, fields: Mapping[str, Tensor], given: Mapping[str, Tensor], row: Tensor
    ) -> Tensor:
        """The answers for distinct rows of the batch under ``given``; the rows not asked for keep their fields."""
        swaps = [(value, value.index_copy(0, row, given[name].to(value))) for name, value in fields.items()]
        found: set[int] = set()

        def swapped(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: swapped(v) for key, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(swapped(v) for v in value)
            for index, (old, new) in enumerate(swaps):
                if value is old:
                    found.add(index)
                    return new
            return value

        args, kwargs = swapped(self.args), swapped(self.kwargs)
        lost = [n for i, n in enumerate(fields) if i not in found and not torch.equal(*swaps[i])]
        if lost:
            raise TypeError(
                f"the denoise block does not hand {lost} to the network as they are, so they cannot change"
            )
        return first_of(module(*args, **kwargs))[row]


def first_of(answer: Any) -> Tensor:
    """The tensor of a network's answer: itself, ``.sample``, or the first of a tuple."""
    answer = getattr(answer, "sample", answer)
    first = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(first, Tensor):
        raise TypeError(f"the network answered {type(answer).__name__}, not a tensor, a tuple or .sample")
    return first
