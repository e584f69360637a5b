"""`Grouped`: an attention for each kind of row, against a mask of pairs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from reattend.interventions import (
    Call,
    Gain,
    Grouped,
    HeadGain,
    KeyBias,
    ReattendError,
    fused,
    reference,
    reference_with_weights,
    row_weights,
)
from torch.nn.functional import one_hot, scaled_dot_product_attention


def call(batch: int = 2, queries: int = 20, keys: int = 24, kv_heads: int = 2, **more) -> Call:
    torch.manual_seed(0)
    query = torch.randn(batch, 4, queries, 12)
    return Call(query, torch.randn(batch, kv_heads, keys, 12), torch.randn(batch, kv_heads, keys, 8), **more)


def kinds(batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three kinds, other ones in each batch row, and what each kind sees."""
    numbers = torch.Generator().manual_seed(1)
    kind = torch.randint(0, 3, (batch, queries), generator=numbers)
    columns = torch.rand(batch, keys, 3, generator=numbers) > 0.4
    return one_hot(kind, 3).float()[:, None], columns[:, None]


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_it_is_the_mask_of_its_groups(run, padded, kv_heads):
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    mask[1, ..., :5] = not padded
    given = call(kv_heads=kv_heads, mask=mask if padded else None)
    shares, columns = kinds(2, 20, 24)
    allowed = torch.einsum("bhqg,bhkg->bhqk", shares, columns.float()) > 0
    wanted = scaled_dot_product_attention(
        given.query, given.key, given.value, attn_mask=allowed & mask, scale=given.scaling, enable_gqa=True
    )
    torch.testing.assert_close(run(given, [Grouped(shares=shares, columns=columns)]), wanted, atol=1e-6, rtol=1e-5)


def test_shares_mix_the_attentions_and_named_rows_alone_change():
    given = call()
    shares, columns = torch.rand(2, 1, 20, 3), kinds(2, 20, 24)[1]
    rows = torch.arange(20).expand(2, -1) % 3 > 0
    rows[1] = False
    alone = [fused(given, [Grouped(shares=torch.ones(1, 1, 20, 1), columns=columns[..., group, None])]) for group in range(3)]
    wanted = sum(shares[..., group, None] * one for group, one in enumerate(alone))
    found = fused(given, [Grouped(shares=shares, columns=columns, rows=rows)])
    torch.testing.assert_close(found[0][:, rows[0]], wanted[0][:, rows[0]], atol=1e-6, rtol=1e-5)
    assert torch.equal(found[1], fused(given, [])[1]) and torch.equal(found[0][:, ~rows[0]], fused(given, [])[0][:, ~rows[0]])


@pytest.mark.parametrize("named", [[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
def test_batch_rows_that_it_names_are_not_attended_to_twice(monkeypatch, named):
    """Of rows named whole nothing else is computed; the others are attended with the other edits alone."""
    given, (shares, columns), seen = call(batch=3), kinds(3, 20, 24), []
    rows = torch.tensor(named, dtype=torch.bool)[:, None]
    # of the others alone: an edit of the same rows would have to act on something
    less = KeyBias(bias=torch.where((torch.arange(24) < 20) | rows[:, :, None], 0.0, -9.0))
    edits = [less, Grouped(shares=shares, columns=columns, rows=rows)]

    def attended(query, *args, **more):
        seen.append(query.shape[0] * query.shape[2])
        return scaled_dot_product_attention(query, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attended)
        found = fused(given, edits)
    torch.testing.assert_close(found, reference(given, edits), atol=1e-6, rtol=1e-5)
    # each row has a share of one group
    assert sum(seen) == 3 * 20


def test_batch_rows_with_the_same_groups_go_together():
    shares, columns = kinds(1, 20, 24)
    assert len(Grouped(shares=shares, columns=columns).parts(5)) == 3
    assert all(len(part.batch) == 5 for part in Grouped(shares=shares, columns=columns).parts(5))


@pytest.mark.parametrize(
    ("shares", "columns", "said"),
    [
        (torch.ones(20, 2), torch.ones(24, 3, dtype=torch.bool), "shares are for 2 groups, columns for 3"),
        (torch.ones(20, 2), torch.ones(24, 2), "columns as bool"),
        (torch.ones(2, 4, 20, 2), torch.ones(24, 2, dtype=torch.bool), "no axis of heads"),
        (torch.ones(9, 2), torch.ones(24, 2, dtype=torch.bool), "9 query rows, this call has 20"),
        (torch.ones(20, 2), torch.ones(9, 2, dtype=torch.bool), "9 keys, this call has 24"),
        (torch.ones(20, 1), torch.zeros(24, 1, dtype=torch.bool), "group 0, which has no columns"),
    ],
)
def test_refusals(shares, columns, said):
    with pytest.raises(ReattendError, match=said):
        fused(call(), [Grouped(shares=shares, columns=columns)])


def written_out(
    given: Call, shares: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Each group's softmax over the biased scores of its columns alone, mixed by shares, times a factor per column; [B, H, Tq, Dv]."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (given.key, given.value))
    scores = given.query @ key.transpose(2, 3) * given.scaling + bias
    found = torch.zeros_like(scores)
    for group in range(shares.shape[3]):
        hidden = ~columns[..., group][:, :, None]
        found += shares[..., group, None] * scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (found * factor) @ value


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("last", [False, True])
def test_others_act_in_each_group_whichever_was_given_first(run, last):
    given = call()
    columns = kinds(2, 20, 24)[1]
    shares = torch.rand(2, 1, 20, 3)
    bias, factor = torch.randn(24), torch.ones(24)
    factor[3:6] = -2.0
    grouped = Grouped(shares=shares, columns=columns)
    others = [KeyBias(bias=bias), Gain(columns=[3, 4, 5], factor=-2.0, renormalise=None), HeadGain(factor=0.5)]
    found = run(given, [*others, grouped] if last else [grouped, *others])
    wanted = 0.5 * written_out(given, shares, columns, bias, factor)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_bias_of_other_batch_rows_leaves_it_an_attention_for_each_group():
    given = call(ways=Counter())
    shares, columns = kinds(2, 20, 24)
    rows = torch.tensor([[True], [False]])
    grouped = Grouped(shares=shares, columns=columns, rows=rows)
    found = fused(given, [KeyBias(bias=torch.randn(24) * ~rows), grouped])
    assert not grouped.meets(KeyBias(bias=torch.randn(24) * ~rows)) and grouped.meets(KeyBias(bias=torch.randn(24)))
    assert "materialised" not in given.ways
    torch.testing.assert_close(found[:1], fused(given, [grouped])[:1])


def test_weights_that_are_read_are_those_of_the_groups():
    given = call(kv_heads=4)
    shares, columns = torch.rand(2, 1, 20, 3), kinds(2, 20, 24)[1]
    edit = Grouped(shares=shares, columns=columns)
    index = torch.arange(5, 15)
    output = fused(given, [edit])[:, :, index]
    torch.testing.assert_close(row_weights(given, [edit], index) @ given.value, output, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        reference_with_weights(given, [edit])[1][:, :, index] @ given.value, output, atol=1e-6, rtol=1e-5
    )
