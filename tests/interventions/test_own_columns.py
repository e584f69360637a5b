"""Rows that see their own token and a few columns: the way without the call's attention against the formula on its weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from every_edit import a_call
from reattend.interventions import Call, KeyBias, fused, reference
from reattend.interventions.families.guidance import MixOwnAnd
from torch import Tensor

BATCH, TOKENS = 3, 40


def text(kind: str) -> Tensor:
    columns = torch.arange(TOKENS) >= 33
    if kind == "ragged":  # of its own in each row of the batch, and none at all in the last
        return torch.stack([torch.arange(TOKENS) >= start for start in (30, 36, TOKENS)])
    return columns & (kind != "none")


def image_rows(kind: str) -> Tensor | None:
    named = (torch.arange(TOKENS) < 33).expand(BATCH, -1)
    return {"all": None, "image": named, "branch": named & (torch.arange(BATCH) == 2)[:, None]}[kind]


def keys_mask(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    shown = torch.rand(BATCH, 1, 1, TOKENS) > 0.3
    shown[0, :, :, 30:] = False  # nothing of the text, and some rows of the image not even themselves
    return shown if kind == "bool" else torch.where(shown, torch.randn(shown.shape), torch.finfo(torch.float32).min)


def call_with(mask: Tensor | None = None, **options: Any) -> Call:
    call = a_call(TOKENS, TOKENS, mask="none", batch=BATCH, **options)
    call.mask, call.ways = mask, Counter()
    return call


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("rows", ["all", "image", "branch"])
@pytest.mark.parametrize("columns", ["text", "ragged", "none"])
def test_as_on_the_whole_weights(columns: str, rows: str, mask: str, strength: float) -> None:
    torch.manual_seed(0)
    call = call_with(keys_mask(mask))
    edits = [MixOwnAnd(columns=text(columns), strength=strength, rows=image_rows(rows))]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)
    assert call.ways == {"own and columns": 1}


def test_where_no_row_is_named_nothing_changes() -> None:
    call = call_with()
    edits = [MixOwnAnd(columns=text("text"), strength=1.0, rows=torch.zeros(BATCH, TOKENS, dtype=torch.bool))]
    assert torch.equal(fused(call, edits), fused(call, []))


def test_single_heads_and_text_rows_keep_their_numbers() -> None:
    call = call_with()
    edits = [MixOwnAnd(columns=text("text"), strength=1.0, rows=image_rows("branch"), heads=[0, 3])]
    got, plain = fused(call, edits), fused(call, [])
    torch.testing.assert_close(got, reference(call, edits), atol=2e-6, rtol=1e-5)
    assert torch.equal(got[:2], plain[:2]) and torch.equal(got[:, [1, 2]], plain[:, [1, 2]])
    torch.testing.assert_close(got[:, :, 33:], plain[:, :, 33:])


def test_without_text_the_values() -> None:
    call = call_with(kv=4)
    got = fused(call, [MixOwnAnd(columns=text("none"), strength=1.0)])
    assert torch.equal(got, call.value)


@pytest.mark.parametrize("run", [fused, reference])
def test_weights_that_round_to_nothing_follow_from_their_scores(run: Any) -> None:
    """Each row looks at the next token alone; what it gives itself and the text is too little for a float."""
    call = call_with(kv=4)
    call.key = torch.eye(TOKENS)[None, None].expand(BATCH, 4, -1, -1)
    call.query = 2000.0 * call.key.roll(-1, dims=2)
    edits = [MixOwnAnd(columns=text("text"), strength=1.0, rows=torch.arange(TOKENS) < 30)]
    wanted = (call.value + call.value[:, :, 33:].sum(dim=2, keepdim=True)) / 8
    torch.testing.assert_close(run(call, edits)[:, :, :30], wanted[:, :, :30], atol=1e-5, rtol=1e-5)


def test_beside_other_edits_it_is_materialised() -> None:
    call = call_with()
    edits = [KeyBias(bias=torch.rand(TOKENS)), MixOwnAnd(columns=text("text"), strength=1.0)]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)
    assert "own and columns" not in call.ways


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    call = call_with(dtype=dtype)
    edits = [MixOwnAnd(columns=text("text"), strength=0.7, rows=image_rows("image"))]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-2, rtol=2e-2)


def test_gradients() -> None:
    call = call_with()
    call.query.requires_grad_()
    edits = [MixOwnAnd(columns=text("text"), strength=0.7, rows=image_rows("branch"))]
    grads = [torch.autograd.grad(run(call, edits).square().sum(), call.query)[0] for run in (fused, reference)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
