"""What a recipe remembers of a sequence from one pass to the next: `call.memory`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .errors import ReattendError


class Memory(dict):
    """What one recipe remembers of one sequence, and what happens to it when rows change places or tokens are taken back.

    A tensor kept under a key has the batch axis first: it goes where the cache's rows go (beams, selected or repeated rows). So do values
    with a method `move(index)`. Other values are taken to hold for the prompt: they stay as long as every row keeps its prompt; where rows
    come to stand under other prompts, a store that holds such values is lost as a whole. Where generated tokens are taken back, a value
    that was set while they were read is cut: by its own `crop(length)`, or as a tensor [B, n, ...] that was as long as the sequence; any
    other tensor is lost. So set anew (memory[key] = ...) what has changed, and ask `require_whole` where a key is missing.

    since: the first position that it saw pass by, above 0 where it began in the middle of the sequence. lost: up to where it has forgotten
    what it learned. at: how long the sequence is in the decode step under way; 0 while a prompt is read.
    """

    def __init__(self, since: int = 0, lost: int = 0) -> None:
        super().__init__()
        self.since, self.lost, self.at = since, lost, 0
        # key -> how long the sequence was when it was set, for what was set while tokens were generated
        self.set_at: dict[Any, int] = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.at:
            self.set_at[key] = self.at
        else:
            self.set_at.pop(key, None)

    def update(self, *given: Any, **named: Any) -> None:
        for key, value in dict(*given, **named).items():
            self[key] = value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def move(self, index: Tensor, batch: int, alike: bool, length: int) -> None:
        """The rows of its sequence, `batch` before, come from these rows now. alike: every row has the prompt that it had."""
        if not alike and not all(_follows(value, batch) for value in self.values()):
            self.clear()
            self.set_at, self.lost = {}, length
            return
        for key, value in self.items():
            if isinstance(value, Tensor):
                if value.dim() and value.shape[0] == batch:
                    super().__setitem__(key, value.index_select(0, index.to(value.device)))
            else:
                for one in value if type(value) in (list, tuple) else (value,):
                    if hasattr(one, "move"):
                        one.move(index)

    def take_back(self, length: int) -> None:
        """Its sequence was cut to this length, within what was generated."""
        for key, value in list(self.items()):
            at = self.set_at.get(key, 0)
            grows = hasattr(value, "move") and not isinstance(value, Tensor)
            if at <= length and not grows:
                continue
            if not isinstance(value, Tensor) and hasattr(value, "crop"):
                value = value.crop(length)
            elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == at:
                value = value[:, :length]
            elif isinstance(value, (Tensor, dict, list, tuple)) or grows:
                self.lost = length if isinstance(value, Tensor) or grows else self.lost
                value = None
            else:
                continue
            if value is None:
                del self[key]
                self.set_at.pop(key, None)
            else:
                super().__setitem__(key, value)
                self.set_at[key] = min(at, length)

    def crop(self, length: int) -> None:
        """Keeps what holds for the first `length` tokens of the prompt: values that know how (`crop`), and nothing else."""
        left = {key: kept for key, value in self.items() if (kept := _cropped(value, length)) is not None}
        if len(left) < len(self):
            self.lost = length
        self.clear()
        self.set_at = {}
        self.update(left)

    def fork(self, known: dict[int, Any]) -> Memory:
        """A store for a copy of the sequence: what changes as the sequence goes on (it has a method `move`) is copied.

        known: id of an object of the sequence -> that of its copy.
        """
        other = Memory(self.since, self.lost)
        other.update({key: _forked(value, known) for key, value in self.items()})
        other.set_at = dict(self.set_at)
        return other


def _follows(value: Any, batch: int) -> bool:
    """Whether a value can go where rows go, or has nothing to do with them."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] == batch
    if type(value) in (list, tuple):
        return all(not isinstance(one, Tensor) and _follows(one, batch) for one in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.device)) or hasattr(value, "move")


def _cropped(value: Any, length: int) -> Any:
    if isinstance(value, dict):
        left = {key: _cropped(inner, length) for key, inner in value.items()}
        return None if not left or any(inner is None for inner in left.values()) else left
    return value.crop(length) if hasattr(value, "crop") else None


def _forked(value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _forked(inner, known) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_forked(inner, known) for inner in value)
    return copy.deepcopy(value, dict(known)) if hasattr(value, "move") else value


def require_whole(memory: Any, recipe: str) -> None:
    """Raises ReattendError where a recipe that learns from the prompt has not seen all of it, or no longer knows what it saw."""
    since = max(getattr(memory, "since", 0), getattr(memory, "lost", 0))
    if since:
        raise ReattendError(
            f"{recipe} learns from the prompt while it is read, but the first {since} tokens of this sequence were read before it "
            f"began, or before their cache was cut: begin the session before the prompt is read, and pass the whole prompt without a "
            f"cache of its beginning"
        )
