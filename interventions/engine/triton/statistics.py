"""One launch that sums the weights of every column over chosen rows: a program per block of keys and head goes through the rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, block_scores, keys_at, padded, readable, strides

# see `correction.CHANGING`
CHANGING = (
    "num_queries", "num_keys", "offset", "lse_stride_b", "lse_stride_h", "lse_stride_q", "rows_stride_b", "rows_stride_q",
    "mask_stride_b", "mask_stride_h", "mask_stride_q", "counted",
)  # fmt: skip


# fmt: off
@triton.jit(do_not_specialize=CHANGING)
def _sum_columns(
    query, key, lse, rows, mask, sums, counts, num_queries, num_keys, offset, counted, scale, softcap, lowest, query_stride_b,
    query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d, lse_stride_b,
    lse_stride_h, lse_stride_q, rows_stride_b, rows_stride_q, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    HEADS: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    blocks = tl.cdiv(num_keys, COLUMNS)
    pair = tl.program_id(0) // blocks
    batch = (pair // HEADS).to(tl.int64)
    head = (pair % HEADS).to(tl.int64)
    first = tl.program_id(0) % blocks * COLUMNS
    columns = (first + tl.arange(0, COLUMNS)).to(tl.int64)
    there = columns < num_keys
    key += batch * key_stride_b + head // SHARED * key_stride_h
    keys = keys_at(key, columns, there, key_stride_k, key_stride_d, DIM, WIDTH)
    query += batch * query_stride_b + head * query_stride_h
    lse += batch * lse_stride_b + head * lse_stride_h
    width = tl.arange(0, WIDTH)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    seen = tl.zeros([COLUMNS], dtype=tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(first - offset, 0) // ROWS * ROWS  # rows before see none of these keys
    for start in range(begin, num_queries, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        real = row < num_queries
        if rows is not None:
            real = real & (tl.load(rows + batch * rows_stride_b + row * rows_stride_q, mask=real, other=0) != 0)
        mine = tl.load(
            query + row[:, None] * query_stride_q + width[None, :] * query_stride_d,
            mask=real[:, None] & (width[None, :] < DIM),
            other=0.0,
        )
        level = tl.load(lse + row * lse_stride_q, mask=real, other=0.0).to(tl.float32)
        level = tl.where(tl.abs(level) == float("inf"), 0.0, level)  # a row that sees nothing
        mask_base = row[:, None]  # only to have a name without a mask
        if MASK != "none":
            mask_base = mask + batch * mask_stride_b + head * mask_stride_h + row[:, None] * mask_stride_q
        scores, visible = block_scores(
            mine,
            keys,
            columns,
            there,
            row,
            real,
            mask_base,
            mask_stride_k,
            offset,
            scale,
            softcap,
            lowest,
            MASK,
            CAUSAL,
            SOFTCAP,
            WIDE,
        )
        total += tl.sum(tl.where(visible, tl.exp(scores - level[:, None]), 0.0), axis=0)
        seen += tl.sum(visible.to(tl.float32), axis=0)
    tl.store(sums + (batch * HEADS + head) * num_keys + columns, total, mask=there)
    if head < counted:
        tl.store(counts + (batch * counted + head) * num_keys + columns, seen, mask=there)


def sum_columns(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    rows: Tensor | None,
    sums: Tensor,
    counts: Tensor,
) -> None:
    """Fills sums [B, H, Tk] and counts [B, 1 or H, Tk], both float32 and contiguous: see `statistics.column_statistics`."""
    batch, heads, queries, dim = query.shape
    keys, width = key.shape[2], padded(dim)
    exact = query.dtype == torch.float32
    block = 32 if exact or width > 128 else 64
    mask, masked, lowest = readable(mask)
    launch: Any = _sum_columns[(triton.cdiv(keys, block) * batch * heads,)]
    launch(
        query, key, lse, None if rows is None else rows.view(torch.uint8), mask, sums, counts, queries, keys, keys - queries,
        counts.shape[1], scale, softcap or 0.0, lowest, *query.stride(), *key.stride(), *lse.stride(),
        *((0, 0) if rows is None else strides(rows, (batch, queries))),
        *((0, 0, 0, 0) if mask is None else strides(mask, (batch, heads, queries, keys))),
        HEADS=heads, SHARED=heads // key.shape[1], CAUSAL=is_causal, MASK=masked, SOFTCAP=softcap is not None, DIM=dim, WIDTH=width,
        ROWS=block, COLUMNS=block, WIDE=INTERPRETED and query.dtype == torch.bfloat16, num_warps=4, num_stages=1 if exact else 2,
    )  # fmt: skip
