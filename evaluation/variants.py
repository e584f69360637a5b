"""What is compared: the plain model and recipes with their parameters, from words as `var:move=0.2` or `vhr+var` or from objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..comparison.variants import NONE, choices_of, is_one, read_spec, slug, split_composed, split_list
from ..interventions import ReattendError
from ..recipes.kit.apply import Choice
from ..recipes.kit.checks import abridged, shown
from ..recipes.kit.registry import made, read_choice
from .suites import Suite, suite

__all__ = ["NONE", "Variant", "read_spec", "slug", "split_composed", "split_list", "suites_of", "variants_of"]

WIDEST_VALUE = 24
LONGEST_PATH = 4096


@dataclass(frozen=True)
class Variant:
    """One way of running the model. choices: recipes in the order in which they compose, none for the plain model."""

    label: str
    choices: tuple[Choice, ...] = ()
    facts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Variant:
        """Raises ReattendError for an unknown recipe or a parameter out of range."""
        if not choices:
            return cls(NONE)
        labels, facts = [], []
        for choice in choices:
            kind, given = read_choice(choice)
            # passages and boxes that only the suite knows are filled in by it; until then any will do for checking the rest
            waiting = dict(kind.lacking(given).values())
            checked = made(kind, {**waiting, **given}).model_dump(mode="json")
            settings = {name: checked[name] for name in given}
            labels.append(kind.slug + (f"({', '.join(map(_short, settings.items()))})" if settings else ""))
            everything = {name: value for name, value in checked.items() if name not in waiting or name in given}
            facts.append({"name": kind.slug, "version": kind.version, "given": settings, "parameters": everything})
        return cls(" + ".join(labels), tuple(choices), facts)

    def key(self) -> list[dict[str, Any]]:
        """What tells this variant's answers from any other's: recipes, versions, all parameters, content of the files they name."""
        keys = []
        for fact in self.facts:
            held = {name: found for name, value in fact["parameters"].items() if (found := _held(name, value))}
            keys.append({name: fact[name] for name in ("name", "version", "parameters")} | {"files": held})
        return keys


def _short(item: tuple[str, Any]) -> str:
    value = Path(item[1]).name if item[0].endswith("_path") and isinstance(item[1], str) else item[1]
    text = json.dumps(abridged(value))
    return f"{item[0]}={text if len(text) <= WIDEST_VALUE else text[: WIDEST_VALUE - 3] + '...'}"


def _held(name: str, value: Any) -> str | list[str]:
    """What tells the content of the files that a parameter names (a profile, a picture, pictures per prompt); "" where it names none."""
    if isinstance(value, list):
        found = [_held(name, one) for one in value if isinstance(one, str)]
        return [str(one) for one in found] if any(found) else ""
    return _digest(value) if isinstance(value, str) and value and len(value) < LONGEST_PATH else ""


def _digest(path: Any) -> str:
    file = Path(str(path))
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
    except (OSError, ValueError):  # a text that is no path
        return ""


def variants_of(wanted: Any, settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[Variant]:
    """Variants from words or objects, doubles left out.

    wanted: a comma-separated text, or a list whose items are a text ("none", "var:move=0.2", "vhr+var", "my.yaml"), a Recipe, a
    (name, parameters) pair, None for the plain model, or a list of these, which compose. settings: {recipe: further parameters}.
    """
    items = split_list(wanted) if isinstance(wanted, str) else [wanted] if is_one(wanted) else _listed(wanted, "recipes")
    if not items:
        raise ReattendError('name what to compare, for example "none,var"')
    found: dict[str, Variant] = {}
    for item in items:
        parts = list(item) if isinstance(item, list) else [item]
        variant = Variant.of([choice for part in parts for choice in choices_of(part, settings or {})])
        found.setdefault(json.dumps(variant.key(), sort_keys=True), variant)
    return list(found.values())


def _listed(wanted: Any, what: str) -> list[Any]:
    if not isinstance(wanted, (list, tuple)):
        raise ReattendError(f"{what} must be a text or a list, got {shown(wanted)}")
    return list(wanted)


def suites_of(wanted: Any, settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[Suite]:
    """Suites from a comma-separated text, or from a list of texts ("pope", "pope:noise=1.1") and Suite objects."""
    items = (
        split_list(wanted) if isinstance(wanted, str) else [wanted] if isinstance(wanted, Suite) else _listed(wanted, "suites")
    )
    if not items:
        raise ReattendError("name at least one suite; reattend.evaluation.list_suites() shows them")
    found: dict[str, Suite] = {}
    for item in items:
        if not isinstance(item, Suite):
            if not isinstance(item, str):
                raise ReattendError(f"suites must be names or Suite objects, got {shown(item)}")
            name, given = read_spec(item)
            item = suite(name, **{**(settings or {}).get(slug(name), {}), **given})
        found.setdefault(json.dumps(item.as_dict(), sort_keys=True), item)
    return list(found.values())
