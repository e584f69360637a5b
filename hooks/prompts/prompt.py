"""A prompt as doors and recipes see it before it is read: the arguments of a pass, which they may change."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...interventions import TokenMap


@dataclass
class Prompt:
    """What a probe or a branch may change: the arguments of the pass that is about to run, all of them by name.

    There is no cache among them, and the attention mask is 2-d or absent. tokens: the map of the prompt. config: the model's.
    memory: the recipe's store for this sequence, the one that its interventions read as `call.memory`. past: how many tokens of the
    prompt an earlier pass has read.
    """

    arguments: dict[str, Any]
    tokens: TokenMap
    config: Any
    memory: dict[Any, Any]
    past: int = 0


def without_inference(value: Any) -> Any:
    """The same with clones of tensors from inference mode, which could not be kept for a gradient."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, MutableMapping):
        # of its own kind: features of images that were computed beforehand are read by attribute
        same = copy.copy(value)
        for key, item in value.items():
            same[key] = without_inference(item)
        return same
    if isinstance(value, (list, tuple)):
        parts = [without_inference(item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
