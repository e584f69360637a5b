"""Compiled models under sessions: a compiled graph has no place for hooks that come and go, and would silently run without them.

What was compiled before a session is seen when the session begins, or by the hook before the whole model, where nothing on the model shows
it. What is compiled inside one, the model or a part of it, is seen by the first hook that runs in it: `Uncompiled` then lets the rest of that
very call run as it is written. Attention needs no hooks (see `graphs`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame  # type: ignore[import-not-found]
from torch._dynamo.decorators import skip

from ...interventions import ReattendWarning
from ..trackers.in_flight import lifecycle

# who wants compiled models to run uncompiled, and torch's switch, which is one for the whole process
_users: set[int] = set()
_stance: list[Any] = []
# around: the hook that a thread is in
_thread = threading.local()


def inside(roots: Iterable[nn.Module], *, steps: bool = True) -> bool:
    """Whether one of these modules, or one inside, was compiled in one of the ways that can be seen from outside.

    steps: generate's own compilation too, which is of steps of decoding alone.
    """
    return any(_is_compiled(module, steps) for root in roots for module in root.modules())


def _is_compiled(module: nn.Module, steps: bool) -> bool:
    """torch.compile(module), module.compile(), module.forward = torch.compile(module.forward), and generate with a static cache."""
    own = vars(module)
    return (
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
        or (steps and own.get("_compiled_call") is not None)
    )


def run_uncompiled(user: Any, what: str, recipes: Iterable[str]) -> None:
    """Lets compiled models run uncompiled until `run_compiled(user)`, and says so; what: "the denoiser", "the model". recipes: whose hooks
    would not run in a graph."""
    with lifecycle:
        if id(user) in _users:
            return
        names = " and ".join(f"recipe {label!r}" for label in dict.fromkeys(recipes) if label) or "a session"
        warnings.warn(
            f"{what} is compiled, and no graph has a place for the hooks of {names}: compiled models run uncompiled until the session ends",
            ReattendWarning,
            stacklevel=2,
        )
        _users.add(id(user))
        if not _stance:
            _stance.append(torch.compiler.set_stance("force_eager"))


class Uncompiled:
    """Around a hook that torch.compile's code calls: nothing inside is compiled, nor (rest) what comes after it in that call.

    Without `rest` the hook itself may decide that (`rest_as_written`).
    """

    def __init__(self, user: Any, recipe: str, rest: bool = True) -> None:
        self.user, self.recipe, self.rest = user, recipe, rest

    def __enter__(self) -> None:
        # what turns the frames of this thread into compiled ones; None or False where nothing does
        self.compiler = set_eval_frame(None)
        if self.rest and self.compiler is not None and self.compiler is not False:
            self.compiler = None
            run_uncompiled(self.user, "the model", [self.recipe])
        elif not self.rest:
            self.outer, _thread.around = getattr(_thread, "around", None), self

    def __exit__(self, *error: Any) -> None:
        if not self.rest:
            _thread.around = self.outer
        set_eval_frame(self.compiler)


def called_compiled() -> bool:
    """Whether compiled code has called the hook that this thread is in."""
    around = getattr(_thread, "around", None)
    return around is not None and around.compiler is not None and around.compiler is not False


def rest_as_written() -> None:
    """Lets what comes after this hook in a compiled call run as it is written."""
    _thread.around.compiler = None


# no frame of its own is one to compile
skip(Uncompiled.__init__)
skip(Uncompiled.__enter__)


def run_compiled(user: Any) -> None:
    """Ends what `run_uncompiled` began; safe to call twice."""
    with lifecycle:
        _users.discard(id(user))
        while _stance and not _users:
            _stance[-1].__exit__(None, None, None)
            _stance.pop()
