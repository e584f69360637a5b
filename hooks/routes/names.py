"""The name of our attention function: in a model's config while sessions last, and in transformers' registries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ...interventions import ReattendError, Site, UnsupportedError

PREFIX = "reattend_"
SUPPORTED = ("sdpa", "eager")
NO_PAGES = "paged caches (continuous batching) are not supported; use generate() with an ordinary cache"

CONTINUOUS_BATCHING = "transformers.generation.continuous_batching"


class Name(str):
    """The name of our attention function for implementation `original`, as it stands in a config; a copy or a pickle names the original."""

    original: str

    def __new__(cls, original: str) -> Name:
        self = super().__new__(cls, PREFIX + original)
        self.original = original
        return self

    def __deepcopy__(self, memo: Any) -> str:
        return self.original

    def __reduce__(self) -> Any:
        return str, (self.original,)

    def __eq__(self, other: object) -> bool:
        # continuous batching asks for these before it would refuse our name in words of its own
        paged = isinstance(other, str) and other.startswith("paged|")
        if paged and sys._getframe(1).f_globals.get("__name__", "").startswith(CONTINUOUS_BATCHING):
            raise ReattendError(NO_PAGES)
        return str.__eq__(self, other)

    __hash__ = str.__hash__


class Switched:
    """A config that names our function. users: the routes of the models whose sessions need it; several models may share one config."""

    def __init__(self, config: Any, original: str) -> None:
        self.config, self.name = config, Name(original)
        # an implementation that the user has switched to and that cannot be edited: recipes are off as long as it stands there
        self.left_for: str | None = None
        self.users: list[Any] = []


# configs by id, and which routes need a name in the registries
configs: dict[int, Switched] = {}
_names: dict[str, list[Any]] = {}


def original_name(site: Site, config: Any) -> str:
    """The implementation that a config names, by the name that it has outside of sessions."""
    entry = configs.get(id(config))
    name: str = config._attn_implementation or "eager"
    if entry is not None and name == entry.name:
        return entry.name.original
    return _supported(site, name.removeprefix(PREFIX) if name.startswith(PREFIX) else name)


def _supported(site: Site, name: str) -> str:
    if name not in SUPPORTED:
        raise UnsupportedError(
            f"{site.name} runs attention implementation {name!r}, which returns no statistics to edit: call "
            f'model.set_attn_implementation("sdpa") first (on a GPU it uses flash kernels too)'
        )
    return name


def register(name: str, user: Any, function: Callable[..., Any]) -> None:
    """Puts function(name, module, query, ...) into transformers' registries as ours for implementation `name`, until `release(user)`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    users = _names.setdefault(name, [])
    if user not in users:
        users.append(user)
    if PREFIX + name not in AttentionInterface._global_mapping:
        AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface._global_mapping[name])
        AttentionInterface.register(PREFIX + name, functools.partial(function, name))


def release(user: Any) -> None:
    """Takes out the names that nobody else needs; safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, users in list(_names.items()):
        _names[name] = [other for other in users if other is not user]
        if not _names[name]:
            AttentionInterface._global_mapping.pop(PREFIX + name, None)
            AttentionMaskInterface._global_mapping.pop(PREFIX + name, None)
            del _names[name]
