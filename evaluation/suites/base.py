"""What a suite is: items made from a seed, answers of a model, and counts from which metrics and their intervals follow.

A suite is one file in this folder: a class with `name`, `kind`, `does`, its parameters as fields, and four short methods. See
`pope.py` for an example. The runner does everything else: batches, recipes, resuming, several processes, intervals, tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ...interventions import ReattendError
from ...recipes.kit.base import one_line
from ..metrics.sums import Sums
from ..subject import Subject

SubjectKind = Literal["llm", "lvlm", "diffusion", "vision"]


@dataclass(frozen=True)
class Item:
    """One question to a model. data: JSON values from which `answer` can rebuild everything it needs (pictures come from a seed).

    group: items of one scene, text or document share it; resampling draws whole groups. By default an item stands for itself.
    """

    id: str
    data: dict[str, Any] = field(default_factory=dict)
    group: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.id)


class Suite(BaseModel):
    """Base of all suites. A subclass sets the class variables, adds its parameters as fields and fills in the methods.

    name: as on the command line. kind: what it needs, "llm" (any model that writes text), "lvlm", "diffusion" or "vision". does: one line.
    shown: the metrics of the table, the first is the one that counts; None shows all. lower: metrics of which less is better;
    neutral: of which neither more nor less is. marks: kinds of passages and texts that `answer` names to recipes by
    `subject.marked(...)`: "highlight" (to be emphasised), "segments" (whose order should not matter), "words" (that must show in the
    picture), "negative" (a text beside the prompt, that is to stay out of the picture), "boxes" (of words), "cells" (the part of the
    canvas for each text), "removed" (boxes of what is to go), "picture" (the one that is edited or read), "background", "reference",
    "mask" and "box" (of a thing that is put into a picture). argument: the parameter that "name:..." gives, none by
    default. batch: how many items are answered at once. version: raised when items or scoring change, so that old records are not reused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str] = ""
    kind: ClassVar[SubjectKind]
    does: ClassVar[str] = ""
    shown: ClassVar[Sequence[str] | None] = None
    lower: ClassVar[Sequence[str]] = ()
    neutral: ClassVar[Sequence[str]] = ()
    marks: ClassVar[Sequence[str]] = ()
    argument: ClassVar[str] = ""
    batch: ClassVar[int] = 16
    version: ClassVar[int] = 1

    def __init__(self, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            fields = {name: f.description or "" for name, f in type(self).model_fields.items()}
            raise ReattendError(one_line(self.name, fields, error, what="suite")) from None

    @classmethod
    def named(cls, argument: str) -> type[Suite]:
        """The class for one value of the suite's argument."""
        return cls

    def asked_of(self, subject: Subject) -> Suite:
        """The suite as this model is asked: parameters that nobody named may be the model's own."""
        return self

    def items(self, count: int, seed: int) -> list[Item]:
        """`count` groups (scenes, texts) worth of items; the same for the same arguments, on every machine."""
        raise NotImplementedError

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        """One batch through the model: a record of JSON values per item, with what `counts` needs and people want to read."""
        raise NotImplementedError

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        """What one record adds to the sums, by name: {"asked": 1, "right": 0}. Called once per record."""
        raise NotImplementedError

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """Metrics by name from summed counts. Values of `sums` are floats or arrays [resamples]: use arithmetic, numpy and `ratio`."""
        raise NotImplementedError

    def chance(self) -> dict[str, float]:
        """What guessing would reach, by metric; metrics that have no such level are left out."""
        return {}

    def score(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of records."""
        found = self.metrics(Sums.of(self.counts(record) for record in records))
        return {name: float(value) for name, value in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """The suite as data: name, version and all parameters."""
        return {"name": self.name, "version": self.version, **self.model_dump(mode="json")}
