"""reattend: make a pretrained model look somewhere else, without training.

>>> import reattend
>>> pipe = reattend.wrap(pipe)
>>> with pipe.use("emphasise", text="in French"):
...     print(pipe("Answer in French: ..."))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; everything is loaded on first use, so `import reattend` imports no torch
_LAZY = {
    "apply": ".recipes",
    "sites": ".hooks",
    "capture": ".hooks",
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

__all__ = ["__version__", "zoo", *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return importlib.import_module(".zoo", __name__)
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
