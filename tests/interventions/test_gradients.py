"""Gradients through edits: of fused and reference, against differences of the formulas, with respect to q, k, v and what the edits hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from every_edit import a_call, examples
from reattend.interventions import Edit, Transfer, fused, reference
from reattend.interventions.families.gaze import Focus, refocus_columns
from reattend.interventions.families.sinks import SoundMap, give_back
from torch import Tensor


def refocused(call) -> Edit:
    place = torch.arange(call.num_keys)
    image = ((place > 0) & (place < 4)).expand(call.batch, -1)  # no row sees it alone: heads would tie
    focus = Focus.of(torch.rand(call.batch, call.num_keys).double() * image, image, ~image, 2.0)
    return SoundMap(function=lambda w, r: refocus_columns(focus, 0, 0.5, 0.7, w, r), reads="heads")


def given_back(call) -> Edit:
    n = call.num_keys
    sinks, image = torch.arange(n) == 0, torch.arange(n) < 4
    groups = torch.stack([sinks, image & ~sinks, sinks, image]).double().expand(call.batch, -1, -1)
    limit = torch.full((call.batch, 1, 1), 1.0).double()
    return SoundMap(function=lambda w, r: give_back(w, groups, limit, move=0.5, rho=0.5, summ=0.01))


def edits_of(call, heads=None, rows=None):
    return {**examples(call, heads, rows), "refocus": lambda: refocused(call), "give back": lambda: given_back(call)}


NAMES = list(edits_of(a_call(3)))
HOLD = [name for name, make in edits_of(a_call(3)).items() if make().broadcast]


def operands(call, names=("query", "key", "value")) -> list[Tensor]:
    tensors = [getattr(call, name).requires_grad_() for name in names]
    return tensors


def gradients(run, call, edits, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((run(call, edits) * cotangent).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if own is None else own for own, leaf in zip(found, leaves, strict=True)]


def same(call, edits, leaves, tolerance=1e-7) -> None:
    cotangent = torch.randn(call.query.shape, dtype=call.query.dtype)
    wanted = gradients(reference, call, edits, leaves, cotangent)
    for got, own in zip(gradients(fused, call, edits, leaves, cotangent), wanted, strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(got, own, atol=tolerance, rtol=tolerance)


def mask_for(name: str, mask: str) -> str:
    return "none" if name == "pool" else mask  # rows have to see whole groups


@pytest.mark.parametrize("mask", ["causal", "holes"])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_fused_gradients_are_those_of_the_reference(name, queries, mask):
    torch.manual_seed(0)
    call = a_call(queries, 9, mask=mask_for(name, mask), batch=2, dtype=torch.float64)
    rows = torch.rand(2, queries) > 0.3
    rows[0] = False
    leaves = operands(call)
    same(call, [edits_of(call)[name]()], leaves)
    other = "head gain" if name.startswith(("pool", "held")) else "gain"  # columns that are others have no names
    same(call, [edits_of(call, [1, 2], rows)[name](), edits_of(call, [2, 3])[other]()], leaves)
    # an adapter on one projection: the others need no gradient; what a cache holds is not the call's own
    for alone in () if name == "held" else ("key", "value"):
        call = a_call(queries, 9, mask=mask_for(name, mask), batch=2, dtype=torch.float64)
        same(call, [edits_of(call)[name]()], operands(call, (alone,)))


@pytest.mark.parametrize("queries, keys", [(2, 8), (6, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_slopes_of_the_formulas(name, queries, keys):
    torch.manual_seed(0)
    call = a_call(queries, keys, mask=mask_for(name, "causal"), batch=1, dtype=torch.float64)
    edit, leaves = edits_of(call, [1, 2])[name](), operands(call)

    for run in (reference, fused):

        def changed(query, key, value, run=run):
            return run(dataclasses.replace(call, query=query, key=key, value=value), [edit])

        assert torch.autograd.gradcheck(changed, leaves, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", HOLD)
def test_gradients_of_what_an_edit_holds(name, queries):
    """A bias or a strength that is learned, twice in a row: nothing that is kept with an edit belongs to a backward pass gone by."""
    torch.manual_seed(0)
    call = a_call(queries, 9, batch=2, dtype=torch.float64)
    for heads in (None, [1, 2]):
        edit = edits_of(call, heads)[name]()
        leaves = [getattr(edit, field) for field in edit.broadcast]
        leaves = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if leaves:
            same(call, [edit], leaves)
            same(call, [edit, edits_of(call, [0])["key bias"]()], leaves)


def test_a_transfer_away_from_all_that_a_row_has():
    """Row 0 sees nothing but its source: it keeps it, and its gradient is finite and that of the plain call."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        call = a_call(9, 9, batch=1, dtype=dtype)
        same(call, [Transfer(source=[0], strength=1.0)], operands(call), 1e-5)


def test_learning_a_strength_in_half_precision_gives_finite_gradients():
    torch.manual_seed(0)
    for name in NAMES:
        call = a_call(9, 9, mask=mask_for(name, "causal"), batch=1, dtype=torch.bfloat16)
        if name in ("refocus", "give back"):
            continue
        leaves = operands(call)
        fused(call, [examples(call)[name]()]).float().square().sum().backward()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None), name
