"""What an edit does not name - heads, and batch rows at prefill and at decode - keeps its bits, for every edit and every pair of them."""

from __future__ import annotations

import pytest
import torch
from every_edit import WHOLE, a_call, examples
from reattend.interventions import Call, KeyBias, fused, reference

NAMES = [name for name in examples(a_call(3)) if name not in WHOLE]
DTYPES = [torch.float32, torch.bfloat16]


def one_row(call: Call, queries: int) -> torch.Tensor:
    rows = torch.zeros(call.batch, queries, dtype=torch.bool)
    rows[1] = True
    return rows


def kept(call: Call, edits: list) -> None:
    """Every pair of batch row and head that no edit names holds the plain call's bits."""
    output, plain = fused(call, edits), fused(call, [])
    for row in range(call.batch):
        for head in range(call.num_heads):
            named = [
                e
                for e in edits
                if (e.heads is None or head in e.heads) and (e.rows is None or bool(e.rows[row % len(e.rows)].any()))
            ]
            if not named:
                assert torch.equal(output[row, head], plain[row, head]), (row, head)
    if call.query.dtype == torch.float32:
        torch.testing.assert_close(output, reference(call, edits), atol=1e-5, rtol=1e-5)
    assert not torch.equal(output, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "holes"])
@pytest.mark.parametrize("queries", [1, 2, 12])
@pytest.mark.parametrize("name", NAMES)
def test_other_batch_rows_and_heads_keep_their_bits(name, queries, mask, dtype):
    for kv in (4, 2):
        torch.manual_seed(0)
        call = a_call(queries, 40 if queries < 12 else 12, kv=kv, mask=mask, dtype=dtype)
        rows = one_row(call, queries)
        for heads, chosen in ((None, rows), (None, rows[:, :1]), ([2], None), ([1, 3], rows)):
            kept(call, [examples(call, heads, chosen)[name]()])


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("name", NAMES)
def test_beside_an_edit_of_other_heads_and_rows(name, queries):
    torch.manual_seed(0)
    call = a_call(queries)
    rows = one_row(call, queries)
    for other in ("key bias", "gain", "head gain", "mix value"):
        for heads, chosen in ((None, rows.roll(1, 0)), ([0, 3], None), ([0], rows.roll(1, 0))):
            kept(call, [examples(call, [1, 2], rows)[name](), examples(call, heads, chosen)[other]()])


@pytest.mark.parametrize("queries", [1, 12])
def test_where_no_row_is_named_the_models_own_function_answers(queries):
    call = a_call(queries)
    own = torch.randn(call.batch, call.num_heads, queries, 8)
    call.original, call.original_is_sdpa = lambda: own, False
    nobody = torch.zeros(call.batch, queries, dtype=torch.bool)
    for name in NAMES:
        assert torch.equal(fused(call, [examples(call, [0, 1], nobody)[name]()]), own)


def test_the_models_own_function_runs_once_for_the_rows_left_over():
    call, runs = a_call(1), []
    plain = fused(call, [])
    call.original = lambda: (runs.append(1), plain)[1]
    fused(call, [KeyBias(bias=torch.rand(12), heads=[1], rows=one_row(call, 1))])
    assert len(runs) == 1
