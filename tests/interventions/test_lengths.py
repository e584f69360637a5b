"""Tensors of edits that are made for other heads, batch rows or query rows than they meet are refused by name, not broadcast or cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from every_edit import a_call, examples
from reattend.interventions import (
    AppendKV,
    HeadGain,
    HeadMix,
    KeyBias,
    ProjectKey,
    ReattendError,
    Reorder,
    ReplaceKV,
    fused,
    reference,
)

# every tensor of every edit that has an axis of heads
PER_HEAD = [
    (name, field, value.shape)
    for name, make in examples(a_call(3), [1, 2]).items()
    for edit in [make()]
    for field in edit.broadcast
    for value in [getattr(edit, field)]
    if isinstance(value, torch.Tensor) and value.dtype != torch.long and value.shape[1] == 2
]


def test_the_case_that_acted_as_nothing():
    with pytest.raises(ReattendError, match=r"factor has values for 3 heads, but the edit names 1 \(heads=\[5\]\): give 1"):
        HeadGain(heads=[5], factor=torch.tensor([0.0, 5.0, 9.0]))


@pytest.mark.parametrize("name, field, shape", PER_HEAD)
def test_per_head_tensors_fit_the_heads_that_are_named(name, field, shape):
    edit = examples(a_call(3), [1, 2])[name]()
    wrong = torch.cat([getattr(edit, field)] * 2, dim=1)[:, :3]
    with pytest.raises(ReattendError, match=f"{field} has values for 3 heads, but the edit names 2"):
        dataclasses.replace(edit, **{field: wrong})


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("name, field, shape", PER_HEAD)
def test_without_names_they_fit_the_heads_of_the_call(name, field, shape, run):
    call = a_call(3)
    wrong = torch.cat([getattr(examples(call)[name](), field)] * 2, dim=1)[:, :5]
    edit = dataclasses.replace(examples(call)[name](), **{field: wrong})
    with pytest.raises(ReattendError, match=f"{field} of .* has values for 5 heads, this call has 4: give 4"):
        run(call, [edit])


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("queries", [1, 12])
def test_batch_rows_and_query_rows_too(queries, run):
    call = a_call(queries)
    longer = torch.ones(call.batch, 20, dtype=torch.bool)
    many = torch.ones(7, 1, dtype=torch.bool)
    kv, m = call.key.shape[1], torch.randn
    wrong = {
        "rows of .* 20 query rows": KeyBias(bias=torch.rand(12), rows=longer),
        "rows of .* 7 batch rows": KeyBias(bias=torch.rand(12), rows=many),
        "bias of .* 7 batch rows": KeyBias(bias=torch.rand(7, 12)),
        "factor of .* 20 query rows": dataclasses.replace(examples(call)["gain"](), factor=torch.rand(3, 4, 20)),
        "share of .* 20 query rows": dataclasses.replace(examples(call)["lift"](), share=torch.rand(3, 4, 20) * 0.5),
        "strength of .* 20 query rows": dataclasses.replace(examples(call)["mix value"](), strength=torch.rand(3, 4, 20)),
        "key of .* 5 key heads": AppendKV(key=m(3, 5, 1, 8), value=m(3, 5, 1, 8)),
        "value of .* 5 key heads": ReplaceKV(columns=torch.tensor([0]), value=m(1, 5, 1, 8)),
        "order of .* 7 batch rows": Reorder(order=torch.arange(12).expand(7, -1)),
    }
    assert kv == 2
    for message, edit in wrong.items():
        with pytest.raises(ReattendError, match=message):
            run(call, [edit])


def test_head_mix_for_other_heads():
    with pytest.raises(ReattendError, match="target has values for 3 heads, but the edit names 2"):
        HeadMix(target=torch.randn(3, 8), strength=0.5, heads=[0, 1])
    with pytest.raises(ReattendError, match="strength has values for 3 heads, but the edit names 2"):
        HeadMix(target=torch.randn(2, 8), strength=torch.rand(3), heads=[0, 1])


def test_replaced_columns_need_as_many_keys():
    with pytest.raises(ReattendError, match=r"value must be \[batch, key heads, 2, dim\] for 2 columns"):
        ReplaceKV(columns=torch.tensor([0, 1]), value=torch.randn(1, 2, 3, 8))


def test_projections_fit_the_key_heads():
    key = torch.randn(2, 4, 5, 8)
    with pytest.raises(ReattendError, match="projection has 3 key heads, this key projection 4"):
        ProjectKey(projection=torch.randn(3, 8, 8)).on_key(key)
    with pytest.raises(ReattendError, match="projection has 3 batch rows, this key projection 2"):
        ProjectKey(projection=torch.randn(3, 4, 8, 8)).on_key(key)
    with pytest.raises(ReattendError, match="head 4 does not exist"):
        ProjectKey(projection=torch.randn(8, 8), heads=[4]).on_key(key)
