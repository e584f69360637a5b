"""The route for modules that call torch's SDPA themselves: diffusers' processors, timm, remote code.

Forward hooks mark the module; while its forward runs, a `TorchFunctionMode` sees `F.scaled_dot_product_attention` with q, k, v
after projection, norm and RoPE. The function itself is never replaced, and the mode is on only inside marked modules. Where a processor of
diffusers' has another backend, which never comes to SDPA, its calls are seen beside: see `dispatch`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...interventions import Call, ReattendError, Site
from ..host import Host
from ..passes import Forward
from ..sites.backends import carrier_of
from ..steering import Acting, acting_at, edited
from ..tokens.denoisers import DenoiserForward, locate
from ..trackers.caches import filled_columns
from ..trackers.in_flight import module_call, on_stack
from .dispatch import Backend, Loan, call_of, close, give_back, lend, take_back
from .marking import Marked, MarkingRoute, check_bypassed

_local = threading.local()


class _Marked(Marked):
    def put_on(self) -> None:
        self.hooks.after(self.module, self._unmark)
        self.hooks.before(self.module, self._mark)

    def take_off(self) -> None:
        super().take_off()
        take_back(carrier_of(self.module))

    def _mark(self, module: nn.Module, args: tuple) -> None:
        acting = acting_at(self.owners, module)
        if acting:
            mode = _Interception(module, acting)
            mode.loan = lend(carrier_of(module), mode.dispatched)
            _marks().append(mode)
            mode.__enter__()

    def _unmark(self, module: nn.Module, args: tuple, output: Any) -> None:
        marks = _marks()
        if not marks or marks[-1].module is not module:
            return
        mode = marks.pop()
        mode.leave()
        if output is not None and not mode.calls:
            check_bypassed(mode)


class SdpaRoute(MarkingRoute):
    name = "sdpa"
    mark = _Marked
    marked: ClassVar[dict[int, Marked]] = {}

    def uninstall(self) -> None:
        clear_marks()
        super().uninstall()
        if not self.marked:
            close()


def _marks() -> list[_Interception]:
    if not hasattr(_local, "marks"):
        _local.marks = []
    return _local.marks


def clear_marks() -> None:
    """Leaves every mode that an interrupt (which runs no forward hooks) left behind in this thread."""
    marks = _marks()
    while marks and marks[-1].left_behind():
        marks.pop().leave()


class _Interception(TorchFunctionMode):
    def __init__(self, module: nn.Module, acting: Acting) -> None:
        super().__init__()
        self.module, self.acting = module, acting
        self.calls = 0
        self.frame = module_call()
        self.loan: Loan | None = None
        # inside a call that is seen already: what calls SDPA there is our engine, or the user's own backend
        self.within = False

    def leave(self) -> None:
        self.__exit__(None, None, None)
        if self.loan is not None:
            give_back(self.loan)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.within or self.left_behind():
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def left_behind(self) -> bool:
        """True when the module's forward was interrupted (KeyboardInterrupt runs no hooks): what runs now is somebody else's."""
        if self.frame is None or torch.compiler.is_compiling():
            return False
        return not on_stack(self.frame, sys._getframe(1))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        def run() -> Tensor:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )

        def call(site: Site) -> Call:
            mask, causal = attn_mask, is_causal
            if query.dim() != 4:
                raise ReattendError(
                    f"{site.name}: expected attention over [batch, heads, tokens, dim], got {tuple(query.shape)}"
                )
            if mask is not None and mask.dim() < 4:
                mask = mask[(None,) * (4 - mask.dim())]
            if causal and query.shape[2] != key.shape[2]:
                # torch aligns its flag with the first key, a Call with the last one
                hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
                mask, causal = hidden[None, None], False
            return Call(query, key, value, mask, causal, scale, site=site, original=run)

        output = self._edited(call, dropout_p)
        return run() if output is None else output

    def dispatched(self, backend: Backend, arguments: dict[str, Any]) -> Tensor:
        """A call of diffusers' dispatch_attention_fn that goes to one of the user's backends."""
        if self.within or self.left_behind():
            return backend.run(arguments)
        self.within = True
        try:
            output = self._edited(functools.partial(call_of, backend, arguments), arguments.get("dropout_p", 0.0))
            return backend.run(arguments) if output is None else output.transpose(1, 2)
        finally:
            self.within = False

    def _edited(self, make: Callable[[Site], Call], dropout: float) -> Tensor | None:
        """What the sessions make of the call that make(site) gives, [B, H, T, D]; None where they leave it as it is."""
        acting, number = self.acting, self.calls
        self.calls += 1
        site = acting[0][0].site
        if dropout and self.module.training:
            raise ReattendError(f"{site.name}: attention dropout is on; call eval() on the model before using a recipe")

        def located(call: Call, site: Site, owner: Host) -> Forward:
            forward = owner.current()
            if isinstance(forward, DenoiserForward):
                locate(call, forward, number, self.module)
            else:
                forward.locate(call, site)
            if forward.merged:
                forward.locate_merged(call, site)
            if site.stack == "decoder" and site.kind == "self":
                call.keep_columns(filled_columns(call.query, call.key, call.mask, call.tokens, forward.buffered))
            return forward

        found = edited(acting, make(site), located)
        return None if found is None else found[2]
