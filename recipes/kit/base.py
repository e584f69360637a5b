"""What a recipe is: a published method with its own parameters, turned into interventions on sites. One file per method."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from ...hooks import SiteTable, Support
from ...hooks.plan import Plan, Step
from ...interventions import ReattendError
from .checks import abridged, shown
from .contents import Contents
from .profile import Profile

_serials = itertools.count(1)
Kind = Literal["llm", "lvlm", "diffusion", "vision", "speech"]
# no count of tokens, layers or heads is larger, and sums of two of them still fit into the integers of a tensor
LARGEST = 2**31 - 1
DEEPEST, MOST_NAMED = 10, 6
# how pydantic names the types of a parameter that takes several, where a value is none of them; and what stands for such errors together
TYPE = re.compile(r"(str|int|float|bool|none|dict|list|tuple|literal)(\[|$)")
UNION = "none of several types"
HALF = "holds half of a letter (a lone surrogate), which no tokenizer reads: decode it as UTF-8"
# what a user comes with, in the order in which the README and `reattend list` answer
Problem = Literal[
    "my instruction is overlooked",
    "a fact in a long prompt is not found",
    "the answer depends on the order of the documents",
    "answers to classification questions are poor",
    "demonstrations make every prompt long",
    "the prompt is too long",
    "the model describes what is not there",
    "the image makes the model overlook the instruction",
    "an image's tokens cost too much",
    "the picture ignores a word",
    "the picture lacks structure and detail",
    "the picture shows what it should not",
    "things are in the wrong place of the picture",
    "something in a picture should be gone",
    "a thing should be put into a picture",
    "where the things in a picture are",
]
# what a method costs, in words that `Info.cost` is made of
COSTS = {
    "free": "next to nothing",
    "prefill": "more work when the prompt is read",
    "decode": "more work at every step, but no further pass",
    "forward": "further passes of the model, or further rows of its batch",
}
Family = Literal["calibration", "sinks", "heads", "reweighting", "sparsity", "guidance", "decoding", "reading"]


@dataclass(frozen=True)
class Info:
    """Machine-readable facts about a method, shown by `reattend list` and `reattend show`.

    does: one line for somebody who has not read the paper. paper, year, arxiv: the source; the year is that of the conference where
    there was one. code, licence: the official code where known. families: the first is the primary one. profiling: what has to be learned
    about a model before use, or "".
    cost: words of COSTS, as "free", or with where one holds. status: "ready" or "experiment".
    problems: what it is a remedy for. try_first: what a user should begin with, a strength or a text, {} = the defaults are that; sweep: the
    values of a strength that are worth comparing, from weak to strong.
    """

    does: str
    paper: str
    year: int
    arxiv: str
    families: Sequence[Family]
    kinds: Sequence[Kind]
    cost: str
    problems: Sequence[Problem] = ()
    try_first: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    code: str = ""
    licence: str = ""
    profiling: str = ""
    status: str = "ready"

    @property
    def costs(self) -> dict[str, str]:
        """The words of `cost`, and what they mean."""
        return {word: meaning for word, meaning in COSTS.items() if word in self.cost.replace(",", " ").split()}

    @property
    def reads(self) -> bool:
        """Whether it only reads what a model attends to, and changes nothing."""
        return tuple(self.families) == ("reading",)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Recipe(BaseModel):
    """Base of all recipes. A subclass sets `slug` and `info`, adds its parameters as fields, and fills in `misfit` and `plan`.

    Parameters out of range raise ReattendError with the field's name and the allowed values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    slug: ClassVar[str] = ""
    info: ClassVar[Info]
    version: ClassVar[int] = 1
    # {kind of passage: parameter that takes it as one list of texts per prompt}, so that an evaluation can name the passages itself
    marks: ClassVar[Mapping[str, str]] = {}
    # {kind of text, picture, mask or box: parameter that takes one per prompt}, for what an evaluation has to bring beside the prompt
    beside: ClassVar[Mapping[str, str]] = {}
    # {kind of layout: parameter that takes one {words: box} per prompt}, for boxes that an evaluation has made up
    placed: ClassVar[Mapping[str, str]] = {}
    # {what lies there: parameter that takes a list of boxes per prompt}, for places that an evaluation knows
    areas: ClassVar[Mapping[str, str]] = {}
    # roles of tokens whose weights it changes or reads, and roles that it hides from the layers it acts at: see `apply.plans_misfit`
    weighs: ClassVar[frozenset[str]] = frozenset()
    hides: ClassVar[frozenset[str]] = frozenset()
    # why it did nothing, where none of its edits was applied
    idle: ClassVar[str] = Plan.idle
    # what a profile of it holds, which is checked before the profile is used
    contents: ClassVar[Contents] = Contents()

    def __init__(self, /, **parameters: Any) -> None:
        if "self" in parameters:  # pydantic's own constructor cannot be told of it
            known = ", ".join(self.field_help()) or "none"
            raise ReattendError(f"recipe {self.slug!r}: self is not a parameter of {self.slug!r}; its parameters are: {known}")
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            raise ReattendError(one_line(self.slug, self.field_help(), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """No integer that overflows later on, no nan, no bytes for a text, and no truth value where a number is meant."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and not _takes(field.annotation, bool):
            raise ValueError("must be no truth value")
        reason = _unusable(value)
        if reason:
            raise ValueError(reason)
        return value

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, abridged(value)) for name, value in super().__repr_args__())

    # copies may get other parameters (`model_copy`), so they keep nothing of what the original has worked out of its own
    def __copy__(self) -> Recipe:
        return _fields_alone(super().__copy__())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Recipe:
        return _fields_alone(super().__deepcopy__(memo))

    @property
    def follows(self) -> Literal["", "batch", "run"]:
        """Whose picture its own is an edit of, from the same noise: "batch", that of the batch's first prompt; "run", the session's first."""
        return ""

    @functools.cached_property
    def serial(self) -> int:
        """A number that no other recipe object has; token roles of its own carry it."""
        return next(_serials)

    @classmethod
    def awaited(cls) -> dict[str, tuple[str, Any]]:
        """{kind: (parameter, what may stand in for it until an evaluation names it)}, of `marks`, `beside`, `placed` and `areas`."""
        passage, box = "passage", (0.25, 0.25, 0.75, 0.75)
        stands_in = (
            (cls.marks, [[passage]]),
            (cls.beside, [passage]),
            (cls.placed, [{passage: (0, 0, 1, 1)}]),
            (cls.areas, [[box]]),
        )
        of_kind = {"mask": [("1",)], "box": [box]}
        return {kind: (name, of_kind.get(kind, value)) for kinds, value in stands_in for kind, name in kinds.items()}

    @classmethod
    def lacking(cls, given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
        """Of `awaited`, what these parameters leave open: neither given, nor refused beside one that says it otherwise (columns of words)."""
        found = {kind: one for kind, one in cls.awaited().items() if given.get(one[0]) is None}
        for kind, one in list(found.items()):
            rest = {**dict(other for other in found.values() if other is not one), **given}
            if cls._made_of(rest) and not cls._made_of({**rest, one[0]: one[1]}):
                del found[kind]
        return found

    @classmethod
    def _made_of(cls, parameters: dict[str, Any]) -> bool:
        try:
            cls(**parameters)
        except ReattendError:
            return False
        return True

    @classmethod
    def field_help(cls) -> dict[str, str]:
        return {name: f.description or "" for name, f in cls.model_fields.items()}

    def supports(self, sites: SiteTable) -> Support:
        """Whether the recipe fits a model with these sites, and if not, why."""
        reason = self.misfit(sites)
        return Support(not reason, reason)

    def misfit(self, sites: SiteTable) -> str:
        """Why the recipe does not fit a model with these sites; "" where it does."""
        raise NotImplementedError

    def plan(self, sites: SiteTable) -> list[Step]:
        """The steps that a session takes on this model: `Edits`, `Observe`, `Projection`, `Guide`, `Spans`."""
        raise NotImplementedError

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Learns what the method must know about a model. Raises ReattendError where the method has no profiling step.

        processor: the model's processor or tokenizer, or None where the step needs none.
        """
        raise ReattendError(f"recipe {cls.slug!r} has no profiling step")

    def as_dict(self) -> dict[str, Any]:
        """The recipe as data: what a YAML file of it holds."""
        return {"name": self.slug, "version": self.version, **self.model_dump(mode="json", exclude_defaults=True)}


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a type hint allows values of this type."""
    return annotation is Any or annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


def _unusable(value: Any, depth: int = 0) -> str:
    """Why no parameter takes a value: too large, too deep, no number, bytes, half a letter; "" where it, and all in it, is none of these."""
    if isinstance(value, float):
        return "must be a finite number" if math.isnan(value) else ""
    if isinstance(value, (bytes, bytearray)):
        return "must be no bytes; give a text as str"
    if isinstance(value, str):
        return HALF if any("\ud800" <= letter <= "\udfff" for letter in value) else ""
    if isinstance(value, int):
        return "" if -LARGEST <= value <= LARGEST else f"a whole number must lie between {-LARGEST} and {LARGEST}"
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return ""
    if depth == DEEPEST:
        return f"must not be nested {DEEPEST} deep"
    items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return next(filter(None, (_unusable(item, depth + 1) for item in items)), "")


def _one_of_each_union(errors: Sequence[Any]) -> list[Any]:
    """The errors, those of a parameter that takes values of several types as one: each type says why the value is none of its own."""
    types: dict[Any, set[Any]] = {}
    for item in errors:
        types.setdefault(item["loc"][:1], set()).update(item["loc"][1:2])
    found: dict[Any, Any] = {}
    for number, item in enumerate(errors):
        several = {own for own in types[item["loc"][:1]] if isinstance(own, str) and TYPE.match(own)}
        if len(several) > 1:
            # of an error of a type itself, the whole value
            whole = next((e["input"] for e in errors if e["loc"][:1] == item["loc"][:1] and len(e["loc"]) == 2), item["input"])
            found.setdefault(item["loc"][:1], {"loc": item["loc"][:1], "type": UNION, "input": whole})
        else:
            found[number] = item
    return list(found.values())


def _fields_alone(recipe: Recipe) -> Recipe:
    for name in set(vars(recipe)) - set(type(recipe).model_fields):
        del vars(recipe)[name]
    return recipe


def one_line(slug: str, fields: dict[str, str], error: ValidationError, what: str = "recipe") -> str:
    """What is wrong with parameters, in one line that names them and what would be right."""
    parts = []
    for item in _one_of_each_union(error.errors()):
        name = ".".join(str(p) for p in item["loc"]) or slug
        if item["type"] == "extra_forbidden":
            known = ", ".join(fields) or "none"
            parts.append(f"{name} is not a parameter of {slug!r}; its parameters are: {known}")
        elif item["type"] == UNION:
            parts.append(
                f"{name}: a value of another type is meant, got {shown(item['input'])}; {name}: {fields.get(name, '')}"
            )
        elif item["type"] == "missing" and len(item["loc"]) == 1:
            parts.append(f"{name} is required: {fields.get(name, '')}")
        elif item["type"] == "missing":
            whole = str(item["loc"][0])
            parts.append(f"{name} is missing, got {shown(item['input'])}; {whole}: {fields.get(whole, '')}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            message = message.removeprefix("value error, ")
            # an error about several parameters names them itself
            parts.append(f"{name}: {message}, got {shown(item['input'])}" if item["loc"] else message)
    more = [f"and {len(parts) - MOST_NAMED} more"] if len(parts) > MOST_NAMED else []
    return f"{what} {slug!r}: " + "; ".join([*parts[:MOST_NAMED], *more])
