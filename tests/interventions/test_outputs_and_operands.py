"""Edits of outputs, and of operands for some rows, heads and batch rows: what they mean by hand and against the authors' code."""

from __future__ import annotations

import pytest
import torch
from golden_files import golden_file
from one_call import KV, B, D, H, T, both, call, way
from reattend.interventions import (
    AppendKV,
    Call,
    Extrapolate,
    Instead,
    KeyBias,
    PoolKV,
    ReattendError,
    Reorder,
    ReplaceKV,
    Second,
    TakeOutput,
    fused,
    reference,
    reference_with_weights,
    row_outputs,
    row_weights,
)
from reattend.interventions.edits.second import extrapolated
from reattend.interventions.engine.kernels import attend


def test_a_second_attention_by_hand():
    here = call()
    key, value = torch.randn(B, KV, 7, D), torch.randn(B, KV, 7, D)
    other = attend(here.query, key, value)[0]
    plain = fused(here, [])
    torch.testing.assert_close(both(here, [Second(key=key, value=value, combine=0.25)]), 0.75 * plain + 0.25 * other)
    # key heads are cut with the query heads that share them, and rows that see none of the second's keys keep their output
    some = torch.arange(T)[:, None].expand(-1, 7) >= 10
    found = both(here, [Second(key=key, value=value, mask=some), KeyBias(bias=torch.zeros(T), heads=[1])])
    torch.testing.assert_close(found[:, :, 10:], other[:, :, 10:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, :10], plain[:, :, :10], atol=1e-5, rtol=1e-5)


def test_extrapolate_is_the_authors_function():
    data, facts = golden_file("nag", "formula_l1")
    positive, negative = (data[name].unflatten(2, (3, 8)).transpose(1, 2) for name in ("z_positive", "z_negative"))
    scale, tau, alpha = (float(facts[f"nag_{name}"]) for name in ("scale", "tau", "alpha"))
    found = extrapolated(positive, negative, scale, tau, alpha).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, data["out"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("name", ["cross_no_cfg", "cross_cfg"])
def test_normalised_attention_guidance_at_a_text_site(name, run):
    """The negative text as a second attention of the positive rows, combined over all heads of a token."""
    data, facts = golden_file("nag", name)
    n = int(facts["origin_batch"])
    scale, tau, alpha = (float(facts[f"nag_{name}"]) for name in ("scale", "tau", "alpha"))
    here = Call(*(data[name][:-n] for name in ("query", "key", "value")))
    rows = torch.zeros(here.batch, 1, dtype=torch.bool)
    rows[-n:] = True
    key, value = (data[name][-n:].repeat(here.batch // n, 1, 1, 1) for name in ("key", "value"))

    def away(output, second, _):
        return extrapolated(output, second, scale, tau, alpha)

    edit = Second(key=key, value=value, combine=away, reads="heads", rows=rows)
    found = run(here, [edit]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found[-n:], data["before_to_out"][-n:], atol=1e-5, rtol=1e-5)
    assert torch.equal(run(here, [edit])[:-n], run(here, [])[:-n])


def test_extrapolate_over_all_heads_without_a_matrix():
    here, other = call(causal=False), torch.randn(B, H, T, D)
    plain = fused(here, [])
    edit = Extrapolate(other=other, factor=4.0, limit=1e6, strength=0.5)
    torch.testing.assert_close(both(here, [edit]), plain + 0.5 * 3.0 * (plain - other), atol=1e-5, rtol=1e-5)
    assert set(way(here, [edit])) == {"outputs across heads", "untouched"}
    swapped = Extrapolate(other=torch.tensor([1, 0]), factor=3.0)
    wanted = extrapolated(plain, plain[[1, 0]], 3.0, 2.5, 0.25)
    torch.testing.assert_close(both(here, [swapped]), wanted, atol=1e-5, rtol=1e-5)
    for off in (Extrapolate(other=other, factor=1.0), Extrapolate(other=other, factor=9.0, strength=0.0)):
        assert torch.equal(fused(here, [off]), plain)


def test_outputs_are_taken_from_rows_of_either_kind():
    here = call()
    plain = fused(here, [])
    source = torch.arange(T).flip(0)
    assert torch.equal(both(here, [TakeOutput(source=source)]), plain.flip(2))
    assert torch.equal(both(here, [TakeOutput(batch=torch.tensor([1, 0]))]), plain.flip(0))
    index = torch.tensor([0, 7])
    torch.testing.assert_close(row_outputs(here, [TakeOutput(source=source)], index), plain.flip(2)[:, :, index])
    per_row = torch.stack([source, torch.zeros(T, dtype=torch.long)])
    found = both(here, [TakeOutput(source=per_row, heads=[2])])
    assert torch.equal(found[1, 2], plain[1, 2, :1].expand(T, -1)) and torch.equal(found[:, [0, 1, 3]], plain[:, [0, 1, 3]])


def test_what_takes_attentions_place_is_computed_once_per_group_and_attention_is_not():
    here, runs = call(), []

    def mean(x, scale):
        runs.append(x.is_causal)
        return x.value.mean(2, keepdim=True).repeat_interleave(x.query.shape[1] // x.value.shape[1], 1).expand_as(x.query)

    edit = Instead(compute=mean)
    assert edit.approximate and not KeyBias(bias=torch.zeros(3)).approximate
    assert way(here, [edit, KeyBias(bias=torch.zeros(T))]) == ["replaced"] and runs == [True]
    torch.testing.assert_close(both(here, [edit])[0, 3], here.value[0, 1].mean(0).expand(T, -1))
    with pytest.raises(ReattendError, match="compute of Instead gave"):
        fused(here, [Instead(compute=lambda x, scale: x.value[:, :, :3])])


# operands


def test_appended_columns_for_some_rows_are_those_of_plain_attention_for_the_others():
    here = call()
    key, value = torch.randn(B, KV, 3, D), torch.randn(B, KV, 3, D)
    rows = torch.tensor([[False], [True]])
    found = both(here, [AppendKV(key=key, value=value, rows=rows)])
    assert torch.equal(found[0], fused(here, [])[0])
    torch.testing.assert_close(found[1], reference(here, [AppendKV(key=key, value=value)])[1], atol=1e-5, rtol=1e-5)
    weights = reference_with_weights(here, [AppendKV(key=key, value=value, heads=[1])])[1]
    assert weights.shape[-1] == T + 3 and (weights[:, [0, 2, 3], :, T:] == 0).all() and (weights[:, 1, :, T:] > 0).all()
    torch.testing.assert_close(row_weights(here, [AppendKV(key=key, value=value, heads=[1])], torch.arange(T)), weights)


def test_replaced_columns_per_batch_row_and_head():
    here = call()
    value = torch.randn(B, KV, 2, D)
    columns = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    new = here.value.clone()
    for row in range(B):
        for head in range(KV):
            new[row, head, columns[row, head]] = value[row, head]
    wanted = attend(here.query, here.key, new, is_causal=True)[0]
    torch.testing.assert_close(both(here, [ReplaceKV(columns=columns, value=value)]), wanted)
    per_row = both(here, [ReplaceKV(columns=columns[:, 0], value=value, rows=torch.arange(T) > 9)])
    torch.testing.assert_close(per_row[:, :, :10], fused(here, [])[:, :, :10], atol=1e-6, rtol=1e-5)


def test_each_head_in_an_order_of_its_own():
    here = call(causal=False)
    order = torch.rand(B, H, T).argsort(dim=-1)
    torch.testing.assert_close(both(here, [Reorder(order=order)]), fused(here, []), atol=1e-6, rtol=1e-5)
    bias = KeyBias(bias=torch.randn(B, H, T))
    moved = KeyBias(bias=torch.zeros(B, H, T).scatter(2, order, bias.bias))
    torch.testing.assert_close(both(here, [Reorder(order=order), bias]), fused(here, [moved]), atol=1e-5, rtol=1e-5)


def test_pooled_columns_for_the_first_rows_only():
    here = call(causal=False)
    groups = torch.arange(T) // 2
    rows = torch.arange(T) < 10
    found = both(here, [PoolKV(groups=groups, rows=rows, heads=[0, 3])])
    everywhere, plain = reference(here, [PoolKV(groups=groups)]), fused(here, [])
    torch.testing.assert_close(found[:, [0, 3], :10], everywhere[:, [0, 3], :10], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, 10:], plain[:, :, 10:], atol=1e-6, rtol=1e-5)
    assert torch.equal(found[:, [1, 2]], plain[:, [1, 2]])
