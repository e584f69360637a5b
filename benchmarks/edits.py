"""What edits of attention cost against dense attention in the same run, and against the way to the same numbers that materialises.

    python benchmarks/edits.py            # 2048, 8192 and, for what is sparse, 32768 keys
    python benchmarks/edits.py --quick    # 2048 and 8192

Ratios to the kernel without edits, thread CPU time on one thread: below 1 is faster than dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from reattend.interventions import (
    AppendKV,
    Blocks,
    Call,
    Chosen,
    Extrapolate,
    Gain,
    Grouped,
    Instead,
    Keep,
    LowRankBias,
    PairBias,
    PoolKV,
    Reorder,
    ReplaceKV,
    Second,
    SetScores,
    TakeOutput,
    fused,
)
from timing import ratios, table

HEADS, DIM, BLOCK = 8, 64, 128
PAIRS = 4096  # up to this many rows and columns, edits with a tensor of all pairs are measured too


def call(queries: int, keys: int, causal: bool) -> Call:
    query, key, value = (torch.randn(1, HEADS, n, DIM) for n in (queries, keys, keys))
    return Call(query, key, value, is_causal=causal)


def blocks(n: int, share: float, causal: bool, heads: int = HEADS) -> torch.Tensor:
    """Bool [1, heads, nq, nk]: the first block, the block of the rows, and random ones up to this share of what the rows can see."""
    count = n // BLOCK
    score = torch.rand(1, heads, count, count)
    score[..., 0] = 2
    score.diagonal(dim1=2, dim2=3).fill_(3)
    score = score.tril() if causal else score
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for i in range(count):
        seen = i + 1 if causal else count
        keep[:, :, i].scatter_(2, score[:, :, i].topk(min(seen, max(2, round(share * seen))), dim=-1).indices, True)
    return keep


def patterns(n: int, causal: bool) -> dict[str, list]:
    found = {}
    for share in (0.1, 0.2):
        keep = blocks(n, share, causal)
        found[f"{share:.0%} of the blocks, per head"] = [Keep(pattern=Blocks(keep, BLOCK))]
        found[f"{share:.0%}, the same for all heads"] = [Keep(pattern=Blocks(keep[:, :1], BLOCK))]
    ragged = blocks(n, 0.2, causal) & ((torch.rand(1, HEADS, n // BLOCK, n // BLOCK) > 0.4) | torch.eye(n // BLOCK).bool())
    found["12%, lists of other lengths"] = [Keep(pattern=Blocks(ragged, BLOCK))]
    found["20% and 256 columns always"] = [Keep(pattern=Blocks(keep, BLOCK, dense_columns=list(range(256))))]
    if n <= PAIRS:
        every = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        found["20%, as a tensor of all pairs"] = [Keep(pattern=every)]
    return found


def chosen(n: int) -> dict[str, list]:
    found = {}
    for count in (256, 768, 3072):
        if count <= n // 4:
            start = torch.stack([torch.randperm(n // 16)[: count // 16].sort().values for _ in range(HEADS)])
            index = (start[..., None] * 16 + torch.arange(16)).flatten(1)
            found[f"{count} columns per head"] = [Keep(pattern=Chosen(index[None]))]
    return found


def others(n: int) -> dict[str, list]:
    regions = torch.arange(n) * 4 // n
    one_hot = torch.nn.functional.one_hot(regions, 4).float()
    text = torch.randn(1, HEADS, 77, DIM)
    half = torch.arange(n) < n // 2
    found = {
        "LowRankBias of rank 4": [LowRankBias(U=-1024 * one_hot, V=1 - one_hot)],
        "Grouped, the same four regions": [Grouped(shares=one_hot, columns=one_hot > 0)],
        "Grouped, with a share of 0.3 of all": [
            Grouped(
                shares=torch.cat([0.7 * one_hot, torch.full((n, 1), 0.3)], dim=1),
                columns=torch.cat([one_hot > 0, torch.ones(n, 1, dtype=torch.bool)], dim=1),
            )
        ],
        "LowRankBias and Gain below 0": [
            LowRankBias(U=-1024 * one_hot, V=1 - one_hot),
            Gain(columns=list(range(16)), factor=-2.0, renormalise=None),
        ],
        "Gain below 0 of 16 columns": [Gain(columns=list(range(16)), factor=-2.0, renormalise=None)],
        "Second, 77 keys": [Second(key=text, value=text, combine=0.5)],
        "Extrapolate from a given output": [Extrapolate(other=torch.randn(1, HEADS, n, DIM), factor=3.0)],
        "TakeOutput": [TakeOutput(source=torch.arange(n).flip(0))],
        "AppendKV, 77 keys": [AppendKV(key=text, value=text)],
        "AppendKV, 77 keys for half of the rows": [AppendKV(key=text, value=text, rows=half)],
        "ReplaceKV, 77 columns": [ReplaceKV(columns=torch.arange(77), value=text)],
        "Reorder per head": [Reorder(order=torch.rand(1, HEADS, n).argsort(dim=-1))],
        "PoolKV, pairs of columns": [PoolKV(groups=torch.arange(n) // 2)],
        "Instead, a mean of values": [Instead(compute=lambda x, scale: x.value.mean(2, keepdim=True).expand_as(x.query))],
    }
    if n <= PAIRS:
        bias = -1024.0 * (regions[:, None] != regions)
        found["PairBias, the same as the rank 4"] = [PairBias(bias=bias)]
        found["SetScores of 16 columns"] = [SetScores(columns=list(range(16)), scores=0.5)]
    return found


def measured(here: Call, edits: dict[str, list], rounds: int) -> dict[str, float]:
    variants: dict[str, Callable[[], object]] = {"dense": lambda: fused(here, [])}
    variants.update({name: (lambda given=given: fused(here, given)) for name, given in edits.items()})
    return ratios(variants, rounds=rounds, repeat=max(1, 50 // here.num_queries))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sizes = (2048, 8192) if parser.parse_args().quick else (2048, 8192, 32768)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for title, causal in (("Blocks of 128, all keys visible", False), ("Blocks of 128, causal", True)):
        rows = {}
        for n in sizes:
            found = measured(call(n, n, causal), patterns(n, causal), 2 if n < 32768 else 1)
            rows.update({f"{name}, {n} keys": {"ratio": value} for name, value in found.items()})
            print(f"{title}: {n}", {name: round(value, 2) for name, value in found.items()}, flush=True)
    for n in sizes:
        found = measured(call(1, n, False), chosen(n), 10)
        print(
            table(f"Chosen columns at decode, {n} keys", {name: {"ratio": value} for name, value in found.items()}), flush=True
        )
    found = measured(call(2048, 2048, False), others(2048), 3)
    print(table("Other edits, 2048 keys", {name: {"ratio": value} for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
