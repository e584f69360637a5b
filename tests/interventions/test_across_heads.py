"""Edits that look across heads or batch rows (`reads`): fused, reference and the edit alone agree, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from every_edit import WHOLE, a_call, examples, loudest, shared_by_batch
from reattend.interventions import (
    AppendKV,
    Edit,
    HeadGain,
    Mix,
    ReattendError,
    ReplaceKV,
    WeightMap,
    fused,
    reference,
    reference_with_weights,
    row_outputs,
    row_weights,
)
from reattend.interventions.families.gaze import Focus, refocus_columns
from reattend.interventions.families.sinks import SoundMap

NAMES = list(examples(a_call(3)))
PARTIAL = [name for name in NAMES if name not in WHOLE]


def crossing(kind: str, call, **who) -> Edit:
    if kind == "refocus":  # what gift asks for: the heads with the most weight on some columns
        # not the first column, which every row sees: where all of a row were image, rounding would choose between the heads
        places = torch.arange(call.num_keys)
        image = ((places > 1) & (places < 6)).expand(call.batch, -1)
        focus = Focus.of(torch.rand(call.batch, call.num_keys) * image, image, ~image, 3.0)
        return SoundMap(function=lambda w, r: refocus_columns(focus, 0, 0.5, 1.0, w, r), reads="heads", **who)
    return WeightMap(function={"heads": loudest, "batch": shared_by_batch}[kind], reads=kind, **who)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "holes"])
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("kind", ["heads", "batch", "refocus"])
def test_beside_an_edit_that_names_heads_or_batch_rows(kind, name, queries, mask):
    torch.manual_seed(0)
    call = a_call(queries, mask=mask)
    some = torch.rand(call.batch, queries) > 0.4
    some[1] = False
    first, second, third = (
        examples(call, [3, 0])[name](),
        examples(call, None, some)[name](),
        examples(call, [1, 2], some)[name](),
    )
    for edits in (
        [first, crossing(kind, call)],
        [crossing(kind, call, rows=some), second],
        [crossing(kind, call, heads=[0, 2, 1]), third],
    ):
        wanted, weights = reference_with_weights(call, edits)
        close(fused(call, edits), wanted)
        index = torch.tensor([0, queries - 1]).unique()
        close(row_outputs(call, edits, index), wanted[:, :, index])
        close(row_weights(call, edits, index), weights[:, :, index])


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("name", ["append", "replace", "reorder", "pool"])
@pytest.mark.parametrize("kind", ["heads", "batch"])
def test_beside_an_edit_of_operands(kind, name, queries):
    torch.manual_seed(0)
    call = a_call(queries, mask="none" if name == "pool" else "causal")  # a row has to see whole groups
    edits = [examples(call)[name](), crossing(kind, call), examples(call, [1])["scale query"]()]
    close(fused(call, edits), reference(call, edits))


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("kind", ["heads", "batch", "refocus"])
def test_beside_an_edit_of_strength_nearly_zero_it_is_what_it_is_alone(kind, queries):
    torch.manual_seed(0)
    call = a_call(queries)
    edit = crossing(kind, call)
    alone = fused(call, [edit])
    assert (alone - fused(call, [])).abs().max() > 1e-2
    near_zero = HeadGain(factor=1 + 1e-7, heads=[1, 2])
    for edits in ([near_zero, edit], [edit, near_zero]):
        close(fused(call, edits), alone)
        close(reference(call, edits), alone)


def test_it_is_given_the_heads_that_it_names_in_their_order_and_no_others():
    call, seen = a_call(1), []

    def look(weights, rows):
        seen.append((weights.shape[1], rows.query.shape[1]))
        return weights * torch.tensor([1.0, 0.5, 0.25])[:, None, None]

    edits = [WeightMap(function=look, heads=[3, 0, 2], reads="heads"), examples(call, [0, 1])["key bias"]()]
    plain = fused(call, edits[1:])
    for run in (fused, reference):
        changed = run(call, edits)
        close(changed, plain * torch.tensor([0.5, 1.0, 0.25, 1.0])[:, None, None])
    assert seen == [(3, 3), (3, 3)]


@pytest.mark.parametrize("queries", [1, 12])
def test_heads_and_batch_rows_that_it_does_not_name_keep_their_bits(queries):
    torch.manual_seed(0)
    call = a_call(queries)
    rows = torch.zeros(call.batch, queries, dtype=torch.bool)
    rows[1, -1] = True
    plain = fused(call, [])
    for reads in ("heads", "batch"):
        output = fused(call, [crossing(reads, call, heads=[0, 3], rows=rows)])
        assert torch.equal(output[:, [1, 2]], plain[:, [1, 2]]) and torch.equal(output[[0, 2]], plain[[0, 2]])
        assert not torch.equal(output[1, 0], plain[1, 0])


def test_what_it_reads_has_a_name():
    with pytest.raises(ReattendError, match="reads must be one of"):
        WeightMap(function=loudest, reads="everything")


def test_heads_of_other_widths_are_refused_by_both():
    call = a_call(12)
    edits = [examples(call, [1])["rearrange"](), crossing("heads", call)]
    for run in (fused, reference):
        with pytest.raises(ReattendError, match="rearrange all of them or none"):
            run(call, edits)


@pytest.mark.parametrize("queries", [1, 7])
def test_heads_keep_their_own_columns_beside_an_edit_across_heads(queries):
    """What is appended for some heads is not there for the others, also after an edit that looks across those heads."""
    call = a_call(queries)
    more = torch.randn(3, 2, 2, 8)
    edits = [
        WeightMap(function=loudest, reads="heads", heads=[1, 3]),
        Mix(target="uniform", strength=0.5, heads=[0, 1]),
        AppendKV(key=more, value=more, heads=[1, 2, 3]),
    ]
    torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 7])
def test_heads_without_other_keys_look_at_heads_as_these_are_without_them(queries):
    """Whether all rows are named or all but one."""
    call = a_call(queries)
    for rows in (torch.ones(3, 1, dtype=torch.bool), torch.tensor([[True], [True], [False]])):
        edits = [
            ReplaceKV(
                columns=torch.tensor([0, 1]), key=torch.randn(1, 2, 2, 8), value=torch.randn(1, 2, 2, 8), heads=[0], rows=rows
            ),
            WeightMap(function=loudest, reads="heads", heads=[0, 1]),
        ]
        torch.testing.assert_close(fused(call, edits), reference(call, edits), atol=2e-6, rtol=1e-5)
