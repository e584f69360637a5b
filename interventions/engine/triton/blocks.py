"""What the kernels share: weights of a block of keys, products with the right operands, and what a launch has to know of tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# float32 on tensor cores in three parts: as exact as float32 products are, and compiled in seconds where "ieee" takes a minute
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b in float32. WIDE: operands become float32 first; what they hold stays (triton's interpreter multiplies no bfloat16)."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def keys_at(key, columns, there, key_stride, key_dim_stride, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH, columns]: the keys `columns` (long) of a key head, of which those `there` exist; key points to its first row."""
    dims = tl.arange(0, WIDTH)
    return tl.load(
        key + columns[None, :] * key_stride + dims[:, None] * key_dim_stride,
        mask=there[None, :] & (dims[:, None] < DIM),
        other=0.0,
    )


# fmt: off
@triton.jit
def block_scores(
    query, keys, columns, there, row, real, mask_base, mask_stride, offset, scale, softcap, lowest,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    """(scores float32, visible) [rows, columns] of the query rows `row`, of which those `real` exist, on the keys of `keys_at`.

    query [rows, WIDTH]; mask_base [rows, 1] points to each row's first mask value. offset: the column of query row 0's own token, as
    causality counts it. lowest: additive masks hide what is not above it.
    """
    scores = product(query, keys, WIDE) * scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    visible = there[None, :] & real[:, None]
    if MASK == "bool":
        visible = visible & (tl.load(mask_base + columns[None, :] * mask_stride, mask=visible, other=0) != 0)
    if MASK == "additive":
        added = tl.load(mask_base + columns[None, :] * mask_stride, mask=visible, other=0.0).to(tl.float32)
        visible = visible & (added > lowest)
        scores = scores + added
    if CAUSAL:
        visible = visible & (columns[None, :] <= (row + offset)[:, None])
    return scores, visible


# fmt: off
@triton.jit
def block_of_keys(
    mine, columns, there, row, real, level, key, mask_base, added_base, marks, key_stride_k, key_stride_d, mask_stride_k,
    added_stride_k, marks_stride_k, known, causal_offset, scale, softcap, lowest,
    DIM: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    ADDED: tl.constexpr, SCORE_GAIN: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    """(scores minus the row's log-sum-exp, visible, what the edit says of the columns), each [rows, columns]."""
    keys = keys_at(key, columns, there, key_stride_k, key_stride_d, DIM, WIDTH)
    scores, visible = block_scores(
        mine, keys, columns, there, row, real, mask_base, mask_stride_k, causal_offset, scale, softcap, lowest, MASK, CAUSAL, SOFTCAP, WIDE
    )  # fmt: skip
    if ADDED:
        scores += tl.load(added_base + columns[None, :] * added_stride_k, mask=there[None, :], other=0.0).to(tl.float32)
    marked = tl.load(marks + columns[None, :] * marks_stride_k, mask=(there & (columns < known))[None, :], other=REST)
    if SCORE_GAIN:
        marked = marked * tl.abs(scores)
    return scores - level[:, None], visible, marked


INTERPRETED = not isinstance(product, triton.JITFunction)


def strides(x: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Strides of a tensor that is read as if expanded to these sizes: 0 where it has one value for all."""
    return [0 if own == 1 and size != 1 else stride for own, size, stride in zip(x.shape, sizes, x.stride(), strict=True)]


def readable(mask: Tensor | None) -> tuple[Tensor | None, str, float]:
    """(mask as kernels read it, its kind for `block_scores`, what counts as hidden in it)."""
    if mask is None:
        return None, "none", 0.0
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), "bool", 0.0
    return mask, "additive", torch.finfo(mask.dtype).min / 2


def padded(size: int) -> int:
    """Width of a block that holds a head: a power of two that products take."""
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def _write_one(place):
    tl.store(place, 1.0)


def try_out(device: torch.device) -> None:
    """Runs a kernel on the device. Raises whatever Triton raises where it cannot: without a C compiler, for instance."""
    _write_one[(1,)](torch.empty(1, device=device))
