"""`wrap`: a pipeline or model that is still what it was, with `use`, `compare` and `sites` on it."""

from __future__ import annotations

import copy
import types
from typing import Any

from ..hooks import Session, SiteTable, sites
from ..hooks.discovery import components, original_of
from ..interventions import ReattendError
from ..recipes import apply

METHODS = ("use", "compare", "sites")


class Wrapped:
    """What `wrap` adds. A wrapped object shares the attributes of the original one: what happens to either happens to both."""

    _reattend_original: Any

    def use(self, *recipes: Any, isolated: bool = False, **parameters: Any) -> Session:
        """Starts a session: `with pipe.use("streaming", window=512) as session: pipe(...)`. Arguments as for `reattend.apply`."""
        return apply(original_of(self), *recipes, isolated=isolated, **parameters)

    def compare(self, *recipes: Any, **options: Any) -> Any:
        """Runs without and with the recipes on the same input and seed and reports both. Arguments as for `reattend.compare`."""
        from .compare import compare

        return compare(original_of(self), *recipes, **options)

    def sites(self) -> SiteTable:
        """The attention sites of this model or pipeline."""
        return sites(original_of(self))

    def __copy__(self) -> Any:
        return wrap(copy.copy(original_of(self)))

    def __deepcopy__(self, memo: dict) -> Any:
        return wrap(copy.deepcopy(original_of(self), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return wrap, (original_of(self),)


def wrap(model: Any) -> Any:
    """The same pipeline or model with `.use(...)`, `.compare(...)` and `.sites()`; isinstance and every attribute hold.

    model: a transformers pipeline or model, a diffusers pipeline or denoiser, or any nn.Module. It is not changed, and nothing is set
    on it. Raises ReattendError for anything else, and where its class already has one of these three methods.
    """
    if isinstance(model, Wrapped):
        return model
    components(model)  # says what is wrong with an object that has no modules
    cls = type(model)
    taken = [name for name in METHODS if hasattr(cls, name)]
    if taken:
        raise ReattendError(
            f"{cls.__name__} has its own {' and '.join(taken)}: use reattend.apply(model, ...) and reattend.compare(model, ...)"
        )
    if not hasattr(model, "__dict__"):
        raise ReattendError(f"{cls.__name__} keeps no __dict__ to share: use reattend.apply(model, ...)")
    # the class belongs to this one object: it is the place where the original can be kept without touching shared attributes
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_reattend_original": model,
    }
    same = types.new_class(cls.__name__, (Wrapped, cls), {}, lambda namespace: namespace.update(names))
    wrapped = object.__new__(same)
    object.__setattr__(wrapped, "__dict__", model.__dict__)
    return wrapped
