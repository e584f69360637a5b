"""From the words of `reattend eval` to suites and variants, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..comparison.arguments import settings_of
from ..interventions import ReattendError
from .suites import Suite
from .variants import NONE, read_spec, slug, split_composed, split_list, suites_of, variants_of


def prepare(suites: Sequence[str], recipes: Sequence[str], pairs: Sequence[str]) -> tuple[list[Suite], list[Any]]:
    """(suites, recipes as `evaluate` takes them). pairs: key=value of --set, the key `recipe.field`, `suite.field`, or `field` of the
    only recipe. Raises ReattendError for whatever does not fit together."""
    asked = [part for text in suites for part in split_list(text)]
    wanted = [part for text in recipes for part in split_list(text)]
    specs = [spec for part in wanted for spec in split_composed(part)]
    names = {slug(read_spec(spec)[0]) for spec in specs} - {NONE}
    owners = names | {slug(read_spec(spec)[0]) for spec in asked}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in settings_of(list(pairs)).items():
        owner, dot, field = key.partition(".")
        if not dot:
            if len(names) != 1:
                raise ReattendError(f"--set {key}: write name.key=value, the name one of: {', '.join(sorted(owners))}")
            owner, field = next(iter(names)), key
        if slug(owner) not in owners:
            raise ReattendError(f"--set {key}: {owner!r} is none of: {', '.join(sorted(owners))}")
        settings.setdefault(slug(owner), {})[field] = value
    variants = variants_of(wanted, settings)
    return suites_of(asked, settings), [list(variant.choices) for variant in variants]
