"""What doors do before and after a pass of the model's root: actions with a rank, run by both trackers in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import nn

from ..interventions import Clock
from .passes import OUTSIDE, Forward
from .protocols import Steered


class Rank(IntEnum):
    """The order of what doors do before a pass of a root; after it they come in the opposite order. Facts are read in between."""

    LATENTS = 0
    LENGTHS = 1  # second texts that stand after the prompt, and are part of what others take for it
    ARGUMENTS = 2  # arguments and other second texts
    ROWS = 3  # rows of guides
    FACTS = 4  # what is added to the facts, once they are read
    TRIALS = 5  # passes of doors' own, around the real one: trials of next tokens, prompts of branches, probes
    BRANCHES = 6
    PROBES = 7
    REUSE = 8
    CACHES = 9  # after a pass first: what comes of its cache


@dataclass(frozen=True)
class Action:
    """What a step does before and after every pass of the model's root (a denoiser, or the model that reads tokens).

    before(RootCall) may change its arguments below Rank.FACTS; after(RootCall) may change its output, and is not called after an error.
    certain: who needs to know for sure which rows are conditional, for errors that say so; "" where nobody does.
    """

    rank: Rank
    before: Callable[[RootCall], None] | None = None
    after: Callable[[RootCall], None] | None = None
    certain: str = ""


@dataclass(eq=False)
class RootCall:
    """One call of a model's root, for actions: args and kwargs by position and name (`names`), then its output.

    given: the same arguments by name. clock, run and pipeline: where a denoiser's pass stands. forward: the facts, once they are read.
    kept: what actions keep from before the pass to after it, and share with others of their kind.
    """

    root: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    names: Sequence[str]
    sessions: list[Steered]
    given: dict[str, Any] = field(default_factory=dict)
    clock: Clock = OUTSIDE
    run: Any = None
    pipeline: Any = None
    forward: Forward | None = None
    output: Any = None
    changed: bool = False
    kept: dict[object, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.actions = sorted((a for session in self.sessions for a in session.actions), key=lambda action: action.rank)

    def replace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Other arguments for the pass."""
        self.args, self.kwargs, self.changed = args, kwargs, True
        self.given = {**dict(zip(self.names, args, strict=False)), **kwargs}

    def enter(self, read: Callable[[], Forward]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the pass: actions by rank, and `read` (the facts) in their midst. Returns the arguments, if one has changed them."""
        for action in self.actions:
            if action.before is not None and action.rank < Rank.FACTS:
                action.before(self)
        self.forward = read()
        for session in self.sessions:
            if session.number not in self.forward.asked:
                session.ready(self)
                self.forward.asked.add(session.number)
        self.add_facts()
        for action in self.actions:
            if action.before is not None and action.rank > Rank.FACTS:
                action.before(self)
        # a pass that a door has refused is no pass: the error says what was wrong
        for session in self.sessions:
            session.forwards += 1
        return (self.args, self.kwargs) if self.changed else None

    def add_facts(self) -> None:
        """Lets doors add to the facts of a pass, in passes of a door's own too."""
        for action in self.actions:
            if action.before is not None and action.rank == Rank.FACTS:
                action.before(self)

    def leave(self, output: Any) -> Any:
        """After the pass: the same in the opposite order; within a rank in the order of the sessions. Returns an output that is another."""
        self.output = output
        for action in sorted(self.actions, key=lambda action: -action.rank):
            if action.after is not None:
                action.after(self)
        return None if self.output is output else self.output
