"""Options of profiling steps, checked by what their functions' signatures say, before anything is learned."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...interventions import ReattendError
from .base import LARGEST
from .checks import shown

Function = TypeVar("Function", bound=Callable[..., Any])
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Sequence[int]": "a list of whole numbers",
    "Sequence[float]": "a list of numbers",
    "None": "None",
}


def checked(function: Function) -> Function:
    """The profiling function with its keyword options checked: names, and types of those that are numbers, texts or lists of numbers."""
    options = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    others = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        for name, value in given.items():
            if name in options:
                _check(name, value, str(options[name].annotation))
            elif not others:
                raise ReattendError(f"{name} is no option of this profiling step; its options are: {', '.join(options)}")
        return function(*args, **given)

    return call  # type: ignore[return-value]


def _check(name: str, value: Any, hint: str) -> None:
    kinds = hint.split(" | ")
    if all(kind in WORDS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
        raise ReattendError(f"{name} must be {' or '.join(WORDS[kind] for kind in kinds)}, got {shown(value)}")


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("Sequence["):
        inner = kind.removeprefix("Sequence[").removesuffix("]")
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is(item, inner) for item in value)
    if kind in ("int", "float") and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    return value is None if kind == "None" else isinstance(value, {"int": int, "float": float, "bool": bool, "str": str}[kind])
