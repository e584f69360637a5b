"""What the lower files of this folder know of a session, so that none of them has to import it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..interventions import Call, Edit, Site


@dataclass(slots=True, eq=False)
class Place:
    """What a session does at one module. number: the session's; site: by the name that it has in this session's model.

    editors(call, forward) -> the edits that act; readers(call, edits, forward) look at it with the edits of all sessions. ways: what the
    executor counts there.
    """

    number: int
    site: Site
    ways: Counter[str]
    editors: list[Callable[[Call, Any], Sequence[Edit]]] = field(default_factory=list)
    readers: list[Callable[[Call, list[Edit], Any], None]] = field(default_factory=list)


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

    def at(self, module: nn.Module) -> Place | None:
        """What it does at a module; None where nothing."""
        ...

    def note(self, label: str, change: Tensor, of: str = "a prediction") -> None:
        """Notes the size of a change that this recipe made, as a part of what it changed, on the device of that. of: what that is."""
        ...

    def ready(self, call: Any) -> None: ...

    def forget(self) -> None: ...
