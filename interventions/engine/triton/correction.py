"""One launch that corrects an attention output for one edit of known columns: `interventions.engine.correction` as a kernel.

Each column has a class, and an edit gives a class a factor that follows from the weight that the classes hold in the row. What the
kernel before it computed gets the factor of the class that all columns have which are not listed; the listed ones are put right one by
one. Rows where that would amplify the rounding of what is corrected are computed anew from all keys, by the program that finds them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...edits.weights import TINY
from ..correction import LARGEST_FACTOR, SMALLEST_DENOMINATOR
from ..restated import BIASES, SEVERAL
from .blocks import INTERPRETED, block_of_keys, padded, product, readable, strides
from .factors import set_factors, two_factors

# Sizes, and strides that follow from them, which change at every step of decoding: nothing is compiled for one value of them.
CHANGING = (
    "num_queries", "num_keys", "known", "offset", "causal_offset", "marks_stride_b", "marks_stride_h", "index_stride_b", "index_stride_h",
    "count_stride_b", "count_stride_h", "amount_stride_b", "amount_stride_h", "amount_stride_q", "rows_stride_b", "rows_stride_q",
    "added_stride_b", "added_stride_h", "mask_stride_b", "mask_stride_h", "mask_stride_q", "lse_stride_b", "lse_stride_h",
    "lse_stride_q",
)  # fmt: skip
# Rows in which a bias makes columns outweigh all others by more are computed anew: half precision holds no such weights.
MOST = 1e4
# Up to this many query rows the heads that share a key head are rows of one program.
FEW_ROWS = 16


# fmt: off
@triton.jit(do_not_specialize=CHANGING)
def _correct(
    query, key, value, output, lse, result, marks, index, count, amounts, rows, added, mask, sinks, num_queries, num_keys,
    known, offset, causal_offset, scale, softcap, lowest, number, second, third, largest, query_stride_b, query_stride_h,
    query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d, value_stride_b, value_stride_h,
    value_stride_k, value_stride_d, output_stride_b, output_stride_h, output_stride_q, output_stride_d, result_stride_b,
    result_stride_h, result_stride_q, result_stride_d, lse_stride_b, lse_stride_h, lse_stride_q, marks_stride_b, marks_stride_h,
    marks_stride_k, index_stride_b, index_stride_h, count_stride_b, count_stride_h, amount_stride_b, amount_stride_h,
    amount_stride_q, rows_stride_b, rows_stride_q, added_stride_b, added_stride_h, added_stride_k, mask_stride_b, mask_stride_h,
    mask_stride_q, mask_stride_k,
    KIND: tl.constexpr, BIAS: tl.constexpr, REST: tl.constexpr, ADDED: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, ONE_SET: tl.constexpr, SMALLEST: tl.constexpr, MOST: tl.constexpr, TINY: tl.constexpr,
):
    # fmt: on
    # -- which rows: of one head, or (PACKED) of all heads that share a key head -------------------------------------------
    if PACKED:
        blocks = tl.cdiv(num_queries * SHARED, ROWS)
        pair = tl.program_id(0) // blocks
        places = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
        batch = (pair // (HEADS // SHARED)).to(tl.int64)
        key_head = (pair % (HEADS // SHARED)).to(tl.int64)
        real = places < SHARED * num_queries
        head = key_head * SHARED + tl.where(real, places // num_queries, 0)
        row = (places % num_queries).to(tl.int64)
        per_head = head[:, None]
    else:
        blocks = tl.cdiv(num_queries, ROWS)
        pair = tl.program_id(0) // blocks
        places = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
        batch = (pair // HEADS).to(tl.int64)
        per_head = (pair % HEADS).to(tl.int64)
        key_head = per_head // SHARED
        real = places < num_queries
        head = per_head + tl.zeros([ROWS], dtype=tl.int64)
        row = places.to(tl.int64)
    dims = tl.arange(0, VALUE_WIDTH)
    output += batch * output_stride_b + head[:, None] * output_stride_h + row[:, None] * output_stride_q
    shown = real[:, None] & (dims[None, :] < VALUE_DIM)
    old = tl.load(output + dims[None, :] * output_stride_d, mask=shown, other=0.0)
    was = old.to(tl.float32)
    named = real
    if rows is not None:
        named = named & (tl.load(rows + batch * rows_stride_b + row * rows_stride_q, mask=real, other=0) != 0)
    amount = tl.zeros([ROWS], dtype=tl.float32) + number
    if amounts is not None:
        amounts += batch * amount_stride_b + head * amount_stride_h + row * amount_stride_q
        amount = tl.load(amounts, mask=real, other=0.0).to(tl.float32)
    value += batch * value_stride_b + key_head * value_stride_h + dims[None, :] * value_stride_d
    has = dims[None, :] < VALUE_DIM
    mask_base = row[:, None]  # read as numbers nowhere: only to have a name without a mask
    if MASK != "none":
        mask_base = mask + batch * mask_stride_b + head[:, None] * mask_stride_h + row[:, None] * mask_stride_q

    if KIND == "identity":
        own = (row + offset)[:, None]
        # a row whose own column a mask hides is mixed with it all the same
        there = (named & (row + offset >= 0) & (row + offset < num_keys))[:, None]
        theirs = tl.load(value + own * value_stride_k, mask=there & has, other=0.0).to(tl.float32)
        new = (1.0 - amount)[:, None] * was + amount[:, None] * theirs
        new = tl.where(there & (amount != 0.0)[:, None], new, was)
    else:
        # -- what the listed columns hold of each row -----------------------------------------------------------------------
        width = tl.arange(0, WIDTH)
        query += batch * query_stride_b + head[:, None] * query_stride_h + row[:, None] * query_stride_q
        mine = tl.load(query + width[None, :] * query_stride_d, mask=real[:, None] & (width[None, :] < DIM), other=0.0)
        level = tl.load(lse + batch * lse_stride_b + head * lse_stride_h + row * lse_stride_q, mask=real, other=0.0).to(
            tl.float32
        )
        level = tl.where(tl.abs(level) == float("inf"), 0.0, level)  # a row that sees nothing
        beyond = tl.zeros([ROWS], dtype=tl.float32)
        if sinks is not None:
            beyond = tl.exp(tl.load(sinks + head, mask=real, other=float("-inf")).to(tl.float32) - level)
        whole = 1.0 - beyond
        key += batch * key_stride_b + key_head * key_stride_h
        marks += batch * marks_stride_b + per_head * marks_stride_h
        added_base = marks  # only to have a name without biases
        if ADDED:
            added_base = added + batch * added_stride_b + per_head * added_stride_h
        index += batch * index_stride_b + key_head * index_stride_h
        listed = tl.load(count + batch * count_stride_b + key_head * count_stride_h).to(tl.int32)
        held1 = tl.zeros([ROWS], dtype=tl.float32)
        held2 = tl.zeros([ROWS], dtype=tl.float32)
        held3 = tl.zeros([ROWS], dtype=tl.float32)
        change = tl.zeros([ROWS, VALUE_WIDTH], dtype=tl.float32)
        for start in range(0, listed, COLUMNS):
            place = start + tl.arange(0, COLUMNS)
            there = place < listed
            columns = tl.load(index + place, mask=there, other=0).to(tl.int64)
            scores, visible, marked = block_of_keys(
                mine, columns, there, row, real, level, key, mask_base, added_base, marks, key_stride_k, key_stride_d, mask_stride_k,
                added_stride_k, marks_stride_k, known, causal_offset, scale, softcap, lowest, DIM, WIDTH, MASK, CAUSAL, SOFTCAP,
                ADDED, KIND == "score gain", REST, WIDE,
            )  # fmt: skip
            weights = tl.where(visible, tl.exp(scores), 0.0)
            if BIAS:
                grown = tl.where(visible, tl.exp(scores + marked), 0.0)
                held1 += tl.sum(grown, axis=1)
                held3 += tl.sum(weights, axis=1)
                part = grown - weights
            else:
                part = tl.where(marked == 1, weights, 0.0)
                held1 += tl.sum(part, axis=1)
                if not ONE_SET:
                    held2 += tl.sum(tl.where(marked == 2, weights, 0.0), axis=1)
                    held3 += tl.sum(tl.where(marked == 3, weights, 0.0), axis=1)
            if ONE_SET:
                theirs = tl.load(value + columns[:, None] * value_stride_k, mask=there[:, None] & has, other=0.0)
                change += product(part.to(theirs.dtype), theirs, WIDE)

        if not ONE_SET:
            # -- more sets: what each class gets can be said now, and is added in a second pass -------------------------------
            factor1, factor2, factor3, changes = set_factors(held1, held2, held3, amount, second, third, number, KIND, TINY)
            for start in range(0, listed, COLUMNS):
                place = start + tl.arange(0, COLUMNS)
                there = place < listed
                columns = tl.load(index + place, mask=there, other=0).to(tl.int64)
                scores, visible, marked = block_of_keys(
                    mine, columns, there, row, real, level, key, mask_base, added_base, marks, key_stride_k, key_stride_d, mask_stride_k,
                    added_stride_k, marks_stride_k, known, causal_offset, scale, softcap, lowest, DIM, WIDTH, MASK, CAUSAL, SOFTCAP,
                    ADDED, KIND == "score gain", REST, WIDE,
                )  # fmt: skip
                weights = tl.where(visible, tl.exp(scores), 0.0)
                part = tl.where(marked == 1, (factor1 - 1.0)[:, None], 0.0)
                part = tl.where(marked == 2, (factor2 - 1.0)[:, None], part)
                part = weights * tl.where(marked == 3, (factor3 - 1.0)[:, None], part)
                theirs = tl.load(value + columns[:, None] * value_stride_k, mask=there[:, None] & has, other=0.0)
                change += product(part.to(theirs.dtype), theirs, WIDE)
            new = tl.where((named & changes)[:, None], was + change, was)
        else:
            # -- one set: two factors, and rows whose factors are not accurate are computed from all keys ---------------------
            if BIAS:
                # learned sinks are part of what a bias is weighed against
                least = (1.0 - held3) + held1
                changes = held1 + held3 > 0.0
                outside = 1.0 / tl.maximum(least, TINY)
                unsafe = (least < SMALLEST) | (least > MOST) | (least != least)
                new = (was + change) * outside[:, None]
            else:
                inside, outside, changes, least = two_factors(held1, whole - held1, whole, amount, second, third, KIND, TINY)
                unsafe = least < SMALLEST
                new = was * outside[:, None] + change * (inside - outside)[:, None]
            unsafe = named & (held1 + held3 > 0.0) & (unsafe | (outside > largest))
            new = tl.where((named & changes)[:, None], new, was)
            if tl.max(unsafe.to(tl.int32), axis=0) > 0:
                stop = num_keys
                if CAUSAL:
                    stop = tl.minimum(stop, (tl.max(row, axis=0) + causal_offset + 1).to(tl.int32))
                high = tl.zeros([ROWS], dtype=tl.float32) + float("-inf")
                held = tl.zeros([ROWS], dtype=tl.float32)
                others = tl.zeros([ROWS], dtype=tl.float32)
                if BIAS:  # noqa: SIM102
                    if sinks is not None:
                        high = tl.log(beyond)
                        others += tl.where(beyond > 0.0, 1.0, 0.0)
                for start in range(0, stop, COLUMNS):
                    columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
                    there = columns < stop
                    scores, visible, marked = block_of_keys(
                        mine, columns, there, row, real, level, key, mask_base, added_base, marks, key_stride_k, key_stride_d, mask_stride_k,
                        added_stride_k, marks_stride_k, known, causal_offset, scale, softcap, lowest, DIM, WIDTH, MASK, CAUSAL, SOFTCAP,
                        ADDED, KIND == "score gain", REST, WIDE,
                    )  # fmt: skip
                    if BIAS:
                        scores = tl.where(visible, scores + marked, float("-inf"))
                        top = tl.maximum(high, tl.max(scores, axis=1))
                        base = tl.where(top == float("-inf"), 0.0, top)
                        others = others * tl.exp(high - base) + tl.sum(tl.exp(scores - base[:, None]), axis=1)
                        high = top
                    else:
                        weights = tl.where(visible, tl.exp(scores), 0.0)
                        part = tl.where(marked == 1, weights, 0.0)
                        held += tl.sum(part, axis=1)
                        others += tl.sum(weights - part, axis=1)
                base = tl.where(high == float("-inf"), 0.0, high)
                inside = 1.0 / tl.maximum(others, TINY)
                outside = inside
                changes = others > 0.0
                if not BIAS:
                    total = held + others
                    inside, outside, changes, least = two_factors(held, others, total, amount, second, third, KIND, TINY)
                    if sinks is None:
                        inside = inside / tl.maximum(total, TINY)
                        outside = outside / tl.maximum(total, TINY)
                change = tl.zeros([ROWS, VALUE_WIDTH], dtype=tl.float32)
                for start in range(0, stop, COLUMNS):
                    columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
                    there = columns < stop
                    scores, visible, marked = block_of_keys(
                        mine, columns, there, row, real, level, key, mask_base, added_base, marks, key_stride_k, key_stride_d, mask_stride_k,
                        added_stride_k, marks_stride_k, known, causal_offset, scale, softcap, lowest, DIM, WIDTH, MASK, CAUSAL, SOFTCAP,
                        ADDED, KIND == "score gain", REST, WIDE,
                    )  # fmt: skip
                    if BIAS:
                        part = tl.where(visible, tl.exp(scores + marked - base[:, None]), 0.0) * inside[:, None]
                    else:
                        part = tl.where(visible, tl.exp(scores), 0.0) * tl.where(marked == 1, inside[:, None], outside[:, None])
                    theirs = tl.load(value + columns[:, None] * value_stride_k, mask=there[:, None] & has, other=0.0)
                    change += product(part.to(theirs.dtype), theirs, WIDE)
                new = tl.where(unsafe[:, None], tl.where(changes[:, None], change, was), new)
    result += batch * result_stride_b + head[:, None] * result_stride_h + row[:, None] * result_stride_q
    tl.store(result + dims[None, :] * result_stride_d, new.to(old.dtype), mask=shown)


def correct(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    added: Tensor | None,
    marks: Tensor | None,
    index: Tensor | None,
    count: Tensor | None,
    amounts: Tensor | None,
    rows: Tensor | None,
    kind: str,
    rest: int,
    number: float,
    second: float,
    third: float,
    offset: int,
) -> None:
    """Fills `result` with the edited output, from the output and log-sum-exp of the same call without the edit: see `op.columns`."""
    batch, heads, queries, dim = query.shape
    shared, keys, value_dim = heads // key.shape[1], key.shape[2], value.shape[3]
    if not result.numel():
        return
    packed = shared > 1 and queries <= FEW_ROWS
    count_of_rows = queries * shared if packed else queries
    width, value_width = padded(dim), padded(value_dim)
    wide = max(width, value_width) > 128 or query.dtype == torch.float32
    block = 16 if count_of_rows <= 16 or (wide and query.dtype == torch.float32 and width > 128) else 32 if wide else 64
    columns = 32 if wide or block > 16 else 64
    mask, masked, lowest = readable(mask)
    nothing = (0, 0, 0)
    lists = (batch, key.shape[1])
    launch: Any = _correct[(triton.cdiv(count_of_rows, block) * batch * (key.shape[1] if packed else heads),)]
    launch(
        query, key, value, output, lse, result, marks, index, count, amounts, None if rows is None else rows.view(torch.uint8), added, mask,
        sinks, queries, keys, 0 if marks is None else marks.shape[2], offset, keys - queries, scale, softcap or 0.0, lowest, number, second,
        third, LARGEST_FACTOR[query.dtype], *query.stride(), *key.stride(), *value.stride(), *output.stride(), *result.stride(),
        *(nothing if lse is None else lse.stride()),
        *(nothing if marks is None else strides(marks, (batch, heads, keys))),
        *(nothing[:2] if index is None else strides(index, (*lists, index.shape[2]))[:2]),
        *(nothing[:2] if count is None else strides(count, lists)),
        *(nothing if amounts is None else strides(amounts, (batch, heads, queries))),
        *(nothing[:2] if rows is None else strides(rows, (batch, queries))),
        *(nothing if added is None else strides(added, (batch, heads, keys))),
        *((0, 0, 0, 0) if mask is None else strides(mask, (batch, heads, queries, keys))),
        KIND=kind, BIAS=kind in BIASES, REST=rest, ADDED=added is not None, HEADS=heads, SHARED=shared, PACKED=packed, CAUSAL=is_causal,
        MASK=masked, SOFTCAP=softcap is not None, DIM=dim, VALUE_DIM=value_dim, WIDTH=width, VALUE_WIDTH=value_width, ROWS=block,
        COLUMNS=columns, WIDE=INTERPRETED and query.dtype == torch.bfloat16,
        ONE_SET=kind not in SEVERAL and (kind != "transfer" or rest == 2), SMALLEST=SMALLEST_DENOMINATOR, MOST=MOST, TINY=TINY, num_warps=4,
        num_stages=1 if wide else 2,
    )  # fmt: skip
