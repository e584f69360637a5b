"""What the lower files of this folder know of a session, so that none of them has to import it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from ..interventions import Call, Edit, Site


class Steered(Protocol):
    """A session, as trackers, routes and doors know it."""

    active: bool
    isolated: bool
    forwards: int
    tokenizer: Any
    number: int
    mark: Any
    counts: dict[str, Counter[str]]
    ended: bool
    # recipes whose steps have hooks on modules, and those whose hooks have nothing to do in steps of decoding
    hooked: list[str]
    prompt_hooked: list[str]

    @property
    def model(self) -> Any: ...

    @property
    def plans(self) -> Sequence[Any]: ...

    @property
    def actions(self) -> Sequence[Any]:
        """What its steps do before and after passes of a root."""
        ...

    @property
    def spans(self) -> Sequence[Any]:
        """Its steps that mark tokens of a prompt: mark(tokens, ids, tokenizer, read)."""
        ...

    @property
    def acted(self) -> Sequence[tuple[Site, nn.Module]]:
        """All that its steps act or look at when attention is computed, nested steps too."""
        ...

    @property
    def modules(self) -> set[int]: ...

    @property
    def decoder_modules(self) -> set[int]: ...

    def acts_at(self, module: nn.Module) -> bool: ...

    def site_at(self, module: nn.Module) -> Site: ...

    def edits(self, module: nn.Module, call: Call, forward: Any) -> list[Edit]: ...

    def readers_at(self, module: nn.Module) -> Sequence[Callable[[Call, list[Edit], Any], None]]: ...

    def ready(self, call: Any) -> None: ...

    def forget(self) -> None: ...
