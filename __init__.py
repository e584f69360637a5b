"""reattend: make a pretrained model look somewhere else, without training.

>>> import reattend
>>> pipe = reattend.wrap(pipe)
>>> with pipe.use("emphasise", text="in French"):
...     print(pipe("Answer in French: ..."))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:  # what editors and type checkers see; nothing of it is imported at runtime before it is used
    from . import guiders as guiders
    from . import zoo
    from .analysis import analyse
    from .comparison import compare, wrap
    from .evaluation import evaluate
    from .hooks import capture, edit, rows, sites
    from .interventions import ReattendError, ReattendWarning, UnsupportedError
    from .recipes import list_recipes, load_recipe
    from .recipes.kit.named import apply, recipe  # pyright: ignore[reportMissingModuleSource]  # with a signature for each recipe

# name -> module; everything is loaded on first use, so `import reattend` imports no torch
_LAZY = {
    "apply": ".recipes",
    "sites": ".hooks",
    "capture": ".hooks",
    "edit": ".hooks",
    "rows": ".hooks",
    "wrap": ".comparison",
    "compare": ".comparison",
    "evaluate": ".evaluation",
    "analyse": ".analysis",
    "list_recipes": ".recipes",
    "recipe": ".recipes",
    "load_recipe": ".recipes",
    "ReattendError": ".interventions",
    "ReattendWarning": ".interventions",
    "UnsupportedError": ".interventions",
}

# written out, because type checkers read no dict; without `guiders`, which needs
# diffusers, as `from reattend import *` must not
__all__ = [
    "ReattendError",
    "ReattendWarning",
    "UnsupportedError",
    "__version__",
    "analyse",
    "apply",
    "capture",
    "compare",
    "edit",
    "evaluate",
    "list_recipes",
    "load_recipe",
    "recipe",
    "rows",
    "sites",
    "wrap",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in ("guiders", "zoo"):
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
