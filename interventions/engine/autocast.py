"""Calls under autocast: their operands are cast as torch's SDPA casts them, and everything else is computed outside of it.

Autocast casts operation by operation, so that statistics would be in half precision, and tensors of several dtypes meet where it knows
no operation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..call import Call
from .of_masks import of_mask

T = TypeVar("T")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


@functools.cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else contextlib.nullcontext()


def cast(call: Call, dtype: torch.dtype) -> Call:
    """The call with its operands as SDPA would compute with them; the model's own function runs under autocast all the same."""

    def under(function: Callable[[], T]) -> Callable[[], T]:
        device = call.query.device.type

        def run() -> T:
            with torch.autocast(device, dtype):
                return function()

        return run

    query, key, value = (_cast(x, dtype) for x in (call.query, call.key, call.value))
    mask = call.mask
    if mask is not None and mask.is_floating_point() and _cast_to(mask, dtype) != mask.dtype:
        mask = of_mask(mask, dtype, functools.partial(_cast, mask, dtype))
    original, with_lse = call.original, call.original_with_lse
    return dataclasses.replace(
        call,
        query=query,
        key=key,
        value=value,
        mask=mask,
        original=None if original is None else under(original),
        original_with_lse=None if with_lse is None else under(with_lse),
    )


def _cast_to(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    # double precision is left alone
    return x.dtype if x.dtype == torch.float64 else dtype


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(_cast_to(x, dtype))
