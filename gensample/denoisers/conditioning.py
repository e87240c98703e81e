"""What a network is conditioned on, as rows that follow the samples through batching, branching and guidance.

Shapes: B = samples (rows), K = entries of the reference table, ... = the field's own shape (labels: none;
prompt embeddings: tokens, width).  Batched fields (B, ...); null fields (B, ...) or (1, ...); reference table
(K, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Rows = slice | Sequence[int] | Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Conditioning:
    """The conditioning of a batch. Immutable: every method returns a new one.

    Args:
        batched: fields with one row per sample, such as labels, prompt embeddings or masks.
        shared: values that all rows use alike, such as Flux's ``txt_ids`` and ``img_ids``.
        null_fields: what :meth:`null` puts in place of batched fields (null label, empty-prompt embeddings);
            one row serves all samples, B rows belong one to each. Fields not named here stay.
        references: the table of :meth:`with_reference` (all labels, or a bank of encoded prompts).
        num_rows: the number of samples; needed only where there is no batched field (unconditional models).

    Raises ValueError if rows, field names or shapes disagree.
    """

    batched: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    null_fields: Mapping[str, Tensor] = field(default_factory=dict)
    references: Mapping[str, Tensor] = field(default_factory=dict)
    num_rows: int | None = None

    def __post_init__(self) -> None:
        rows = {name: value.shape[0] if value.ndim else 0 for name, value in self.batched.items()}
        if self.num_rows is None and not rows:
            raise ValueError("num_rows must be given where no field is batched (an unconditional model)")
        num_rows = next(iter(rows.values())) if self.num_rows is None else self.num_rows
        if num_rows < 1 or any(count != num_rows for count in rows.values()):
            raise ValueError(
                f"batched fields must have the same number of rows, at least 1; got {rows or num_rows}"
            )
        object.__setattr__(self, "num_rows", num_rows)
        if clash := sorted(set(self.batched) & set(self.shared)):
            raise ValueError(f"fields {clash} are both batched and shared; a field is one or the other")
        for name, value in self.null_fields.items():
            self._check_binding("null_fields", name, value)
            if value.shape[0] not in (1, num_rows):
                raise ValueError(f"null_fields[{name!r}] has {value.shape[0]} rows; give 1 or {num_rows}")
        for name, value in self.references.items():
            self._check_binding("references", name, value)
        if len({value.shape[0] for value in self.references.values()}) > 1:
            raise ValueError("references must have the same number of entries in every field")

    @property
    def batch_size(self) -> int:
        """The number of rows B."""
        assert self.num_rows is not None
        return self.num_rows

    @property
    def num_references(self) -> int:
        """The number of entries K of the reference table; 0 if none is bound."""
        return next((value.shape[0] for value in self.references.values()), 0)

    def rows(self, index: Rows) -> Conditioning:
        """The rows picked, in order, by a slice, a sequence of ints, a long tensor or a mask (bool)."""
        if isinstance(index, slice):
            return self._map_rows(lambda value: value[index], len(range(self.batch_size)[index]))
        picked = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.long)
        if picked.dtype == torch.bool:
            if picked.shape != (self.batch_size,):
                raise ValueError(
                    f"a mask over rows must have shape ({self.batch_size},), got {tuple(picked.shape)}"
                )
            picked = picked.nonzero()[:, 0]
        if picked.ndim != 1 or picked.is_floating_point():
            raise ValueError(
                f"row indices must be a one-dimensional long tensor, got {picked.dtype} {picked.shape}"
            )
        return self._map_rows(lambda value: value[picked.to(value.device)], len(picked))

    def repeat(self, k: int) -> Conditioning:
        """Every row ``k`` times, copies adjacent (``repeat_interleave``): row r becomes rows r k to r k + k - 1."""
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        return self._map_rows(lambda value: value.repeat_interleave(k, dim=0), self.batch_size * k)

    def null(self) -> Conditioning:
        """The unconditional branch: batched fields replaced by the bound null fields.

        Raises ValueError if nothing is bound.
        """
        if not self.null_fields:
            raise ValueError(
                "no null branch is bound to this conditioning, so classifier-free guidance has nothing to "
                "contrast with; bind one with bind_null, or guide with a weak network (autoguidance)"
            )
        fields = {
            name: value.expand(self.batch_size, *value.shape[1:]) for name, value in self.null_fields.items()
        }
        return replace(self, batched={**self.batched, **fields})

    def with_reference(self, r: Tensor) -> Conditioning:
        """Row b conditioned on entry ``r[b]`` of the reference table; ``r`` is (B,) long.

        Raises ValueError if no table is bound or an entry is out of range.
        """
        if not self.references:
            raise ValueError(
                "no reference table is bound; use bind_references, or reference_prompts= with a pipeline"
            )
        if r.shape != (self.batch_size,) or r.dtype != torch.long:
            raise ValueError(
                f"r must be long of shape ({self.batch_size},), got {r.dtype} of shape {tuple(r.shape)}"
            )
        if int(r.min()) < 0 or int(r.max()) >= self.num_references:
            raise ValueError(
                f"r must lie in 0..{self.num_references - 1}, got {int(r.min())}..{int(r.max())}"
            )
        fields = {name: table[r.to(table.device)] for name, table in self.references.items()}
        return replace(self, batched={**self.batched, **fields})

    def bind_null(self, **fields: Tensor) -> Conditioning:
        """With ``fields`` as the null branch: (1, ...) for all samples or (B, ...)."""
        return replace(self, null_fields=fields)

    def bind_references(self, **fields: Tensor) -> Conditioning:
        """With ``fields`` (K, ...) as the reference table."""
        return replace(self, references=fields)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Everything on ``device``; floating-point fields in ``dtype``, except the shared ones."""

        def move(value: Any) -> Any:
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(
            self,
            batched={name: move(value) for name, value in self.batched.items()},
            shared={n: v.to(device) if isinstance(v, Tensor) else v for n, v in self.shared.items()},
            null_fields={name: move(value) for name, value in self.null_fields.items()},
            references={name: move(value) for name, value in self.references.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all ``parts``, in order; shared values and the reference table must be the same in all.

        Raises ValueError naming the field that differs.
        """
        if not parts:
            raise ValueError("parts is empty; give at least one Conditioning")
        first = parts[0]
        for name in ("batched", "shared", "null_fields", "references"):
            keys = [sorted(getattr(part, name)) for part in parts]
            if any(k != keys[0] for k in keys):
                raise ValueError(f"cannot concatenate conditionings whose {name} differ: {keys}")
        for name in ("shared", "references"):
            for key, value in getattr(first, name).items():
                if not all(_same(value, getattr(part, name)[key]) for part in parts[1:]):
                    raise ValueError(
                        f"{name}[{key!r}] differs between the conditionings; evaluate them apart"
                    )
        batched = {key: _cat_field(key, [part.batched[key] for part in parts]) for key in first.batched}
        null_fields = {}
        for key, value in first.null_fields.items():
            if value.shape[0] == 1 and all(_same(value, part.null_fields[key]) for part in parts[1:]):
                null_fields[key] = value
            else:
                rows = [p.null_fields[key].expand(p.batch_size, *value.shape[1:]) for p in parts]
                null_fields[key] = _cat_field(key, rows)
        num_rows = sum(part.batch_size for part in parts)
        return replace(first, batched=batched, null_fields=null_fields, num_rows=num_rows)

    def _map_rows(self, pick: Callable[[Tensor], Tensor], num_rows: int) -> Conditioning:
        """``pick`` applied to every per-row tensor; one-row null fields serve any number of rows."""
        if num_rows < 1:
            raise ValueError("the selection is empty; a conditioning has at least one row")
        return replace(
            self,
            batched={name: pick(value) for name, value in self.batched.items()},
            null_fields={n: v if v.shape[0] == 1 else pick(v) for n, v in self.null_fields.items()},
            num_rows=num_rows,
        )

    def _check_binding(self, kind: str, name: str, value: Tensor) -> None:
        if name not in self.batched:
            raise ValueError(
                f"{kind}[{name!r}] replaces no batched field; the fields are {sorted(self.batched)}"
            )
        expected = tuple(self.batched[name].shape[1:])
        if value.ndim == 0 or tuple(value.shape[1:]) != expected:
            raise ValueError(f"{kind}[{name!r}] has shape {tuple(value.shape)}; expected (rows, *{expected})")

    def __repr__(self) -> str:
        def shapes(fields: Mapping[str, Any]) -> str:
            items = (f"{n}: {tuple(v.shape) if isinstance(v, Tensor) else v!r}" for n, v in fields.items())
            return "{" + ", ".join(items) + "}"

        return (
            f"Conditioning(batch_size={self.batch_size}, batched={shapes(self.batched)}, "
            f"shared={shapes(self.shared)}, null_fields={shapes(self.null_fields)}, "
            f"references={shapes(self.references)})"
        )


def _same(a: Any, b: Any) -> bool:
    if a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return a is b or bool(a == b)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _cat_field(name: str, values: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"field {name!r} has different shapes {sorted(shapes)} per row; pad the prompts to one length"
        )
    return torch.cat(list(values))
