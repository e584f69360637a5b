"""What edits refuse, when they are made and when they meet a call that they do not fit; and what makes them do nothing."""

from __future__ import annotations

import pytest
import torch
from reattend.interventions import (
    AppendKV,
    Blocks,
    Call,
    Chosen,
    Extrapolate,
    Gain,
    Keep,
    KeyBias,
    LowRankBias,
    PoolKV,
    ReattendError,
    Reorder,
    ReplaceKV,
    Second,
    SetScores,
    TakeOutput,
    fused,
    reference,
)

B, H, KV, T, D = 2, 4, 2, 20, 8


def call(queries: int = T, causal: bool = True, dtype: torch.dtype = torch.float32, **options) -> Call:
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, h, n, D, dtype=dtype) for h, n in ((H, queries), (KV, T), (KV, T)))
    return Call(query, key, value, is_causal=causal, **options)


LONG = torch.long
MADE = {
    "keep of Blocks must be a bool tensor": lambda: Blocks(torch.ones(2, 2), 4),
    "size of Blocks must be 1 or more": lambda: Blocks(torch.ones(2, 2).bool(), 0),
    "start of Blocks must be 0 or more": lambda: Blocks(torch.ones(2, 2).bool(), 4, start=-1),
    "dense_rows must be a bool tensor": lambda: Blocks(torch.ones(2, 2).bool(), 4, dense_rows=torch.ones(3)),
    "dense_columns must be": lambda: Blocks(torch.ones(2, 2).bool(), 4, dense_columns=torch.ones(3)),
    "index of Chosen must be a long tensor": lambda: Chosen(torch.ones(2)),
    "valid of Chosen must be bool": lambda: Chosen(torch.zeros(2, dtype=LONG), torch.ones(3).bool()),
    "pattern has lists for 3 heads, but the edit names 2": lambda: Keep(
        pattern=Blocks(torch.ones(1, 3, 5, 5).bool(), 4), heads=[0, 1]
    ),
    "U and V must have the same rank, got 2 and 3": lambda: LowRankBias(U=torch.ones(4, 2), V=torch.ones(4, 3)),
    "scores must be finite": lambda: SetScores(scores=float("nan")),
    "key and value must be .* with the same m": lambda: Second(key=torch.ones(1, 1, 3, 8), value=torch.ones(1, 1, 4, 8)),
    "mask is for 3 keys, the second attention has 4": lambda: Second(
        key=torch.ones(1, 1, 4, 8), value=torch.ones(1, 1, 4, 8), mask=torch.ones(5, 3).bool()
    ),
    "heads must be None": lambda: Extrapolate(other=torch.zeros(1, dtype=LONG), factor=2.0, heads=[0]),
    "factor must be finite and in": lambda: Extrapolate(other=torch.zeros(1, dtype=LONG), factor=0.5),
    'norm must be "l1" or "l2"': lambda: Extrapolate(other=torch.zeros(1, dtype=LONG), factor=2.0, norm="l3"),
    "TakeOutput needs either source": lambda: TakeOutput(),
    "batch must be long": lambda: TakeOutput(batch=torch.ones(2)),
    "visible must be bool": lambda: AppendKV(
        key=torch.ones(1, 1, 2, 8), value=torch.ones(1, 1, 2, 8), visible=torch.ones(5, 3).bool()
    ),
    "groups are numbered from 0": lambda: PoolKV(groups=torch.tensor([0, -1])),
}

CALLED = {
    "blocks of 5 from 0 on cover 20 query rows with 4 blocks, but keep has 3": lambda: Keep(
        pattern=Blocks(torch.ones(3, 4).bool(), 5)
    ),
    "blocks of 5 from 0 on cover 20 keys with 4 blocks, but keep has 5": lambda: Keep(
        pattern=Blocks(torch.ones(4, 5).bool(), 5)
    ),
    "lists for 3 heads, this call has 4 heads on 2 key heads": lambda: Keep(pattern=Blocks(torch.ones(1, 3, 4, 4).bool(), 5)),
    "keep has values for 3 batch rows, this call has 2": lambda: Keep(pattern=Blocks(torch.ones(3, 1, 4, 4).bool(), 5)),
    "dense_rows has 9 query rows, this call has 20": lambda: Keep(
        pattern=Blocks(torch.ones(4, 4).bool(), 5, dense_rows=torch.ones(9).bool())
    ),
    "a column set has 9 columns, the call has 20 keys": lambda: Keep(
        pattern=Blocks(torch.ones(4, 4).bool(), 5, dense_columns=torch.ones(9).bool())
    ),
    "column 20 is outside the 20 keys": lambda: Keep(pattern=Chosen(torch.tensor([0, 20]))),
    "index of Chosen is for 3 batch rows": lambda: Keep(pattern=Chosen(torch.zeros(3, 1, 1, dtype=LONG))),
    "pattern of Keep has values for 9 keys": lambda: Keep(pattern=torch.ones(T, 9).bool()),
    "U of LowRankBias has values for 9 query rows": lambda: LowRankBias(U=torch.ones(9, 2), V=torch.ones(T, 2)),
    "V of LowRankBias has values for 9 keys": lambda: LowRankBias(U=torch.ones(T, 2), V=torch.ones(9, 2)),
    "U of LowRankBias has values for 3 heads": lambda: LowRankBias(U=torch.ones(1, 3, T, 2), V=torch.ones(T, 2)),
    "scores of SetScores has values for 9 keys": lambda: SetScores(scores=torch.ones(T, 9)),
    "bias of KeyBias has values for 9 keys": lambda: KeyBias(bias=torch.ones(9)),
    "key of Second has values for 3 heads": lambda: Second(key=torch.ones(1, 3, 4, D), value=torch.ones(1, 3, 4, D)),
    "key and value must be .* with the same m, got": lambda: Second(key=torch.ones(1, H, 4, D), value=torch.ones(1, 1, 4, D)),
    "mask of Second has values for 9 query rows": lambda: Second(
        key=torch.ones(1, 1, 4, D), value=torch.ones(1, 1, 4, D), mask=torch.ones(9, 4).bool()
    ),
    "other of Extrapolate has values for 9 query rows": lambda: Extrapolate(other=torch.ones(1, H, 9, D), factor=2.0),
    "other names row 2, this call has batch rows 0 to 1": lambda: Extrapolate(other=torch.tensor([0, 2]), factor=2.0),
    "batch names 3 batch rows, this call has 2": lambda: TakeOutput(batch=torch.tensor([0, 1, 0])),
    "batch names row -1, this call has batch rows 0 to 1": lambda: TakeOutput(batch=torch.tensor([0, -1])),
    "source names row 20, this call has query rows 0 to 19": lambda: TakeOutput(source=torch.arange(1, T + 1)),
    "source names 9 query rows, this call has 20": lambda: TakeOutput(source=torch.arange(9)),
    "columns names column 20, outside the 20 keys": lambda: ReplaceKV(columns=torch.tensor([20]), value=torch.ones(1, 1, 1, D)),
    "columns of ReplaceKV has values for 3 heads": lambda: ReplaceKV(
        columns=torch.zeros(1, 3, 1, dtype=LONG), value=torch.ones(1, 1, 1, D)
    ),
    "order of Reorder has values for 9 keys": lambda: Reorder(order=torch.arange(9)),
    "order of Reorder has values for 3 heads": lambda: Reorder(order=torch.arange(T).expand(1, 3, -1)),
    "visible of AppendKV has values for 9 query rows": lambda: AppendKV(
        key=torch.ones(1, 1, 2, D), value=torch.ones(1, 1, 2, D), visible=torch.ones(9, 2).bool()
    ),
    "groups of PoolKV has values for 3 batch rows": lambda: PoolKV(groups=torch.arange(T).expand(3, -1)),
}


@pytest.mark.parametrize("message", MADE)
def test_what_cannot_be_made(message):
    with pytest.raises(ReattendError, match=message):
        MADE[message]()


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("message", CALLED)
def test_what_does_not_fit_the_call(message, run):
    with pytest.raises(ReattendError, match=message):
        run(call(), [CALLED[message]()])


IDENTITIES = [
    Gain(columns=[0], factor=1.0, renormalise=None),
    LowRankBias(U=torch.ones(T, 0), V=torch.ones(T, 0)),
    Second(key=torch.ones(1, 1, 3, D), value=torch.ones(1, 1, 3, D), combine=0.0),
    AppendKV(key=torch.ones(1, 1, 0, D), value=torch.ones(1, 1, 0, D), rows=torch.ones(T).bool()),
    ReplaceKV(columns=torch.zeros(B, 0, dtype=LONG), value=torch.ones(1, 1, 0, D), heads=[1]),
    PoolKV(groups=torch.arange(T), heads=[1], rows=torch.ones(T).bool()),
    Keep(pattern=Blocks(torch.ones(4, 4).bool(), 5), heads=[]),
]


@pytest.mark.parametrize("number", range(len(IDENTITIES)))
def test_nothing_to_do_is_bit_identical(number):
    for queries in (1, T):
        here = call(queries)
        edit = IDENTITIES[number]
        if queries == 1 and (edit.rows is not None or isinstance(edit, (LowRankBias, Keep))):
            continue
        assert torch.equal(fused(here, [edit]), fused(here, []))
