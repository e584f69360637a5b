"""The list of variants that `compare` is given: read, checked, and named by what tells them apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..interventions import ReattendError
from ..recipes import Recipe
from ..recipes.kit.checks import shown
from ..recipes.kit.registry import made, read_choice
from .facts import recipe_facts
from .images import taken_by
from .inputs import draws
from .variants import choices_of
from .words import short

# (recipe, which of this recipe in the variant, parameter)
Key = tuple[str, int, str]
# a recipe's class and the parameters it was given, as `read_choice` has them
Read = tuple[type[Recipe], dict[str, Any]]


@dataclass
class Variant:
    """Recipes that compose, and what tells them from the other variants. differing: {parameter: value} as JSON values."""

    recipes: list[Recipe]
    facts: list[dict[str, Any]] = field(default_factory=list)
    label: str = ""
    differing: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        for place, fact in enumerate(self.facts):
            nth = sum(other["name"] == fact["name"] for other in self.facts[:place])
            found.update({(fact["name"], nth, name): value for name, value in fact["parameters"].items()})
        return found


def variants_asked(
    model: Any, wanted: Sequence[Any], text: Any, prompt: Any, image: Any, inputs: Any, options: dict[str, Any]
) -> tuple[list[Variant], Any, Any, dict[str, Any]]:
    """(variants, the input text, the model's picture, options of the run).

    Options that are parameters of recipes go to every recipe that has them and does not say them itself; so does text, where prompt or
    inputs give the input. Raises ReattendError that names the variant: for an empty list, the plain model, or the same one twice.
    """
    if not wanted:
        raise ReattendError(
            'the list of variants is empty: name at least one, as compare(model, ["emphasise", "instaboost"], prompt=..., text=...)'
        )
    read = []
    for place, item in enumerate(wanted, start=1):
        with naming(place):
            choices = [choice for part in (item if isinstance(item, list) else [item]) for choice in choices_of(part, {})]
            if not choices:
                raise ReattendError(f"{shown(item)} is the untouched model, which every report shows: leave it out of the list")
            read.append([choice if isinstance(choice, Recipe) else read_choice(choice) for choice in choices])
    handed = {"image"} if image is not None else set()
    image = picture_for(model, [choice for choices in read for choice in choices], image)
    fields = {name for choices in read for c in choices if not isinstance(c, Recipe) for name in c[0].model_fields}
    shared = {name: options[name] for name in options if name in fields}
    options = {name: value for name, value in options.items() if name not in fields}
    passage, text = passage_of([choice for choices in read for choice in choices], text, prompt, inputs)
    shared.update(passage)
    variants = []
    for place, choices in enumerate(read, start=1):
        with naming(place):
            variants.append(Variant([c if isinstance(c, Recipe) else filled(c[0], c[1], shared) for c in choices]))
    for variant in variants:
        variant.facts = [recipe_facts(item) for item in variant.recipes]
    _name(variants, {*shared, *handed})
    _refuse_doubles(variants)
    return variants, text, image, options


def passage_of(read: Sequence[Recipe | Read], text: Any, prompt: Any, inputs: Any) -> tuple[dict[str, Any], Any]:
    """(parameters for every recipe that lacks them, the input text): beside prompt or inputs, text is the passage that recipes mark.

    Where none of the recipes lacks a passage, text stays an input, which `job_for` then refuses beside the other one.
    """
    lacking = any(
        not isinstance(choice, Recipe) and "text" in choice[0].model_fields and not _has_passage(choice[1]) for choice in read
    )
    if text is None or not lacking or (prompt is None and inputs is None):
        return {}, text
    return {"text": text}, None


def picture_for(model: Any, read: Sequence[Recipe | Read], image: Any) -> Any:
    """The picture that the model itself is given; of a pipeline that draws, recipes get it here as a parameter of theirs.

    Where the pipeline takes no picture it is that of all recipes that have such a parameter and were not given one; where it takes one, only
    of those that were given no parameters of their own: of the others, what they were given is all that they shall have.
    """
    if image is None or not draws(model):
        return image
    accepted, takes_any = taken_by(model)
    its_own = takes_any or "image" in accepted
    having = [choice for choice in read if not isinstance(choice, Recipe) and "image" in choice[0].model_fields]
    lacking = [given for _, given in having if given.get("image") is None and not (its_own and given)]
    for given in lacking:
        given["image"] = image
    return image if its_own or not lacking else None


def _has_passage(given: dict[str, Any]) -> bool:
    return given.get("text") is not None or given.get("ranges") is not None


def filled(cls: type[Recipe], given: dict[str, Any], shared: dict[str, Any]) -> Recipe:
    """A recipe with its own parameters, and those of the shared ones that it has and does not say itself."""
    mine = {name: value for name, value in shared.items() if name in cls.model_fields}
    if given.get("ranges") is not None:
        mine.pop("text", None)
    unmarked = [name for name in cls.marks.values() if name not in {**mine, **given} and given.get("ranges") is None]
    try:
        return made(cls, {**mine, **given})
    except ReattendError as error:
        if "text" not in unmarked:
            raise
        raise ReattendError(
            f'{error}; give the passage for all recipes as text=, and then the input as prompt=, or for one as ("{cls.slug}", '
            '{"text": ...})'
        ) from None


@contextmanager
def naming(place: int, label: str = "") -> Iterator[None]:
    """Errors inside say which variant they are about."""
    try:
        yield
    except ReattendError as error:
        raise type(error)(f"variant {place}{f', {label}' if label else ''}: {error}") from error


def _name(variants: Sequence[Variant], shared: set[str]) -> None:
    """Fills in what differs, and labels that say it: parameters of the recipes that several variants have, else those that were set."""
    held = [variant.parameters() for variant in variants]
    for variant, mine in zip(variants, held, strict=True):
        parts = []
        for place, fact in enumerate(variant.facts):
            nth = sum(other["name"] == fact["name"] for other in variant.facts[:place])
            marks = {*type(variant.recipes[place]).marks.values(), "ranges"}
            said = {}
            for name in fact["parameters"]:
                key = (fact["name"], nth, name)
                values = [_json(other[key]) for other in held if key in other]
                alone = len(values) == 1 and name in fact["chosen"] and name not in shared | marks
                if alone or len(set(values)) > 1:
                    said[name] = mine[key]
            dotted = len(variant.facts) > 1
            variant.differing.update({f"{fact['name']}.{name}" if dotted else name: v for name, v in said.items()})
            inside = ", ".join(f"{name}={short(value)}" for name, value in said.items() if value is not None)
            parts.append(fact["name"] + (f"({inside})" if inside else ""))
        variant.label = " + ".join(parts)


def _refuse_doubles(variants: Sequence[Variant]) -> None:
    seen: dict[str, int] = {}
    for place, variant in enumerate(variants, start=1):
        key = _json([(f["name"], f["parameters"]) for f in variant.facts])
        if key in seen:
            raise ReattendError(f"variants {seen[key]} and {place} are the same: {variant.label}")
        seen[key] = place


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
