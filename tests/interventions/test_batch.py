"""Edits that name some rows of the batch: the others keep their bits, and the named ones follow the reference."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reattend.interventions import Call, Gain, HeadGain, Keep, KeyBias, Mix, MixValue, ScaleQuery, Transfer, fused, reference
from reattend.interventions.engine.batch import acting_rows
from reattend.interventions.families.guidance import MixOwnAnd, Soften

B, H, T, D = 4, 4, 9, 8


def a_call(kv: int, masked: bool) -> Call:
    torch.manual_seed(0)
    mask = torch.rand(B, 1, 1, T) > 0.2 if masked else None
    if mask is not None:
        mask[..., 0] = True
    return Call(torch.randn(B, H, T, D), torch.randn(B, kv, T, D), torch.randn(B, kv, T, D), mask)


def edits(rows: torch.Tensor) -> dict[str, list]:
    torch.manual_seed(1)
    per_row = torch.rand(B, 1, T)
    columns = torch.rand(B, T) > 0.5
    return {
        "value": [MixValue(strength=0.4, rows=rows)],
        "value of one head": [MixValue(strength=per_row, heads=[2], rows=rows)],
        "bias": [KeyBias(bias=torch.randn(B, T), rows=rows)],
        "gain": [Gain(columns=columns, factor=0.3, rows=rows)],
        "two levels": [Transfer(source=columns, strength=per_row, heads=[0, 3], rows=rows), HeadGain(factor=torch.rand(B, 1), rows=rows)],
        "argmax": [Mix(target="argmax", strength=0.6, heads=[1], rows=rows)],
        "keep": [Keep(pattern=torch.rand(B, 1, T, T) > 0.3, rows=rows)],
        "query": [ScaleQuery(factor=0.5, rows=rows, heads=[1, 2])],
        "own": [MixOwnAnd(columns=columns, strength=0.7, rows=rows)],
        "soften": [Soften(temperature=3.0, strength=0.5, heads=[0], rows=rows)],
    }  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("case", list(edits(torch.ones(B, T, dtype=torch.bool))))
def test_other_rows_keep_their_bits(case: str, kv: int, masked: bool) -> None:
    call = a_call(kv, masked)
    torch.manual_seed(2)
    rows = torch.rand(B, T) > 0.4
    rows[[0, 2]] = False
    chosen = edits(rows)[case]
    assert acting_rows(call, chosen).tolist() == [1, 3]  # type: ignore[union-attr]
    output = fused(call, chosen)
    plain = fused(call, [])
    assert torch.equal(output[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(output, reference(call, chosen), atol=1e-5, rtol=1e-5)
    assert not torch.equal(output, plain)


def test_no_row_at_all_is_the_plain_call() -> None:
    call = a_call(4, False)
    for chosen in edits(torch.zeros(B, T, dtype=torch.bool)).values():
        assert torch.equal(fused(call, chosen), fused(call, []))


def test_the_models_own_function_runs_once() -> None:
    calls = []
    call = a_call(4, False)
    call.original = lambda: calls.append(1) or torch.zeros(B, H, T, D)
    output = fused(call, [MixValue(strength=1.0, rows=torch.tensor([[True], [False], [False], [False]]))])
    assert calls == [1] and torch.equal(output[1:], torch.zeros(3, H, T, D)) and torch.equal(output[0], call.value[0])


def test_edits_that_name_all_rows_of_some_pictures_take_the_ways_of_those_that_name_none() -> None:
    """What is added to columns of some batch rows is added by the kernel."""
    call, rows = a_call(2, False), torch.tensor([[False], [True], [True], [False]])
    call.ways = Counter()
    edit = KeyBias(bias=torch.linspace(-3, 0, call.num_keys), rows=rows)
    torch.testing.assert_close(fused(call, [edit]), reference(call, [edit]), atol=2e-6, rtol=1e-5)
    assert set(call.ways) == {"key biases"}
