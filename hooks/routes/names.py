"""The name of our attention function: in a model's config while sessions last, and in transformers' registries."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

from torch._dynamo import utils, variables

from ...interventions import ReattendError, Site, UnsupportedError
from .implementations import REMEDY, is_served

PREFIX = "reattend_"
OURS = re.compile(rf"^{PREFIX}\d+_")
NO_PAGES = "paged caches (continuous batching) are not supported; use generate() with an ordinary cache"

CONTINUOUS_BATCHING = "transformers.generation.continuous_batching"


class Name(str):
    """The name of our attention function for implementation `original`, as it stands in a config; a copy or a pickle names the original.

    plan: the number of the plan that is in it (see `graphs`). It compares and hashes as any str does, so that compilers can trace it.
    """

    original: str
    plan: str

    def __new__(cls, original: str, plan: str) -> Name:
        self = super().__new__(cls, f"{PREFIX}{plan}_{original}")
        self.original, self.plan = original, plan
        return self

    def __deepcopy__(self, memo: Any) -> str:
        return self.original

    def __reduce__(self) -> Any:
        return str, (self.original,)

    def __format__(self, spec: str) -> str:
        # continuous batching puts our name into a message when it refuses it, in words that do not help
        if sys._getframe(1).f_globals.get("__name__", "").startswith(CONTINUOUS_BATCHING):
            raise ReattendError(NO_PAGES)
        return str.__format__(self, spec)


# Compilers of torch before 2.13 or so trace no class of strings, but take any class in this table for one of constants. They find a
# constant in a dict by keys of its own class; newer ones take a key that is the very object in a config for that, and miss its changes.
_IS_A_CONSTANT = not hasattr(variables, "UserDefinedConstantVariable")
if _IS_A_CONSTANT:
    utils.common_constant_types.add(Name)


def plain(name: str) -> str:
    """The implementation that a name of ours stands for, be it a copy as a plain str; any other name as it is."""
    return OURS.sub("", str(name))


class Switched:
    """A config that names our function. users: the routes of the models whose sessions need it; several models may share one config."""

    def __init__(self, config: Any, original: str) -> None:
        self.config, self.original = config, original
        # as it stands in the config; None before it does
        self.name: Name | None = None
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
    if entry is not None and isinstance(name, Name):
        return entry.original
    return _supported(site, plain(name))


def _supported(site: Site, name: str) -> str:
    if not is_served(name):
        raise UnsupportedError(f"{site.name} runs attention implementation {name!r}, whose calls cannot be edited: {REMEDY}")
    return name


def register(name: Name, user: Any, function: Callable[..., Any]) -> None:
    """Puts function(original, plan, module, query, ...) into transformers' registries under a name of ours, until `release(user)`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    users = _names.setdefault(str(name), [])
    if user not in users:
        users.append(user)
    if name not in AttentionInterface._global_mapping:
        key = name if _IS_A_CONSTANT else str(name)
        AttentionMaskInterface.register(key, AttentionMaskInterface._global_mapping[name.original])
        AttentionInterface.register(key, functools.partial(function, name.original, name.plan))


def release(user: Any) -> None:
    """Takes out the names that nobody else needs; safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, users in list(_names.items()):
        _names[name] = [other for other in users if other is not user]
        if not _names[name]:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
            del _names[name]
