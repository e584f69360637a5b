"""Forward hooks that come and go beside running passes, and that no copy and no file of a model takes along.

Every hook of ours on a module of the user's is put on here, and every `forward` of a module is replaced here.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch._dynamo.decorators import skip
from torch.utils.hooks import RemovableHandle

from .routes.compiled import Uncompiled, run_compiled


class Hook:
    """One forward hook: before the module runs, or after it (also after an error). It is on the module once it is made.

    kwargs: a hook before the module gets its keyword arguments too: function(module, args, kwargs); after: function(module, args, output).
    first: after the module, before the hooks that are there, so that all of them see what it returns. compiled: what comes after it in a
    compiled call may go on compiled. recipe: whose hook it is.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        after: bool = False,
        kwargs: bool = False,
        first: bool = False,
        compiled: bool = False,
        recipe: str = "",
    ) -> None:
        self.module, self.function, self.after, self.compiled, self.recipe = module, function, after, compiled, recipe
        self.expected = 3 if after or kwargs else 2
        self.handle: RemovableHandle | None = None
        if after:
            self.handle = module.register_forward_hook(self, always_call=True, prepend=first)
        else:
            self.handle = module.register_forward_pre_hook(self, with_kwargs=kwargs)

    def __call__(self, *given: Any) -> Any:
        with Uncompiled(self, self.recipe, rest=not self.compiled):
            # torch looks up by its number how a hook is called: one that was taken away a moment ago gets no keyword arguments
            return self.function(*given) if len(given) == self.expected else None

    def remove(self) -> None:
        """Takes the hook away; safe to call twice, and after an interrupt inside."""
        hooks = self.module._forward_hooks if self.after else self.module._forward_pre_hooks
        extra = (
            [self.module._forward_hooks_with_kwargs, self.module._forward_hooks_always_called]
            if self.after
            else [self.module._forward_pre_hooks_with_kwargs]
        )
        for number in [number for number, hook in list(hooks.items()) if hook is self]:
            for other in extra:
                other.pop(number, None)
            hooks.pop(number, None)
        run_compiled(self)

    def __reduce__(self) -> Any:
        # A copy and a pickle hold, in the place of the hook, something that does nothing and is gone once the copy is complete: what
        # takes it away waits for the death of an object that lives as long as the copying (in its memo). Read without this package.
        nothing = contextlib.nullcontext().__exit__
        return itemgetter(0), ((nothing, _AtTheEnd(self.handle)),)


class _AtTheEnd:
    """Becomes, in a copy, a finalizer that calls handle.remove() when the copying is over."""

    def __init__(self, handle: RemovableHandle | None) -> None:
        self.handle = handle

    def __reduce__(self) -> Any:
        return weakref.finalize, (OrderedDict(), RemovableHandle.remove, self.handle)


class PromptHook(Hook):
    """A hook that has nothing to do in a step of decoding. Under one no other pass runs compiled: graphs leave it out."""

    def __call__(self, *given: Any) -> Any:
        return None if torch.compiler.is_dynamo_compiling() else super().__call__(*given)


# A compiled graph ends before a hook: what comes after it is decided there. The compiler is not asked again at every call, as it is
# after `torch.compiler.disable`.
skip(Hook.__call__)


class Replaced:
    """A module's `forward`, replaced on the instance: function(forward before, args, kwargs) -> output. It is there once it is made."""

    after = True

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function
        # what the instance had of its own: another library's hooks, as a rule nothing
        self.own = vars(module).get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.own if self.own is not None else functools.partial(type(self.module).forward, self.module)
        return self.function(before, args, kwargs)

    def remove(self) -> None:
        """Puts back what was there; safe to call twice. Where somebody has replaced it again in the meantime, ours only passes on."""
        if vars(self.module).get("forward") is not self:
            self.function = _pass_on
        elif self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own

    def __reduce__(self) -> Any:
        # a copy and a pickle hold the class's own forward instead, and that only until the copy is complete (see `Hook`)
        if self.own is not None:
            return itemgetter(0), ((self.own,),)
        return itemgetter(0), ((types.MethodType(type(self.module).forward, self.module), _Forgotten(self.module)),)


# what it calls may be compiled, it may not
skip(Replaced.__call__)


def _pass_on(before: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return before(*args, **kwargs)


class _Forgotten:
    """Becomes, in a copy, a finalizer that deletes the copied module's own `forward` when the copying is over."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __reduce__(self) -> Any:
        return weakref.finalize, (OrderedDict(), delattr, self.module, "forward")


class Hooks:
    """Hooks that are taken away together. recipe: whose they are; "" where they are of all sessions."""

    def __init__(self, recipe: str = "") -> None:
        self.recipe = recipe
        self.all: list[Hook | Replaced] = []

    def around(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """function(forward before, args, kwargs) -> output, in the place of the module's forward."""
        one = Replaced.__new__(Replaced)
        one.module, one.own = module, vars(module).get("forward")
        self.all.append(one)
        one.__init__(module, function)

    def before(self, module: nn.Module, function: Callable[..., Any], *, kwargs: bool = False, compiled: bool = False) -> None:
        """function(module, args) or function(module, args, kwargs)."""
        self._add(module, function, after=False, kwargs=kwargs, compiled=compiled)

    def after(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        first: bool = False,
        compiled: bool = False,
        prompts: bool = False,
    ) -> None:
        """function(module, args, output); after an error that is no BaseException too, with output None. first: before other hooks.
        prompts: it has nothing to do in a step of decoding."""
        self._add(module, function, PromptHook if prompts else Hook, after=True, first=first, compiled=compiled or prompts)

    @property
    def prompts_alone(self) -> bool:
        """Whether none of them has anything to do in a step of decoding."""
        return all(isinstance(hook, PromptHook) for hook in self.all)

    def _add(
        self, module: nn.Module, function: Callable[..., Any], kind: type[Hook] = Hook, *, after: bool, **options: bool
    ) -> None:
        # noted before it is put on: an interrupt in between must not lose it
        hook = kind.__new__(kind)
        hook.module, hook.after = module, after
        self.all.append(hook)
        hook.__init__(module, function, after=after, recipe=self.recipe, **options)

    def __bool__(self) -> bool:
        return bool(self.all)

    def remove(self) -> None:
        while self.all:
            self.all[-1].remove()
            self.all.pop()
