"""What profiling steps share: their options, the model they read, how far they are, and the profile that is kept of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ...hooks import SiteTable, running, sites
from ...hooks.sites.discovery import unwrapped_model
from ...interventions import ReattendError
from .base import LARGEST
from .checks import shown
from .language import decoder_misfit, decoder_sites
from .profile import Profile, cached_path
from .registry import recipe_class

T = TypeVar("T")
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
# seconds that a profiling run may take before it shows a progress bar
PATIENCE = 1.0


def cached_profile(recipe: Any, model: Any, processor: Any = None, *, refresh: bool = False, **options: Any) -> Profile:
    """The kept profile of a recipe for this model, made (and kept) if there is none for these options yet.

    recipe: its name or class. model: a transformers model or pipeline; a pipeline brings its processor or tokenizer. options: those of the
    recipe's profiling step. Profiles made with other options are replaced. Recipes find it with profile_path="cached".
    """
    cls = recipe if isinstance(recipe, type) else recipe_class(recipe)
    inner = unwrapped_model(model)
    place = cached_path(cls.slug, sites(inner))
    told = sorted((name, _named(value)) for name, value in options.items())
    asked = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    if place.is_file() and not refresh:
        kept = Profile.load(place)
        if kept.facts.get("asked") == asked:
            return kept
    if processor is None:
        processor = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    profile = cls.profile(inner, processor, **options)
    profile.facts["asked"] = asked
    profile.save(place)
    return profile


def _named(value: Any) -> Any:
    """A function of a module by its name, which is the same in every process; anything else as it is."""
    name = getattr(value, "__qualname__", "<")
    return value if "<" in name else f"{value.__module__}.{name}"


def profiled_sites(model: Any, slug: str) -> tuple[SiteTable, SiteTable]:
    """(all sites, decoder sites) of a model that is to be profiled. Raises ReattendError where it does not fit or a recipe is at work."""
    table = sites(model)
    if reason := decoder_misfit(table, slug):
        raise ReattendError(f"cannot profile this model: {reason}")
    if running(model):
        raise ReattendError("a profile must show the plain model: end the session that is active on it first")
    return table, decoder_sites(table)


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


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, one by one. what: the bar's label; total: how many there are."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    begun = time.monotonic()
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not bar.live.is_started and time.monotonic() - begun > PATIENCE:
                bar.start()
    finally:
        bar.stop()
