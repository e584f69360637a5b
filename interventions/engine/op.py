"""Custom ops of the engine: what a compiler keeps in its graph as one node. On CUDA with Triton one kernel, elsewhere tensor code.

Tensors of fixed shape go in and out, nothing is written in place and nothing asked of the device, so that a CUDA graph can hold them.
They carry no gradient: who wants one takes another way.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from ..edits import Operands
from ..edits.base import repeat_heads
from ..edits.weights import TINY
from ..errors import ReattendWarning
from .biases import attend_biased
from .kernels import attend, grouped_values, rows_per_chunk, score_rows, softmax_rows, statistics_dtype, visible_rows
from .restated import BIASES

# Products of Triton kernels take these, and heads up to this size.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


@functools.lru_cache(maxsize=64)
def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: tried out once, because Triton also needs a C compiler."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from .triton.blocks import try_out

        with torch.cuda.device(device):
            try_out(device)
    except Exception as error:
        warnings.warn(
            f"Triton is installed but runs no kernel here, so edits of known columns take a slower way: {error}",
            ReattendWarning,
            stacklevel=2,
        )
        return False
    return True


@torch.library.custom_op("reattend::columns", mutates_args=())
def columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor | None,
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
) -> Tensor:
    """Attention [B, H, Tq, Dv] under one edit of weights on known columns, or under key biases.

    query [B, H, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv], mask and is_causal, softcap, sinks [H] as in `Call`; added [B or 1,
    H or 1, Tk]: key biases that the edit comes after. output, lse [B, H, Tq]: of the same call without the edit, None: computed here.
    kind and marks [B or 1, H or 1, n]: what the edit does, by the columns' classes 0 to 3 (int8), or its key biases (float32); later
    columns have class `rest` or bias 0. index [B or 1, Hkv or 1, n] long, count [B or 1, Hkv or 1]: the columns of other classes than
    `rest` in any head of a key head, and how many these are. amounts [B or 1, H or 1, Tq or 1], or `number`: its factor, strength, share
    or limit; second, third: further numbers of a kind (see `Restated`). rows: bool [B or 1, Tq or 1], None = all; others stay as they are.
    offset: the column of query row 0's own token.
    """
    if output is None:
        result = query.new_empty(*query.shape[:3], value.shape[3])
        output, lse = _attended(query, key, value, mask, is_causal, scale, softcap, sinks, added)
    else:
        result = torch.empty_like(output)
    if query.dtype in DTYPES and max(query.shape[3], value.shape[3]) <= LARGEST_HEAD and has_triton(query.device):
        from .triton.correction import correct

        with torch.cuda.device_of(query):
            correct(
                result, query, key, value, output, lse, mask, is_causal, scale, softcap, sinks, added, marks, index, count, amounts, rows,
                kind, rest, number, second, third, offset,
            )  # fmt: skip
        return result
    dtype, device = statistics_dtype(query), query.device
    if marks is not None:
        marks = torch.nn.functional.pad(marks, (0, key.shape[2] - marks.shape[2]), value=rest)
        marks = marks[:, :, None]
    amounts = None if amounts is None else amounts.to(dtype)[..., None]
    for part in torch.arange(query.shape[2], device=device).split(
        rows_per_chunk(query.shape[0], query.shape[1], key.shape[2], device)
    ):
        old = output[:, :, part]
        amount = number if amounts is None else amounts if amounts.shape[2] == 1 else amounts[:, :, part]
        if kind == "identity":
            own = part + offset
            mixed = repeat_heads(value[:, :, own.clamp(0, key.shape[2] - 1)], query.shape[1]).to(dtype)
            new, changes = (1 - amount) * old.to(dtype) + amount * mixed, ((own >= 0) & (own < key.shape[2]))[:, None]
        else:
            visible = visible_rows(mask, is_causal, part, query.shape[2], key.shape[2])
            scores, _ = score_rows(query, key, mask, is_causal, scale, softcap, part)
            scores = scores if added is None else scores + added[:, :, None].to(dtype)
            assert marks is not None
            if kind in BIASES:
                size = scores.abs().clamp_max(torch.finfo(dtype).max / 1e3) if kind == "score gain" else torch.ones_like(scores)
                new = softmax_rows(torch.addcmul(scores, marks.to(dtype), size), sinks)
                changes = torch.ones_like(new[..., :1], dtype=torch.bool)
            else:
                weights = softmax_rows(scores, sinks)
                factor, changes = _factors(weights, marks, amount, kind, number, second, third)
                new = weights * factor
            if visible is not None:
                changes = changes & visible.any(dim=3, keepdim=True)
            new = grouped_values(new, value.to(dtype))
        if rows is not None:
            changes = changes & (rows if rows.shape[1] == 1 else rows[:, part])[:, None, :, None]
        result[:, :, part] = torch.where(changes, new.to(output.dtype), old)
    return result


@columns.register_fake
def _(query, key, value, output, *rest, **named):
    return query.new_empty(*query.shape[:3], value.shape[3]) if output is None else torch.empty_like(output)


def _attended(query, key, value, mask, is_causal, scale, softcap, sinks, added) -> tuple[Tensor, Tensor]:
    if added is None:
        output, lse = attend(query, key, value, mask, is_causal, scale, softcap, sinks, need_lse=True)
    else:
        x = Operands(query, key, value, mask, is_causal, offset=None)
        output, lse = attend_biased(x, added, True, scale, softcap, sinks, True)
    assert lse is not None
    return output, lse


def _factors(
    weights: Tensor, marks: Tensor, amount: float | Tensor, kind: str, number: float, second: float, third: float
) -> tuple[Tensor, Tensor]:
    """(what each weight is multiplied by, which rows change [B, H, R, 1]) as the edits' own formulas have it."""
    zero, one, two, three = ((weights * (marks == name)).sum(dim=-1, keepdim=True) for name in range(4))
    whole = zero + one + two + three
    others = whole - one
    unchanged = torch.ones_like(whole)
    if kind == "transfer":
        room = two
        first, changes = unchanged * (1 - amount), room > TINY
        factors = [unchanged, first, 1 + amount * one / room.clamp_min(TINY), first]
    elif kind == "gain alone":
        factors, changes = [unchanged, unchanged * amount, unchanged, unchanged], zero + two + three + abs(amount) * one > TINY
    elif kind == "gain over a set":
        inside = two + amount * three
        target = inside + (1 - amount) * (one + three)
        spread = target / inside.clamp_min(TINY)
        factors, changes = [unchanged, unchanged * amount, spread, amount * spread], (inside > TINY) & (target >= 0)
    elif kind == "give back":
        image = two + three
        changes = (three - second * image <= amount) & (image >= third) & (two > 0)
        first = unchanged * (1 - number)
        factors = [unchanged, first, 1 + number * (one + three) / two.clamp_min(TINY), first]
    else:
        gain = amount
        if kind != "gain":
            held = one.clamp_min(TINY)
            gain = others * (amount / (1 - amount)) / held if kind == "exact lift" else amount * whole / held
            gain = torch.where((one >= third * whole) & (one > 0), gain.clamp(1, second), 1)
        total = zero + two + three + gain * one
        scale = whole / total.clamp_min(TINY)
        factors, changes = [scale, gain * scale, scale, scale], (total > TINY) & (gain != 1)
    values = torch.stack([factor.expand_as(whole) for factor in factors]).flatten(1)
    place = marks.long() * values.shape[1] + torch.arange(values.shape[1], device=values.device).view(whole.shape)
    return values.flatten()[place], changes
