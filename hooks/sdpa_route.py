"""The route for modules that call torch's SDPA themselves: diffusers' processors, timm, remote code.

Forward hooks mark the module; while its forward runs, a `TorchFunctionMode` sees `F.scaled_dot_product_attention` with q, k, v
after projection, norm and RoPE. The function itself is never replaced, and the mode is on only inside marked modules.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..interventions import Call, ReattendError, fused
from .caches import filled_columns
from .denoiser_tokens import locate
from .discovery import uncompiled
from .session import edits_of

if TYPE_CHECKING:
    from .attachment import Attachment
    from .session import Session

_local = threading.local()


class SdpaRoute:
    """Marks the modules that sessions edit."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.handles: dict[int, list[Any]] = {}

    def install(self, session: Session) -> None:
        for _, step in session.act_steps():
            for site in step.sites:
                module = step.sites.module(site)
                if site.route == "sdpa" and id(module) not in self.handles:
                    self.handles[id(module)] = [
                        module.register_forward_pre_hook(uncompiled(self._mark), with_kwargs=True),
                        module.register_forward_hook(uncompiled(self._unmark), with_kwargs=True, always_call=True),
                    ]

    def uninstall(self) -> None:
        clear_marks()
        for pair in self.handles.values():
            for handle in pair:
                handle.remove()
        self.handles = {}

    def _mark(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        sessions = [s for s in self.attachment.active() if s.acts_at(module)]
        mode = _Interception(self.attachment, module, sessions) if sessions else None
        _marks().append(mode)
        if mode is not None:
            mode.__enter__()

    def _unmark(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        marks = _marks()
        mode = marks.pop() if marks else None
        if mode is not None:
            mode.__exit__(None, None, None)


def _marks() -> list[_Interception | None]:
    if not hasattr(_local, "marks"):
        _local.marks = []
    return _local.marks


def clear_marks() -> None:
    """Leaves every mode that an interrupt (which runs no forward hooks) left behind in this thread."""
    marks = _marks()
    while marks:
        mode = marks.pop()
        if mode is not None:
            mode.__exit__(None, None, None)


def _module_call() -> FrameType | None:
    """The frame of the module call that runs the hooks: on the stack exactly as long as the module's forward is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != nn.modules.module.__file__:
        frame = frame.f_back
    return frame


class _Interception(TorchFunctionMode):
    def __init__(self, attachment: Attachment, module: nn.Module, sessions: list[Session]) -> None:
        super().__init__()
        self.attachment, self.module, self.sessions = attachment, module, sessions
        self.calls = 0
        self.frame = _module_call()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self._left_behind():
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _left_behind(self) -> bool:
        """True when the module's forward was interrupted (KeyboardInterrupt runs no hooks): what runs now is somebody else's."""
        if self.frame is None or torch.compiler.is_compiling():
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None

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

        attachment = self.attachment
        site = attachment.site_of[id(self.module)]
        if dropout_p and self.module.training:
            raise ReattendError(f"{site.name}: attention dropout is on; call eval() on the model before using a recipe")
        if query.dim() != 4:
            raise ReattendError(f"{site.name}: expected attention over [batch, heads, tokens, dim], got {tuple(query.shape)}")
        mask = attn_mask
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        if is_causal and query.shape[2] != key.shape[2]:
            # torch aligns its flag with the first key, a Call with the last one
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            mask, is_causal_here = causal[None, None], False
        else:
            is_causal_here = is_causal
        forward = attachment.denoiser.current() or attachment.tracker.current()
        call = Call(query, key, value, mask, is_causal_here, scale, site=site, clock=forward.clock, original=run)
        locate(call, forward, self.calls)
        self.calls += 1
        if site.stack == "decoder" and site.kind == "self":
            call.keep_columns(filled_columns(query, key, mask, call.tokens, forward.buffered))
        edits = edits_of(self.sessions, self.module, call, forward)
        return fused(call, edits) if edits else run()
