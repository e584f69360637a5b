"""Ways of running a model in words: `none` is the plain model, `var:move=0.2` a recipe with a parameter, `vhr+var` two that compose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from ..recipes import Recipe
from ..recipes.kit.apply import Choice
from ..recipes.kit.checks import read_yaml, shown
from ..recipes.kit.registry import is_file_name

NONE = "none"


def split_list(text: str) -> list[str]:
    """Parts between commas; commas inside brackets and braces do not part."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def read_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """("var", {"move": 0.2, "rho": 0.3}) from "var:move=0.2:rho=0.3"; values are read as YAML."""
    name, *pairs = re.split(r":(?=\w+=)", spec.strip())
    found = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            found[key] = read_yaml(value, "the value")
        except ReattendError:
            raise ReattendError(f"{spec!r}: {shown(value)} is not a YAML value") from None
    return name.strip(), found


def split_composed(text: str) -> list[str]:
    """["vhr", "var:move=0.2"] from "vhr+var:move=0.2"; a plus sign inside a value does not part."""
    return [part.strip() for part in re.split(r"\+(?=\s*[A-Za-z./][\w./-]*\s*(?::\w+=|\+|$))", text)]


def slug(name: str) -> str:
    """A name as its owner's settings are found by: "lm-eval" for "lm_eval:arc_easy"."""
    return name.partition(":")[0].strip().lower().replace("_", "-")


def is_one(wanted: Any) -> bool:
    """Whether this is one way of running a model, and no list of them."""
    pair = isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[1], dict)
    return wanted is None or pair or isinstance(wanted, (Recipe, Path, dict))


def choices_of(part: Any, settings: Mapping[str, Mapping[str, Any]]) -> list[Choice]:
    """Recipes that a part of a variant names, in the order in which they compose; none for the plain model. settings: as given apart."""
    if part is None:
        return []
    if not isinstance(part, str):
        return [part]
    found: list[Choice] = []
    for spec in split_composed(part):
        name, given = read_spec(spec)
        if name == NONE:
            if given:
                raise ReattendError(f"{spec!r}: the plain model takes no parameters")
        elif is_file_name(name):
            if given or settings.get(name):
                raise ReattendError(f"change the parameters of {name} in the file")
            found.append(Path(name))
        else:
            found.append((name, {**settings.get(slug(name), {}), **given}))
    return found
