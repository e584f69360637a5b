"""From the words of a command line to recipes, a pipeline and its input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..interventions import ReattendError
from ..recipes import load_recipe, recipe, recipe_class
from ..recipes.kit.checks import read_picture, read_text, read_yaml, shown
from ..recipes.kit.registry import is_file_name
from ..zoo.loading import meant
from . import loading
from .inputs import draws
from .variants import NONE, read_spec, slug, split_composed, split_list

# options of the command line, and what they are called by pipelines
DRAWING = {"steps": "num_inference_steps", "guidance": "guidance_scale", "height": "height", "width": "width"}

NO_INPUT = "give an input with --text (or --prompt), --image or both"


def picture_of(image: Any) -> Any:
    """A picture as compare takes it: a path is read; a picture, an address, an array or a list of them stays as it is."""
    if isinstance(image, PathLike) or (isinstance(image, str) and not re.match(r"(https?|data):", image)):
        return read_picture(image, "image")
    if isinstance(image, (int, float, bytes, Mapping)):
        raise ReattendError(f"image must be a picture or the path of one, got {shown(image)}")
    return image


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """{"key": value} from key=value strings; values are read as YAML."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ReattendError(f"--set takes key=value, got {pair!r}")
        try:
            found[key.strip()] = read_yaml(value, "the value")
        except ReattendError:
            raise ReattendError(f"--set {key.strip()}: {shown(value)} is not a YAML value") from None
    return found


def recipes_of(names: list[str], pairs: list[str]) -> list[Any]:
    """Recipe objects that compose, with their --set parameters. Raises ReattendError before any model is loaded."""
    return [item for variant in variants_of(names, pairs) for item in variant]


def variants_of(names: list[str], pairs: list[str], sweep: list[str] | None = None) -> list[list[Any]]:
    """Recipe objects of every --recipe, which are several where it says "vhr+var"; with --sweep one such list per value.

    pairs: key=value of --set. Without a name before the key it goes to all recipes, which then must have it. What a --recipe says itself
    holds. Raises ReattendError before any model is loaded.
    """
    if not names:
        raise ReattendError("name at least one recipe with --recipe; `reattend list` shows them")
    asked = [[read_spec(spec) for spec in split_composed(name)] for name in names]
    specs = [spec for variant in asked for spec in variant]
    if any(name == NONE for name, _ in specs):
        raise ReattendError(f"--recipe {NONE}: the untouched model always runs too; leave it out")
    for key, value in settings_of(pairs).items():
        _refuse_parts(key, value, specs)
        for place in _owners(key, specs):
            specs[place][1].setdefault(key.rpartition(".")[2], value)
    if not sweep:
        return [[_made(*spec) for spec in variant] for variant in asked]
    key, values = _swept(sweep, names)
    (place,) = _owners(key, specs, "--sweep") if len(specs) == 1 or "." in key else (None,)
    field = key.rpartition(".")[2]
    if place is None:
        raise ReattendError(f"--sweep {key}: {names[0]} composes recipes, so write name.{key}=...")
    if field in specs[place][1]:
        raise ReattendError(f"--sweep {key}: {field} is already set to {shown(specs[place][1][field])}")
    return [
        [_made(name, {**given, field: value} if at == place else given) for at, (name, given) in enumerate(specs)]
        for value in values
    ]


def _owners(key: str, specs: list[tuple[str, dict[str, Any]]], option: str = "--set") -> list[int]:
    """Numbers of the recipes that a key=value means. A recipe file takes none."""
    owner, dot, field = key.rpartition(".")
    found = [place for place, (name, _) in enumerate(specs) if not dot or slug(owner) == slug(name)]
    files = [specs[place][0] for place in found if is_file_name(specs[place][0])]
    if files:
        raise ReattendError(f"{option} goes with a recipe's name; change the parameters of {files[0]} in the file")
    mean_it = len({slug(specs[place][0]) for place in found}) == 1
    if not mean_it and not (found and all(field in recipe_class(name).model_fields for name, _ in specs)):
        known = ", ".join(dict.fromkeys(name for name, _ in specs))
        raise ReattendError(f"{option} {key}: with several recipes write name.key=value, the name one of: {known}")
    return found


def _refuse_parts(key: str, value: Any, specs: list[tuple[str, dict[str, Any]]]) -> None:
    """Raises ReattendError for a key that names something inside a parameter, as boxes.circle or regional.boxes.circle."""
    names = [name for name, _ in specs if not is_file_name(name)]
    first, *rest = key.split(".")
    owner = ""
    if slug(first) in map(slug, names):
        owner, (first, *rest) = f"{first}.", rest or [""]
    if rest and any(first in recipe_class(name).model_fields for name in names):
        whole = json.dumps({".".join(rest): value}, ensure_ascii=False)
        raise ReattendError(f"--set {key}: {first} is one parameter, which is written whole, as --set '{owner}{first}={whole}'")


def _swept(sweep: list[str], names: list[str]) -> tuple[str, list[Any]]:
    """(key, values) of --sweep key=value,value,..."""
    if len(sweep) > 1 or len(names) > 1:
        raise ReattendError(
            "--sweep stands once, beside one --recipe: give further variants as --recipe name:key=value, without --sweep"
        )
    key, equals, text = sweep[0].partition("=")
    values = split_list(text)
    if not equals or not key.strip() or not values:
        raise ReattendError(f"--sweep takes key=value,value,..., got {sweep[0]!r}")
    return key.strip(), [settings_of([f"{key.strip()}={value}"])[key.strip()] for value in values]


def _made(name: str, given: dict[str, Any]) -> Any:
    if is_file_name(name):
        return load_recipe(name)
    try:
        return recipe(name, **given)
    except ReattendError as error:
        raise ReattendError(f"{error}{_hint(name, given, str(error))}") from None


def _hint(name: str, given: dict[str, Any], error: str) -> str:
    """How a list is written, where an error is about a parameter that takes one and was given a text."""
    fields = recipe_class(name).model_fields
    for key, value in given.items():
        if isinstance(value, str) and f" {key}: " in error and key in fields and "list[" in str(fields[key].annotation):
            return f"; a list is written in brackets, as '{key}=[{', '.join(split_list(value))}]'"
    return ""


def texts_of(texts: list[str], file: str) -> list[str]:
    """The texts of --text (each may be @file) and of --file, where empty lines stand between texts. [] where neither is given."""
    if texts and file:
        raise ReattendError("give --text or --file, not both")
    found = [_text(text) for text in texts]
    if file:
        found = [part.strip() for part in re.split(r"\n\s*\n", _text(f"@{file}")) if part.strip()]
        if not found:
            raise ReattendError(f"{file!r} holds no text")
    return found


def _text(given: str) -> str:
    """A text, or what the file behind an @ holds."""
    if not given.startswith("@"):
        return given
    return read_text(given[1:], "text file")


def prepare(
    model: str,
    texts: list[str],
    image: str,
    raw: bool,
    tokens: int,
    drawing: Mapping[str, float | None],
    sample: bool,
    device: str,
    dtype: str,
) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments for a job): text as a chat message where the model has a template; a model of the zoo is drawn as it is meant
    to be, but for what `drawing` names (steps, guidance, height, width; 0 or, of guidance, None = not named).

    texts: the input; several, or an empty one, only for a pipeline that draws."""
    named = {name: value for name, value in drawing.items() if value is not None and (value or name == "guidance")}
    if not 0 <= (guidance := named.get("guidance", 0)) < math.inf:
        raise ReattendError(f"--guidance must be a number of at least 0, got {guidance:g}")
    read = [_text(text) for text in texts]
    picture = read_picture(image, "picture") if image else None
    if not read and not image:
        raise ReattendError(NO_INPUT)
    pipe = loading.load(model, device=device or None, dtype=dtype or None)
    drawn = draws(pipe)
    if not drawn and len(read) > 1:
        raise ReattendError(f"--text (or --prompt) stands once: {model} reads one text at a time, got {len(read)}")
    if not drawn and not any(read) and not image:
        raise ReattendError(NO_INPUT)
    text = read[0] if read else ""
    asked: Any = text or None
    options: dict[str, Any] = {}
    task = getattr(pipe, "task", None)
    if task in ("text-generation", "image-text-to-text"):
        options = {"max_new_tokens": tokens, "do_sample": sample}
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        if task == "text-generation" and not raw and getattr(processor, "chat_template", None):
            asked = [{"role": "user", "content": text}]
    if drawn:
        asked = read if len(read) > 1 else text if read else None
        options = {DRAWING[name]: value for name, value in {**meant(pipe), **named}.items()}
    elif named:
        raise ReattendError(f"--{next(iter(named))} is for models that draw pictures, and {model} draws none; leave it out")
    given = {"text": asked, "prompt": None, "image": picture, "inputs": None, "tokenizer": None, "options": options}
    return pipe, given
