"""Recipes at work while a suite asks. Those that need passages of every prompt get them from the suite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..hooks import Session, sites
from ..interventions import UnsupportedError
from ..recipes.kit.apply import Choice, apply, resolve
from ..recipes.kit.base import Recipe
from ..recipes.kit.registry import read_choice
from .subject import Subject


class Steering:
    """A context manager: `with Steering(subject, ["emphasise"], suite.marks) as steering: suite.answer(subject, batch)`.

    A recipe with all its parameters acts from `with` to its end. One that takes passages of the prompt (`Recipe.marks`), a text or picture
    beside it (`Recipe.beside`) or boxes (`Recipe.placed`, `Recipe.areas`) and was given none waits: it acts inside `subject.marked(...)`,
    where the suite names those of each prompt.
    marks: the kinds of passages that the suite names. stats: {recipe: {site: how often its edits were applied}} of all sessions.
    Raises ReattendError when it is made, before any forward pass: an unknown recipe or parameter, a model that a recipe does not
    fit, or passages that a recipe needs and the suite does not name.
    """

    def __init__(self, subject: Subject, choices: Sequence[Choice], marks: Sequence[str] = ()) -> None:
        self.subject = subject
        self.ready: list[Recipe] = []
        self.waiting: list[tuple[type[Recipe], dict[str, Any], dict[str, str]]] = []
        self.stats: dict[str, dict[str, int]] = {}
        self._open: list[Session] = []
        self._stack = contextlib.ExitStack()
        trial = []
        for choice in choices:
            cls, given = read_choice(choice)
            awaited = {kind: field for kind, field in cls.lacking(given).items() if kind in marks}
            lacking = {kind: name for kind, (name, _) in awaited.items()}
            if lacking and not isinstance(choice, Recipe):
                self.waiting.append((cls, given, lacking))
                # any passage will do to see whether the other parameters and the model fit
                trial.append(cls(**given, **dict(awaited.values())))
            else:
                self.ready += resolve([choice], {})
        table = sites(subject.source)
        for item in [*self.ready, *trial]:
            support = item.supports(table)
            if not support:
                raise UnsupportedError(f"recipe {item.slug!r} does not fit this model: {support.reason}")

    def __enter__(self) -> Steering:
        self.subject.steering = self
        if self.ready:
            self._stack.enter_context(self._session(self.ready))
        return self

    def __exit__(self, *error: Any) -> None:
        self.subject.steering = None
        self._stack.__exit__(*error)

    @property
    def applied(self) -> int:
        """How often edits were applied so far, over all recipes and sites."""
        done = sum(sum(mine.values()) for mine in self.stats.values())
        return done + sum(session.applied for session in self._open)

    @contextlib.contextmanager
    def marked(self, rows: dict[str, list[Any]]) -> Iterator[list[Recipe]]:
        """The waiting recipes at work on one batch; rows: {kind: for every prompt its passages, its text, picture, or boxes}. Gives all
        recipes at work."""
        chosen = [
            cls(**given, **{field: rows[kind] for kind, field in lacking.items()}) for cls, given, lacking in self.waiting
        ]
        with self._session(chosen) if chosen else contextlib.nullcontext():
            yield [*self.ready, *chosen]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it is, for a while: recipes that act from `with` to its end step aside."""
        self._stack.close()
        try:
            yield
        finally:
            if self.ready:
                self._stack.enter_context(self._session(self.ready))

    @contextlib.contextmanager
    def _session(self, chosen: list[Recipe]) -> Iterator[None]:
        # what prepares images alone reads no text
        processor = self.subject.processor if hasattr(self.subject.processor, "decode") else None
        with apply(self.subject.source, *chosen, tokenizer=processor) as session:
            self._open.append(session)
            try:
                yield
            finally:
                self._open.remove(session)
                for label, sites_of in session.stats.items():
                    mine = self.stats.setdefault(label, {})
                    for site, count in sites_of.items():
                        mine[site] = mine.get(site, 0) + count
