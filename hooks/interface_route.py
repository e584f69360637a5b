"""The transformers route: an attention function and its mask function, registered while sessions last.

The models' configs name our function for the time of a session; it hands every call without edits to the function the model had
before, with the mask that function expects.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..interventions import Call, ReattendError, UnsupportedError, fused, reference_with_weights
from .caches import filled_columns
from .discovery import uncompiled
from .rotary import rotary_at
from .session import edits_of

if TYPE_CHECKING:
    from .attachment import Attachment
    from .session import Session

PREFIX = "reattend_"
SUPPORTED = ("sdpa", "eager")

# (module id -> attachment), for modules of all attached models; registry users counted per original implementation
_owners: dict[int, Attachment] = {}
_users: dict[str, int] = {}
_lock = threading.RLock()


class InterfaceRoute:
    """Switches the configs of one attached model to our attention function, and back."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.switched: list[tuple[Any, str]] = []

    def install(self, session: Session) -> None:
        """Switches the configs of the sites that this session edits. Raises UnsupportedError for kernels that cannot be edited."""
        modules = [
            (site, step.sites.module(site))
            for _, step in session.act_steps()
            for site in step.sites
            if site.route == "attention_interface"
        ]
        todo: list[tuple[Any, str]] = []
        for site, module in modules:
            config: Any = module.config
            name: str = config._attn_implementation or "eager"
            if name.startswith(PREFIX):
                continue
            if name not in SUPPORTED:
                raise UnsupportedError(
                    f"{site.name} runs attention implementation {name!r}, which returns no statistics to edit: call "
                    f'model.set_attn_implementation("sdpa") first (on a GPU it uses flash kernels too)'
                )
            if all(config is not other for other, _ in todo):
                todo.append((config, name))
        with _lock:
            for _, module in modules:
                _owners[id(module)] = self.attachment
            for config, name in todo:
                _register(name)
                config._attn_implementation_internal = PREFIX + name
                self.switched.append((config, name))

    def uninstall(self) -> None:
        with _lock:
            for config, name in self.switched:
                if config._attn_implementation_internal == PREFIX + name:
                    config._attn_implementation_internal = name
            for key in [k for k, owner in _owners.items() if owner is self.attachment]:
                del _owners[key]
            names = [name for _, name in self.switched]
            self.switched = []
            # a pass that is still under way in another thread may look our name up once more: the last one clears it
            self.attachment.tracker.when_idle(functools.partial(_release, names))


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    _users[name] = _users.get(name, 0) + 1
    if _users[name] == 1:
        AttentionInterface.register(PREFIX + name, functools.partial(_attention, name))
        AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface._global_mapping[name])


def _release(names: list[str]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    with _lock:
        for name in names:
            _users[name] -= 1
            if _users[name] == 0:
                AttentionInterface._global_mapping.pop(PREFIX + name, None)
                AttentionMaskInterface._global_mapping.pop(PREFIX + name, None)


def _attention(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Stands in for implementation `name`: edits the call if a session asks for it, and delegates otherwise."""
    owner = _owners.get(id(module))
    if owner is not None:
        result = _steered(owner, name, module, query, key, value, attention_mask, kwargs)
        if result is not None:
            return result
    return _original(name, module)(module, query, key, value, attention_mask, **kwargs)


@functools.lru_cache(maxsize=4096)
def _lookup(name: str, cls: type) -> Any:
    """The function that `cls` would have called: from the interface object its own file uses, or its own eager function."""
    home = sys.modules[_forward_of(cls).__module__]
    interface = getattr(home, "ALL_ATTENTION_FUNCTIONS", None)
    if interface is not None and name in interface:
        return interface[name]
    if name == "eager":
        names = _forward_of(cls).__code__.co_names
        for candidate in [n for n in names if n.endswith("eager_attention_forward")]:
            return getattr(home, candidate)
    raise UnsupportedError(f"{cls.__name__} has no attention function for implementation {name!r}")


def _forward_of(cls: type) -> Any:
    import inspect

    return inspect.unwrap(cls.forward)  # type: ignore[attr-defined]


def _original(name: str, module: nn.Module) -> Any:
    return _lookup(name, type(module))  # type: ignore[arg-type]


def _edited(
    owner: Attachment,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None] | None:
    sessions = [s for s in owner.active() if s.acts_at(module)]
    if not sessions:
        return None
    site = owner.site_of[id(module)]
    if kwargs.get("cache") is not None:
        raise ReattendError(
            f"{site.name}: paged caches (continuous batching) are not supported; use generate() with an ordinary cache"
        )
    if module.training and kwargs.get("dropout", 0.0):
        raise ReattendError(f"{site.name}: attention dropout is on; call model.eval() before using a recipe")
    forward = owner.tracker.current()
    tokens = forward.tokens_at(site)
    if site.stack not in ("decoder", "encoder") or site.kind != "self":
        tokens = None
    original = _original(name, module)

    def run() -> Tensor:
        return original(module, query, key, value, mask, **kwargs)[0].transpose(1, 2)

    filled = key.shape[2]
    if site.stack == "decoder" and site.kind == "self":
        filled = filled_columns(query, key, mask, tokens, forward.buffered)
    call = _call(name, module, query, key, value, mask, kwargs, filled)
    call.site, call.clock, call.tokens, call.original = site, forward.clock, tokens, run
    call.rotation = functools.partial(rotary_at, owner, site, module, kwargs)
    edits = edits_of(sessions, module, call, forward)
    if not edits:
        return None
    config = getattr(module, "config", None)
    if name == "eager" and (kwargs.get("output_attentions") or getattr(config, "output_attentions", False)):
        output, weights = reference_with_weights(call, edits)
        weights = torch.nn.functional.pad(weights, (0, key.shape[2] - call.num_keys))
        return output.transpose(1, 2).contiguous(), weights.to(query.dtype)
    return fused(call, edits).transpose(1, 2).contiguous(), None


_steered = uncompiled(_edited)


def _call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any], filled: int
) -> Call:
    """The call as tensors, with the causality that implementation `name` would have applied. filled: key columns that hold tokens."""
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and name == "sdpa" and mask is None and query.shape[2] > 1
    if is_causal and key.shape[2] > query.shape[2]:
        # prefill into an empty static cache: only its first columns are filled
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if mask is not None and mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    bias = kwargs.get("position_bias")
    if bias is not None:
        if mask is None:
            if is_causal:
                hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril().logical_not()
                mask, is_causal = bias[..., : key.shape[2]].masked_fill(hidden, float("-inf")), False
            else:
                mask = bias
        else:
            mask = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
    call = Call(
        query, key, value, mask, is_causal, kwargs.get("scaling"),
        softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"), original_is_sdpa=name == "sdpa",
    )  # fmt: skip
    call.keep_columns(filled)
    return call
