"""The values of rows that edits name, on the CPU: an accelerator is asked for them once at most, and never for those that came from here."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Known:
    version: int
    values: Tensor
    found: dict[Hashable, Any] = field(default_factory=dict)


# by the tensor on the accelerator, for as long as it lives
_known = WeakTensorKeyDictionary()


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device, for `values_of` to look up."""
    there = values.to(device)
    tell(there, lambda: values)
    return there


def tell(there: Tensor, values: Callable[[], Tensor]) -> None:
    """What a tensor on an accelerator holds, from values that are known here."""
    if there.device.type != "cpu" and not there.is_inference():
        _known[there] = _Known(there._version, values())


def values_of(rows: Tensor) -> Tensor:
    """The values of a tensor, on the CPU."""
    return rows if rows.device.type == "cpu" else _of(rows).values


def found_in(rows: Tensor, key: Hashable, find: Callable[[Tensor], Any]) -> Any:
    """find(the values of the rows), made once for a tensor on an accelerator: layers share their rows."""
    if rows.device.type == "cpu":
        return find(rows)
    known = _of(rows)
    if key not in known.found:
        with torch.inference_mode(False):  # kept longer than the pass that makes it
            known.found[key] = find(known.values)
    return known.found[key]


def _of(rows: Tensor) -> _Known:
    version = -1 if rows.is_inference() else rows._version
    known = _known.get(rows)
    if known is None or known.version != version or version < 0:
        known = _Known(version, rows.cpu())
        if version >= 0:
            _known[rows] = known
    return known
