"""Patterns of blocks and columns, biases of low rank, set scores, gains below zero: what they mean, and which way computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from one_call import KV, B, D, H, T, both, call, way
from reattend.interventions import (
    Blocks,
    Call,
    Chosen,
    Gain,
    Keep,
    KeyBias,
    LowRankBias,
    Mix,
    PairBias,
    SetScores,
    fused,
    reference,
    reference_with_weights,
)


def test_blocks_are_the_tensor_of_their_pairs():
    here, keep = call(), torch.rand(B, H, 4, 3) > 0.5
    keep[..., 0] = True
    pairs = keep.repeat_interleave(5, 2).repeat_interleave(7, 3)[..., :T]
    wanted = reference(here, [Keep(pattern=pairs)])
    torch.testing.assert_close(both(here, [Keep(pattern=Blocks(keep, (5, 7)))]), wanted, atol=1e-5, rtol=1e-5)
    assert way(here, [Keep(pattern=Blocks(keep, (5, 7)))]) == ["gathered"]


def test_blocks_that_begin_after_a_text_which_everybody_sees():
    here, keep = call(causal=False), torch.eye(4).bool()
    weights = reference_with_weights(here, [Keep(pattern=Blocks(keep, 4, start=4))])[1]
    own = (torch.arange(T) - 4).clamp_min(-1) // 4
    seen = (own[:, None] == own) | (own[:, None] < 0) | (own < 0)
    assert torch.equal(weights[0, 0] > 0, seen)
    both(here, [Keep(pattern=Blocks(keep, 4, start=4))])
    dense = Blocks(torch.eye(5).bool(), 4, dense_columns=[0, 1, 2, 3], dense_rows=torch.arange(T) < 4)
    torch.testing.assert_close(both(here, [Keep(pattern=dense)]), reference(here, [Keep(pattern=Blocks(keep, 4, start=4))]))


def test_lists_per_key_head_serve_the_heads_that_share_it_wherever_they_are_cut():
    here = call()
    keep = torch.rand(B, KV, 4, 4) > 0.4
    shared, wide = Blocks(keep, 5), Blocks(keep.repeat_interleave(H // KV, 1), 5)
    others = [KeyBias(bias=torch.randn(T), heads=[1, 2])]
    torch.testing.assert_close(both(here, [Keep(pattern=shared), *others]), reference(here, [Keep(pattern=wide), *others]))
    last = call(1, False)
    index = torch.stack([torch.randperm(T)[:6] for _ in range(B * KV)]).view(B, KV, 6)
    wide_index = index.repeat_interleave(H // KV, 1)
    for more in ([], others):
        torch.testing.assert_close(
            both(last, [Keep(pattern=Chosen(index)), *more]), reference(last, [Keep(pattern=Chosen(wide_index)), *more])
        )
    assert way(last, [Keep(pattern=Chosen(index))]) == ["gathered"]


def test_rows_without_any_of_their_columns_keep_all_that_they_see():
    here = call()
    nothing = Keep(pattern=Blocks(torch.zeros(4, 4, dtype=torch.bool), 5))
    torch.testing.assert_close(both(here, [nothing]), fused(here, []), atol=1e-6, rtol=1e-5)
    # under causality rows 0..9 see none of the last block's columns
    late = torch.zeros(4, 4, dtype=torch.bool)
    late[:, 3] = True
    found = both(here, [Keep(pattern=Blocks(late, 5))])
    torch.testing.assert_close(found[:, :, :15], fused(here, [])[:, :, :15], atol=1e-6, rtol=1e-5)
    none = torch.zeros(1, 1, 0, dtype=torch.long)
    torch.testing.assert_close(
        both(call(1, False), [Keep(pattern=Chosen(none))]), fused(call(1, False), []), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("layout", ["heads outside", "heads inside", "part of a buffer"])
def test_columns_are_taken_from_any_layout_of_the_cache(layout):
    here = call(1, False)
    if layout == "heads inside":
        here.key, here.value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (here.key, here.value))
    if layout == "part of a buffer":
        here.key, here.value = (
            torch.cat([t, t.new_full((B, KV, 9, D), float("nan"))], 2)[:, :, :T] for t in (here.key, here.value)
        )
    index = torch.stack([torch.randperm(T)[:6] for _ in range(B * KV)]).view(B, KV, 6)
    assert both(here, [Keep(pattern=Chosen(index))]).isfinite().all()


# scores


def test_a_mask_of_regions_has_a_low_rank():
    """Text of a region is seen by its rows alone: 0 where it is forbidden, and no score changes where it is allowed."""
    here = call(causal=False)
    region = torch.arange(T) % 3
    one_hot = F.one_hot(region, 3).float()
    edit = LowRankBias(U=-1024 * one_hot, V=1 - one_hot)
    allowed = region[:, None] == region
    wanted = reference(here, [Keep(pattern=allowed)])
    torch.testing.assert_close(both(here, [edit]), wanted, atol=1e-6, rtol=1e-5)
    assert way(here, [edit]) == ["kernel"]
    assert (reference_with_weights(here, [edit])[1][..., ~allowed] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_rank_bias_keeps_its_size_in_half_precision(dtype):
    here = call(causal=False, dtype=dtype)
    exact = Call(here.query.double(), here.key.double(), here.value.double())
    edit = LowRankBias(U=torch.randn(T, 3) * 3, V=torch.randn(T, 3) * 3)
    error = (fused(here, [edit]).double() - reference(exact, [edit])).abs().max()
    assert error <= 6 * torch.finfo(dtype).eps * here.value.abs().max()


def test_low_rank_biases_add_up_beside_key_biases_and_gains():
    here = call()
    u, v = torch.randn(2, T, 2), torch.randn(2, T, 2)
    edits = [LowRankBias(U=u[i], V=v[i], heads=[None, [1, 2]][i]) for i in range(2)]
    pairs = [PairBias(bias=u[i] @ v[i].T, heads=[None, [1, 2]][i]) for i in range(2)]
    more = [KeyBias(bias=torch.randn(T)), Gain(columns=[3], factor=0.2), Mix(target="identity", strength=0.1)]
    torch.testing.assert_close(both(here, [*edits, *more]), reference(here, [*pairs, *more]), atol=1e-5, rtol=1e-5)
    assert "materialised" not in way(here, [*edits, *more[:2]])


def test_the_later_of_two_set_scores_wins():
    here = call()
    first, second = SetScores(scores=-3.0, columns=[0, 1]), SetScores(scores=torch.full((T, 1), 2.0), columns=[1])
    scores = here.query @ here.key.repeat_interleave(2, 1).transpose(2, 3) * here.scaling
    scores[..., 0], scores[..., 1] = -3.0, 2.0
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(both(here, [first, second]), scores.softmax(-1) @ here.value.repeat_interleave(2, 1))


# weights


def test_gains_below_zero():
    here = call(causal=False)
    weights = reference_with_weights(here, [])[1]
    for factor in (-0.5, -3.5, torch.full((B, H, T), -1.0)):
        edit = Gain(columns=[2, 5], factor=factor, renormalise=None)
        wanted = weights.clone()
        wanted[..., [2, 5]] *= factor if isinstance(factor, float) else factor[..., None]
        torch.testing.assert_close(both(here, [edit]), wanted @ here.value.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
        assert way(here, [edit]) == ["columns"]
    # rows keep their sum where it stays above 0, and their weights where it does not
    edit = Gain(columns=[2, 5], factor=-1.0)
    found = reference_with_weights(here, [edit])[1]
    torch.testing.assert_close(found.sum(-1), torch.ones(B, H, T))
    assert (found[..., 2] < 0).any()
    everything = reference_with_weights(here, [Gain(columns=list(range(T)), factor=-1.0)])[1]
    assert torch.equal(everything, weights)
    both(here, [Gain(columns=list(range(T)), factor=-1.0)])
    # without a sum there is nothing to keep: attention's values are taken away
    torch.testing.assert_close(both(here, [Gain(columns=list(range(T)), factor=-1.0, renormalise=None)]), -fused(here, []))
