"""Finds recipes by name. Every module of this folder that defines a `Recipe` with a slug is one; there is no list to keep."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import yaml

from ..interventions import ReattendError
from .base import Info, Recipe


@functools.cache
def registry() -> dict[str, type[Recipe]]:
    """{slug: recipe class}, sorted by slug."""
    found: dict[str, type[Recipe]] = {}
    package = __name__.rsplit(".", 1)[0]
    for item in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{package}.{item.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Recipe) and value.slug and value.__module__ == module.__name__:
                found[value.slug] = value
    return dict(sorted(found.items()))


def recipe_class(name: str) -> type[Recipe]:
    """The class of a recipe. Raises ReattendError with the nearest names for an unknown one."""
    known = registry()
    slug = name.strip().lower().replace("_", "-")
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known recipes: {', '.join(known)}"
        raise ReattendError(f"unknown recipe {name!r}: {hint}")
    return known[slug]


def recipe(name: str, **parameters: Any) -> Recipe:
    """A recipe with its parameters, checked. Raises ReattendError for an unknown name or a parameter out of range."""
    return recipe_class(name)(**parameters)


def list_recipes(family: str | None = None, kind: str | None = None) -> dict[str, Info]:
    """{name: Info} of all recipes, or of those in a family or for a kind of model."""
    return {
        slug: cls.info
        for slug, cls in registry().items()
        if (family is None or family in cls.info.families) and (kind is None or kind in cls.info.kinds)
    }


def load_recipe(source: str | Path | dict[str, Any]) -> Recipe:
    """A recipe from a YAML file (or its content as a dict): `name`, optional `version`, and parameters."""
    cls, parameters = read_recipe(source)
    return cls(**parameters)


def read_choice(choice: Any) -> tuple[type[Recipe], dict[str, Any]]:
    """(class, parameters) of a recipe as `apply` takes it: a name, a (name, parameters) pair, a YAML file, a dict or a Recipe."""
    if isinstance(choice, Recipe):
        return type(choice), choice.model_dump(exclude_unset=True)
    if isinstance(choice, tuple):
        return recipe_class(choice[0]), dict(choice[1])
    if isinstance(choice, (Path, dict)) or choice.endswith((".yaml", ".yml")):
        return read_recipe(choice)
    return recipe_class(choice), {}


def read_recipe(source: str | Path | dict[str, Any]) -> tuple[type[Recipe], dict[str, Any]]:
    """(class, parameters) of a YAML file or its content; the parameters are not checked yet."""
    if isinstance(source, dict):
        data, where = dict(source), "the recipe"
    else:
        where = str(source)
        if not Path(source).is_file():
            raise ReattendError(f"no recipe file at {where!r}")
        try:
            data = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ReattendError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ReattendError(f"{where} must be a mapping with a `name` (the recipe) and its parameters")
    version = data.pop("version", 1)
    cls = recipe_class(data.pop("name"))
    if version != cls.version:
        raise ReattendError(
            f"{where}: version {version} of recipe {cls.slug!r} is not known here; this is version {cls.version}"
        )
    return cls, data


def save_recipe(chosen: Recipe, path: str | Path) -> Path:
    """Writes a recipe as YAML."""
    path = Path(path)
    path.write_text(yaml.safe_dump(chosen.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
