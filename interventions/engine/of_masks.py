"""What is made of a mask once for all layers of a pass, which are given the same one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
# mask -> (its version, {what is made of it: that}), for as long as the mask lives
_known = WeakTensorKeyDictionary()


def of_mask(mask: Tensor, name: Hashable, make: Callable[[], T]) -> T:
    """make(), which has a memory of its own, not the mask's; made anew where a change of the mask could not be seen, or has a gradient."""
    if mask.is_inference() or mask.requires_grad:
        return make()
    known = _known.get(mask)
    if known is None or known[0] != mask._version:
        known = _known[mask] = mask._version, {}
    if name not in known[1]:
        with torch.inference_mode(False):
            known[1][name] = make()
    return known[1][name]
