"""Requests that were rewritten, and with which of them a pass begins: told by tokens, and by images as far as the pass is given these."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...interventions import Memory, ReattendError

# so many numbers of a tensor say which one it is
SAMPLE = 4096


@dataclass(eq=False)
class Rewritten:
    """A request after all changes, and what was learned on the way. prompt: its ids [B, T], or of its embeddings [B, T, n] some numbers.

    seen: {name: numbers of it}, of its images (or sounds), and of their features once a pass has begun with them.
    """

    prompt: Tensor
    seen: dict[str, Tensor]
    memory: Memory
    begun: bool = False
    # the thread that rewrote it, which is the one to generate from it where others have the same tokens
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def of(cls, arguments: Mapping[str, Any], memory: Memory) -> Rewritten | None:
        prompt = _prompt(arguments)
        return None if prompt is None else cls(prompt.detach().to("cpu", copy=True), _seen(arguments), memory)

    def times(self, prompt: Tensor, planned: int) -> int:
        """How often each of its rows stands in a pass over `prompt` (beams, several answers); 0 where that begins with something else.

        planned: how long the prompt is going to be, where it comes in chunks.
        """
        mine, (batch, length) = self.prompt, self.prompt.shape[:2]
        long_enough = prompt.shape[1] >= length or planned == length
        if len(prompt) % batch or prompt.shape[2:] != mine.shape[2:] or not long_enough:
            return 0
        width = min(length, prompt.shape[1])
        mine = mine[:, :width].to(prompt).repeat_interleave(len(prompt) // batch, dim=0)
        return len(prompt) // batch if bool((prompt[:, :width] == mine).all()) else 0

    def told(self, seen: Mapping[str, Tensor]) -> bool | None:
        """Whether these images are its own; None where that cannot be told."""
        both = [(self.seen[name], seen[name]) for name in self.seen.keys() & seen.keys()]
        same = [torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in both if a.shape == b.shape]
        return all(same) if same else None

    def learned(self, times: int) -> Memory:
        """What was learned, for a sequence of so many rows for each of its own."""
        memory, batch = self.memory.fork({}), len(self.prompt)
        if times > 1:
            memory.move(torch.arange(batch).repeat_interleave(times), batch, True, self.prompt.shape[1])
        return memory


def begun_with(known: Sequence[Rewritten], given: Mapping[str, Any], planned: int) -> Memory | None:
    """What was learned of the request that a pass with these arguments begins with; None for one that nobody has rewritten.

    known: the newest last. Raises ReattendError where it cannot be told which of several it is.
    """
    prompt, seen = _prompt(given), _seen(given)
    if prompt is None:
        return None
    found = [(one, times, one.told(seen)) for one in reversed(known) if (times := one.times(prompt, planned))]
    found = [each for each in found if each[2]] or [each for each in found if each[2] is None]
    # those that have been generated from already are not meant, unless their images say so
    waiting = [each for each in found if not each[0].begun] or found
    waiting = [each for each in waiting if each[0].thread == threading.get_ident()] or waiting
    if not found:
        return None
    one, times, told = waiting[0]
    if told is None and any(one.told(other.seen) is False for other, *_ in waiting):
        raise ReattendError(
            "several requests with the same tokens and other images were rewritten, and this pass does not show which one it is: rewrite "
            "each just before it is generated from"
        )
    one.begun = True
    one.seen = {**seen, **one.seen}
    return one.learned(times)


def _prompt(arguments: Mapping[str, Any]) -> Tensor | None:
    ids, embeds = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
    if isinstance(ids, Tensor):
        return ids
    return embeds[..., :: max(1, embeds.shape[-1] // 8)] if isinstance(embeds, Tensor) else None


def _seen(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {name: list(_floats(value)) for name, value in arguments.items() if name not in ("inputs_embeds", "attention_mask")}
    return {name: torch.cat([_sample(one) for one in values]) for name, values in found.items() if values}


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(part)


def _sample(value: Tensor) -> Tensor:
    flat = value.detach().flatten()
    # an odd step, so that the numbers do not all stand in a few columns
    return flat[:: max(1, len(flat) // SAMPLE) | 1].to("cpu", torch.float32)
