"""Conditioning: rows follow their samples, and every mismatch is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gensample.denoisers import Conditioning


@pytest.fixture
def labels() -> Conditioning:
    return (
        Conditioning({"class_labels": torch.tensor([3, 5, 7])}, {"img_ids": torch.arange(4)})
        .bind_null(class_labels=torch.tensor([10]))
        .bind_references(class_labels=torch.arange(10))
    )


@pytest.fixture
def prompts() -> Conditioning:
    embeds = torch.arange(12.0).reshape(3, 2, 2)
    pooled = torch.arange(3.0)[:, None]
    null = {"embeds": -embeds, "pooled": -pooled}
    return Conditioning({"embeds": embeds, "pooled": pooled, "sizes": torch.ones(3, 6)}, null_fields=null)


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), (2, 0)], ids=["list", "tensor", "tuple"])
def test_rows_picks_in_order(labels: Conditioning, index: object) -> None:
    picked = labels.rows(index)  # type: ignore[arg-type]
    assert picked.batched["class_labels"].tolist() == [7, 3]
    assert picked.shared["img_ids"] is labels.shared["img_ids"]


def test_rows_takes_masks_and_slices(prompts: Conditioning) -> None:
    masked = prompts.rows(torch.tensor([True, False, True]))
    assert masked.batched["pooled"].flatten().tolist() == [0, 2]
    assert masked.null_fields["pooled"].flatten().tolist() == [0, -2]
    assert prompts.rows(slice(1, 3)).null().batched["pooled"].flatten().tolist() == [-1, -2]
    assert prompts.rows([1, 1, 1, 1]).batch_size == 4


def test_repeat_interleaves_rows_and_their_null_rows(labels: Conditioning, prompts: Conditioning) -> None:
    assert labels.repeat(2).batched["class_labels"].tolist() == [3, 3, 5, 5, 7, 7]
    twice = prompts.repeat(2)
    assert twice.batch_size == 6
    assert twice.null().batched["pooled"].flatten().tolist() == [0, 0, -1, -1, -2, -2]


def test_null_replaces_only_bound_fields(labels: Conditioning, prompts: Conditioning) -> None:
    assert labels.null().batched["class_labels"].tolist() == [10, 10, 10]
    assert labels.null().null().batched["class_labels"].tolist() == [10, 10, 10]
    null = prompts.null()
    assert torch.equal(null.batched["embeds"], -prompts.batched["embeds"])
    assert null.batched["sizes"] is prompts.batched["sizes"]
    assert labels.batched["class_labels"].tolist() == [3, 5, 7]


def test_with_reference_reads_the_table_per_row(labels: Conditioning) -> None:
    swapped = labels.with_reference(torch.tensor([0, 9, 5]))
    assert swapped.batched["class_labels"].tolist() == [0, 9, 5]
    assert swapped.rows([1]).null().batched["class_labels"].tolist() == [10]
    assert labels.num_references == 10


def test_cat_gives_the_doubled_batch_of_cfg(labels: Conditioning, prompts: Conditioning) -> None:
    doubled = Conditioning.cat([labels, labels.null()])
    assert doubled.batched["class_labels"].tolist() == [3, 5, 7, 10, 10, 10]
    assert doubled.shared["img_ids"] is labels.shared["img_ids"]
    assert doubled.null_fields["class_labels"] is labels.null_fields["class_labels"]
    both = Conditioning.cat([prompts, prompts.rows([2])])
    assert both.batched["pooled"].flatten().tolist() == [0, 1, 2, 2]
    assert both.null().batched["pooled"].flatten().tolist() == [0, -1, -2, -2]


def test_cat_undoes_rows(prompts: Conditioning) -> None:
    again = Conditioning.cat([prompts.rows(slice(0, 1)), prompts.rows([1, 2])])
    for name, value in prompts.batched.items():
        assert torch.equal(again.batched[name], value)


def test_unconditional_rows_are_counted() -> None:
    empty = Conditioning(num_rows=3)
    assert empty.rows([0, 2]).batch_size == 2
    assert empty.repeat(4).batch_size == 12
    assert Conditioning.cat([empty, empty]).batch_size == 6


def test_to_casts_floating_fields_only(prompts: Conditioning, labels: Conditioning) -> None:
    half = prompts.to(dtype=torch.bfloat16)
    assert half.batched["embeds"].dtype == half.null_fields["embeds"].dtype == torch.bfloat16
    assert labels.to("cpu", torch.bfloat16).batched["class_labels"].dtype == torch.long


def test_it_is_immutable(labels: Conditioning) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        labels.num_rows = 2  # type: ignore[misc]


def test_repr_shows_shapes_not_values(prompts: Conditioning) -> None:
    assert "embeds: (3, 2, 2)" in repr(prompts)
    assert "tensor" not in repr(prompts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, p: Conditioning(), "num_rows must be given"),
        (lambda c, p: Conditioning({"a": torch.ones(2), "b": torch.ones(3)}), "same number of rows"),
        (lambda c, p: Conditioning({"a": torch.ones(2)}, {"a": 1}), "both batched and shared"),
        (lambda c, p: c.bind_null(embeds=torch.ones(1, 2)), "replaces no batched field"),
        (lambda c, p: p.bind_null(embeds=torch.ones(1, 5, 2)), r"expected \(rows, \*\(2, 2\)\)"),
        (lambda c, p: p.bind_null(embeds=torch.ones(2, 2, 2)), "give 1 or 3"),
        (lambda c, p: p.with_reference(torch.tensor([0, 0, 0])), "no reference table"),
        (lambda c, p: c.with_reference(torch.tensor([0, 0, 10])), r"must lie in 0\.\.9"),
        (lambda c, p: c.with_reference(torch.tensor([0])), r"shape \(3,\)"),
        (lambda c, p: Conditioning({"a": torch.ones(2)}).null(), "no null branch"),
        (lambda c, p: Conditioning.cat([c, p]), "batched differ"),
        (lambda c, p: Conditioning.cat([]), "parts is empty"),
        (lambda c, p: Conditioning.cat([c, dataclasses.replace(c, shared={"img_ids": 1})]), "'img_ids'"),
        (
            lambda c, p: Conditioning.cat(
                [Conditioning({"a": torch.ones(1, 2)}), Conditioning({"a": torch.ones(1, 3)})]
            ),
            "pad the prompts",
        ),
        (lambda c, p: c.rows([]), "empty"),
        (lambda c, p: c.rows(torch.tensor([True, False])), r"shape \(3,\)"),
        (lambda c, p: c.rows(torch.tensor([0.5])), "one-dimensional long"),
        (lambda c, p: c.repeat(0), "k=0"),
    ],
)
def test_bad_input_is_named(labels: Conditioning, prompts: Conditioning, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(labels, prompts)  # type: ignore[operator]
