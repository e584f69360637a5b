"""Finds recipes by name, and what they did when they were measured.

Every file of recipes/ that defines a `Recipe` with a slug is one; there is no list to keep.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...interventions import ReattendError
from .base import Info, Recipe
from .checks import check_output, read_text, read_yaml, shown, writing

NOTHING = {"did": [], "cost": ""}


@functools.cache
def registry() -> dict[str, type[Recipe]]:
    """{slug: recipe class}, sorted by slug."""
    found: dict[str, type[Recipe]] = {}
    package = __name__.rsplit(".", 2)[0]
    for item in pkgutil.iter_modules([str(Path(__file__).parents[1])]):
        module = importlib.import_module(f"{package}.{item.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Recipe) and value.slug and value.__module__ == module.__name__:
                found[value.slug] = value
    return dict(sorted(found.items()))


def recipe_class(name: str) -> type[Recipe]:
    """The class of a recipe. Raises ReattendError with the nearest names for an unknown one."""
    known = registry()
    if not isinstance(name, str):
        raise ReattendError(f"a recipe is named by a text as 'streaming', got {shown(name)}")
    slug = name.strip().lower().replace("_", "-")
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}"
        raise ReattendError(f"unknown recipe {shown(name)}: {hint}")
    return known[slug]


def recipe(name: str, /, **parameters: Any) -> Recipe:
    """A recipe with its parameters, checked. Raises ReattendError for an unknown name or a parameter out of range."""
    return made(recipe_class(name), parameters)


def made(cls: type[Recipe], parameters: Any) -> Recipe:
    """A recipe of this class. Raises ReattendError where the parameters are not a mapping of its parameters' names."""
    if not isinstance(parameters, Mapping):
        raise ReattendError(f"recipe {cls.slug!r}: its parameters must be a mapping {{name: value}}, got {shown(parameters)}")
    wrong = [key for key in parameters if not isinstance(key, str)]
    if wrong:
        known = ", ".join(cls.model_fields) or "none"
        raise ReattendError(f"recipe {cls.slug!r}: {shown(wrong[0])} names no parameter; its parameters are: {known}")
    return cls(**parameters)


def list_recipes(family: str | None = None, kind: str | None = None) -> dict[str, Info]:
    """{name: Info} of all recipes, or of those in a family or for a kind of model."""
    return {
        slug: cls.info
        for slug, cls in registry().items()
        if (family is None or family in cls.info.families) and (kind is None or kind in cls.info.kinds)
    }


def load_recipe(source: str | Path | dict[str, Any]) -> Recipe:
    """A recipe from a YAML file (or its content as a dict): `name`, optional `version`, and parameters."""
    return made(*read_recipe(source))


def read_choice(choice: Any) -> tuple[type[Recipe], dict[str, Any]]:
    """(class, parameters) of a recipe as `apply` takes it: a name, a (name, parameters) pair, a YAML file, a dict or a Recipe."""
    if isinstance(choice, Recipe):
        return type(choice), choice.model_dump(exclude_unset=True)
    if isinstance(choice, tuple):
        if len(choice) != 2 or not isinstance(choice[1], Mapping):
            raise ReattendError(f'a tuple must be a ("name", {{parameters}}) pair, got {shown(choice)}')
        return recipe_class(choice[0]), dict(choice[1])
    if isinstance(choice, (Path, dict)) or is_file_name(choice):
        return read_recipe(choice)
    if isinstance(choice, str):
        return recipe_class(choice), {}
    hint = ""
    if isinstance(choice, (list, set, frozenset)):
        hint = "; several recipes are arguments of their own: apply(model, *recipes)"
    elif isinstance(choice, type) and issubclass(choice, Recipe):
        hint = f"; give its name {choice.slug!r}, or an object of it"
    raise ReattendError(
        'a recipe must be a name, a ("name", {parameters}) pair, a .yaml file, a dict with a `name`, or a Recipe object, '
        f"got {shown(choice)}{hint}"
    )


def is_file_name(choice: Any) -> bool:
    """Whether a choice of `apply` names a recipe file."""
    return isinstance(choice, str) and choice.lower().endswith((".yaml", ".yml"))


def read_recipe(source: str | Path | dict[str, Any]) -> tuple[type[Recipe], dict[str, Any]]:
    """(class, parameters) of a YAML file or its content; the parameters are not checked yet."""
    if isinstance(source, Mapping):
        data, where = dict(source), "the recipe"
    else:
        where = str(source)
        data = read_yaml(read_text(source, "recipe file"), where)
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ReattendError(f"{where} must be a mapping with a `name` (the recipe) and its parameters")
    version = data.pop("version", 1)
    cls = recipe_class(data.pop("name"))
    if version != cls.version:
        raise ReattendError(
            f"{where}: version {shown(version)} of recipe {cls.slug!r} is not known here; this is version {cls.version}"
        )
    return cls, data


def save_recipe(chosen: Recipe, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a recipe as YAML. Such files are written by hand too, so one that is there is left alone unless overwrite."""
    if not isinstance(chosen, Recipe):
        raise ReattendError(f"save_recipe takes a Recipe object, got {shown(chosen)}: make one with reattend.recipe(name, ...)")
    path = check_output(path, "path", overwrite=overwrite)
    with writing(path, "path"):
        path.write_text(yaml.safe_dump(chosen.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


@functools.cache
def measured() -> dict[str, dict[str, Any]]:
    """{slug: {"did": [a text per measure and model], "cost": times of the untouched model's, or ""}}; what was not measured is missing."""
    return json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
