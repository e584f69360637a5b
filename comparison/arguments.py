"""From the words of a command line to recipes, a pipeline and its input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..interventions import ReattendError
from ..recipes import load_recipe, recipe
from ..recipes.checks import shown
from ..recipes.files import read_picture, read_text, read_yaml
from . import loading


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
    """Recipe objects with their --set parameters. Raises ReattendError before any model is loaded."""
    if not names:
        raise ReattendError("name at least one recipe with --recipe; `reattend list` shows them")
    settings = settings_of(pairs)
    chosen = []
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        mine = {}
        for key in list(settings):
            owner, dot, field = key.partition(".")
            if (dot and owner == name) or (not dot and len(names) == 1):
                mine[field if dot else key] = settings.pop(key)
        if is_file and mine:
            raise ReattendError(f"--set goes with a recipe's name; change the parameters of {name} in the file")
        chosen.append(load_recipe(name) if is_file else recipe(name, **mine))
    if settings:
        key = next(iter(settings))
        raise ReattendError(f"--set {key}: with several recipes write name.key=value, the name one of: {', '.join(names)}")
    return chosen


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
    model: str, text: str, image: str, raw: bool, tokens: int, steps: int, sample: bool, device: str, dtype: str
) -> tuple[Any, dict[str, Any]]:
    """(pipeline, arguments for a job): text as a chat message where the model has a template."""
    text = _text(text)
    picture = read_picture(image, "picture") if image else None
    if not text and not image:
        raise ReattendError("give an input with --text (or --prompt), --image or both")
    pipe = loading.load(model, device=device or None, dtype=dtype or None)
    asked: Any = text or None
    options: dict[str, Any] = {}
    task = getattr(pipe, "task", None)
    if task in ("text-generation", "image-text-to-text"):
        options = {"max_new_tokens": tokens, "do_sample": sample}
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        if task == "text-generation" and not raw and getattr(processor, "chat_template", None):
            asked = [{"role": "user", "content": text}]
    elif task is None and steps:
        options = {"num_inference_steps": steps}
    given = {"text": asked, "prompt": None, "image": picture, "inputs": None, "tokenizer": None, "options": options}
    return pipe, given
