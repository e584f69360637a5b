"""What a stack of blocks gave at an earlier step of a denoising run, to be used again: outputs, or the changes that the blocks made.

Blocks that follow on one another keep one change together, as long as each gets what the one before it gave. Where the model adds
something in between (a ControlNet's residuals), what it adds is not kept: it is added anew.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...interventions import UnsupportedError
from ..sites.source import source_of
from ..tokens.states import parameters_of

TEXT = "encoder_hidden_states"


@dataclass
class KeptPass:
    """Of one pass: its step, and for each block the streams of its output, and what is added to them (or given for them).

    shapes: of the first block's inputs. parts: by block and place in its output, for ends of stretches; names: the input that each place
    of an output continues, None for what is given again as it is. single: outputs are a tensor, no tuple.
    """

    step: int
    shapes: dict[str, tuple] = field(default_factory=dict)
    parts: dict[int, list[Any]] = field(default_factory=dict)
    names: dict[int, list[str | None]] = field(default_factory=dict)
    single: dict[int, bool] = field(default_factory=dict)


class Keeping:
    """A pass that is computed: fills in a `KeptPass`. change: what the blocks add to their streams, else what they give."""

    def __init__(self, step: int, *, change: bool) -> None:
        self.kept, self.change = KeptPass(step), change
        # inputs of the stretch that is under way, the outputs of its last block with their versions, and that block
        self.start: dict[str, Tensor] = {}
        self.last: dict[str, tuple[Tensor, int]] = {}
        self.at = -1

    def computed(self, index: int, module: nn.Module, given: Mapping[str, Tensor], output: Any, *, alone: bool = False) -> None:
        """Notes what block `index` of the stack made of its inputs. alone: it is no block, its output continues none of them."""
        kept, items = self.kept, list(output) if isinstance(output, (tuple, list)) else [output]
        if not kept.shapes:
            kept.shapes = shapes_of(given)
        names: list[str | None] = [None] * len(items) if alone else streams(module, given, items)
        kept.names[index], kept.single[index] = names, not isinstance(output, (tuple, list))
        if self.at < 0 or not all(
            name in self.last and _same(given[name], *self.last[name]) for name in names if name is not None
        ):
            self.start = {name: given[name] for name in names if name is not None}
        elif self.change:
            # one change for both
            kept.parts[self.at] = [None if name is not None else part for name, part in self._of(self.at)]
        else:
            kept.parts.pop(self.at, None)
        self.at = index
        kept.parts[index] = [self._part(name, item) for name, item in zip(names, items, strict=True)]
        self.last = {name: (item, _version(item)) for name, item in zip(names, items, strict=True) if name is not None}

    def _of(self, index: int) -> list[tuple[str | None, Any]]:
        return list(zip(self.kept.names[index], self.kept.parts[index], strict=True))

    def _part(self, name: str | None, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if name is None or not self.change:
            return item.detach().clone()
        return item.detach() - self.start[name].detach()


def reused(kept: KeptPass, index: int, given: Mapping[str, Tensor], *, change: bool) -> Any:
    """What block `index` gives for these inputs without being computed."""
    names = kept.names[index]
    parts = kept.parts.get(index) or [None] * len(names)
    items = []
    for name, part in zip(names, parts, strict=True):
        if name is None or (part is not None and not change):
            # the model may change in place what it is given
            items.append(part.clone() if isinstance(part, Tensor) else part)
        else:
            items.append(given[name] if part is None else given[name] + part)
    return items[0] if kept.single[index] else tuple(items)


def shapes_of(given: Mapping[str, Tensor]) -> dict[str, tuple]:
    """What has to be the same at the step that uses what was kept."""
    streams = {name: value for name, value in given.items() if name == TEXT or name == next(iter(given))}
    return {name: (tuple(value.shape), value.dtype, value.device) for name, value in streams.items()}


def tensors(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a module's arguments by name, its first one first."""
    given = {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
    first = parameters_of(module)[0]
    ordered = {first: given.pop(first, None), **given}
    return {name: value for name, value in ordered.items() if isinstance(value, Tensor)}


def streams(module: nn.Module, given: Mapping[str, Tensor], items: Sequence[Any]) -> list[str | None]:
    """The input that each part of a block's output continues: by what the block's code calls it, else by its shape; None: no input.

    Raises UnsupportedError where two inputs would do.
    """
    first = next(iter(given))
    if len(items) == 1:
        return [first]
    said = _returned(type(module))
    if len(said) == len(items) and first in said:
        known = [
            isinstance(item, Tensor) and name in (first, TEXT) and name in given for name, item in zip(said, items, strict=True)
        ]
        return [name if fits else None for name, fits in zip(said, known, strict=True)]
    found: list[str | None] = []
    for item in items:
        fitting = [n for n in (first, TEXT) if n in given and isinstance(item, Tensor) and given[n].shape == item.shape]
        if len(fitting) > 1:
            raise UnsupportedError(
                f"{type(module).__name__} returns {len(items)} states of one shape, and which of them is the image's is not known"
            )
        found.append(fitting[0] if fitting and fitting[0] not in found else None)
    return found


@functools.lru_cache(maxsize=1024)
def _returned(cls: type) -> tuple[str, ...]:
    """The names in the last `return a, b` of a block's forward."""
    tuples = [
        node.value.elts
        for node in ast.walk(source_of(cls.forward).tree)  # type: ignore[attr-defined]
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    ]
    return tuple(part.id if isinstance(part, ast.Name) else "" for part in tuples[-1]) if tuples else ()


def _same(value: Tensor, before: Tensor, version: int) -> bool:
    """Whether a block gets what the one before it gave. Of tensors of inference mode it cannot be told whether they were changed."""
    return value is before and version >= 0 and value._version == version


def _version(value: Tensor) -> int:
    return -1 if not isinstance(value, Tensor) or value.is_inference() else value._version
