"""A prompt as doors and recipes see it before it is read: the arguments of a pass, which they may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
