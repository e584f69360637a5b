"""`Rearrange`: block by block equals the reference, in batches, with padding, at decode, with other edits, and on some heads only."""

from __future__ import annotations

import pytest
import torch
from reattend.interventions import Call, HeadGain, KeyBias, Rearrange, ReattendError, ReplaceKV, fused, reference, row_weights
from reattend.interventions.edits import AppendKV
from reattend.interventions.rotary import Rotary

SPANS = torch.tensor([[[3, 7], [7, 12], [12, 14]], [[5, 9], [9, 15], [0, 0]]], dtype=torch.int32)
FIRST = torch.tensor([0, 2], dtype=torch.int32)


def case(
    rows=20, keys=20, heads=4, shared=2, dim=8, spans=SPANS, first=FIRST, seed=0, hidden=None, dtype=torch.float32, **options
):
    torch.manual_seed(seed)
    batch, m = spans.shape[0], spans.shape[1]
    q, k, v = (torch.randn(batch, n, t, dim, dtype=dtype) for n, t in ((heads, rows), (shared, keys), (shared, keys)))
    call = Call(q, k, v, is_causal=True, **options)
    start = keys - rows
    steps = torch.zeros(batch, heads, rows, m + 1, dtype=torch.int32)
    place = torch.arange(start, keys)
    for b, row in enumerate(spans.tolist()):
        held = [(a, z) for a, z in row if z > a]
        for j, (low, high) in enumerate(held):
            # the rows of a segment share their steps
            own = torch.randint(-9, 9, (heads, 1, m + 1), dtype=torch.int32)
            own[..., j + 1] = 0
            inside = (place >= low) & (place < high)
            steps[b, :, inside] = own.expand(-1, int(inside.sum()), -1)
        behind = place >= max((z for _, z in held), default=keys)
        steps[b, :, behind, 1:] = torch.randint(-9, 9, (heads, int(behind.sum()), m), dtype=torch.int32)
    rotary = Rotary(10000.0 ** (-torch.arange(0, dim, 2) / dim))
    return call, Rearrange(spans=spans, steps=steps, first=first, start=start, rotary=rotary, hidden=hidden)


def same(call, edits, tolerance=2e-5):
    ours, wanted = fused(call, edits), reference(call, edits)
    for b in range(call.batch):  # what rows of padding give, nobody reads
        first = max(0, int(FIRST[b]) - (call.num_keys - call.num_queries)) if call.batch == 2 else 0
        torch.testing.assert_close(ours[b, :, first:], wanted[b, :, first:], atol=tolerance, rtol=0)
    assert ours.isfinite().all()
    return wanted


@pytest.mark.parametrize("rows", [20, 5, 4, 1])
@pytest.mark.parametrize("heads, shared", [(4, 4), (4, 2), (4, 1)])
def test_fused_equals_reference(rows, heads, shared):
    call, edit = case(rows, heads=heads, shared=shared)
    changed = same(call, [edit])
    assert (changed - reference(call, []))[:, :, -1].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"scale": 0.7}])
@pytest.mark.parametrize("rows", [20, 1])
def test_other_score_functions(options, rows):
    call, edit = case(rows, **options)
    same(call, [edit])


def test_many_segments_at_decode():
    ends = [(2 + 2 * i, 4 + 2 * i) for i in range(9)]
    spans = torch.tensor([ends], dtype=torch.int32)
    for rows in (24, 1):
        call, edit = case(rows, 24, spans=spans, first=torch.zeros(1, dtype=torch.int32))
        same(call, [edit])


def test_hidden_columns_behind_the_segments():
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    hidden[0, 16:18] = True
    for rows in (20, 1):
        call, edit = case(rows, hidden=hidden)
        wanted = same(call, [edit])
        call.value[0, :, 16:18] = 100
        torch.testing.assert_close(reference(call, [edit])[0, :, -1], wanted[0, :, -1])


def test_what_rows_see():
    call, edit = case()
    weights = row_weights(call, [edit], torch.arange(20))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))
    assert (weights[0, :, 8, :14] > 0)[:, [0, 3, 7, 8, 12, 13]].all(), "prefix, all other segments, its own up to itself"
    assert (weights[0, :, 8, 9:12] == 0).all() and (weights[0, :, 8, 14:] == 0).all(), "not its own future, not the question"
    assert (weights[0, :, 2, 3:] == 0).all()
    assert (weights[1, :, 2:, :2] == 0).all(), "padding"
    assert (weights[0, :, 16, 17:] == 0).all() and (weights[0, :, 16, :17] > 0).all()


@pytest.mark.parametrize("rows", [20, 1])
@pytest.mark.parametrize("edits", [[HeadGain(factor=0.5)], [KeyBias(bias=torch.linspace(-1, 1, 20), heads=[1, 2])]])
def test_together_with_other_edits(edits, rows):
    call, edit = case(rows)
    same(call, [edit, *edits])
    same(call, [*edits, edit])


def test_after_other_operands():
    call, edit = case()
    value = ReplaceKV(columns=torch.tensor([4]), value=torch.ones(1, 1, 1, 8))
    same(call, [value, edit])
    with pytest.raises(ReattendError, match="own columns"):
        fused(call, [AppendKV(key=torch.ones(2, 2, 1, 8), value=torch.ones(2, 2, 1, 8)), edit, KeyBias(bias=torch.zeros(20))])


@pytest.mark.parametrize("rows", [20, 1])
def test_some_heads_and_some_rows_of_the_batch(rows):
    import dataclasses

    call, edit = case(rows)
    part = dataclasses.replace(edit, heads=[1, 3], steps=edit.steps[:, [1, 3]], shared={})
    same(call, [part])
    torch.testing.assert_close(fused(call, [part])[:, [0, 2]], fused(call, [])[:, [0, 2]], atol=1e-6, rtol=0)
    if rows > 4:
        first = dataclasses.replace(edit, rows=torch.tensor([[True], [False]]), shared={})
        out = fused(call, [first])
        assert torch.equal(out[1], fused(call, [])[1]), "the batch row that is not named keeps its bits"
        torch.testing.assert_close(out[0], fused(call, [edit])[0], atol=2e-5, rtol=0)


def test_no_steps_change_distances_only_what_is_seen():
    call, edit = case(first=torch.zeros(2, dtype=torch.int32))
    edit.steps.zero_()
    torch.testing.assert_close(fused(call, [edit])[0, :, 14:], fused(call, [])[0, :, 14:], atol=1e-5, rtol=0)
    torch.testing.assert_close(fused(call, [edit])[0, :, :3], fused(call, [])[0, :, :3], atol=1e-5, rtol=0)


def test_half_precision_is_close():
    call, edit = case(dtype=torch.bfloat16)
    exact, exact_edit = case()
    exact.query, exact.key, exact.value = (x.float() for x in (call.query, call.key, call.value))
    torch.testing.assert_close(fused(call, [edit])[0].float(), reference(exact, [exact_edit])[0], atol=0.05, rtol=0.05)


def test_bad_arguments():
    _, edit = case()
    with pytest.raises(ReattendError, match="int32"):
        Rearrange(spans=SPANS.long(), steps=edit.steps, first=FIRST, start=0, rotary=edit.rotary)
    with pytest.raises(ReattendError, match="groups"):
        Rearrange(spans=SPANS, steps=edit.steps[..., :2], first=FIRST, start=0, rotary=edit.rotary)
