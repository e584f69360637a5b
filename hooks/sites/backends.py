"""Which attention backend of diffusers a module's calls go to, and whether calls that go there can be edited.

A call of `dispatch_attention_fn` goes to the backend of its processor (`set_attention_backend`), or to the one of the whole process
(`attention_backend(...)`, DIFFUSERS_ATTN_BACKEND) where the processor names none.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

DISPATCHER = "diffusers.models.attention_dispatch"
# these call torch's SDPA
NATIVE = {"native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn"}


def carrier_of(module: nn.Module) -> Any:
    """What a module's calls take their backend from: its processor, or itself where it has none."""
    processor = getattr(module, "processor", None)
    return module if processor is None else processor


def backend_of(carrier: Any) -> str:
    """The name of the backend that calls of a processor go to."""
    backend = getattr(carrier, "_attention_backend", None)
    if backend is None:
        dispatcher = sys.modules.get(DISPATCHER)
        backend = "native" if dispatcher is None else dispatcher._AttentionBackendRegistry._active_backend
    return str(getattr(backend, "value", backend))


def is_split(carrier: Any) -> bool:
    """Whether diffusers' context parallelism shares the tokens or heads of these calls out among processes."""
    return getattr(carrier, "_parallel_config", None) is not None


def problem_of(carrier: Any, names: frozenset[str]) -> str | None:
    """Why a processor's attention cannot be edited where it goes, None where it can. names: those of its code."""
    who = f"processor {type(carrier).__name__}"
    if is_split(carrier):
        return f"{who}: context parallelism gives each process a share of the tokens or heads: run without enable_parallelism()"
    if "FLEX" in names:
        return f"{who}: it calls flex attention, which never reaches torch's SDPA"
    if "dispatch_attention_fn" not in names:
        return None  # it calls torch's SDPA, whatever others are told
    backend = backend_of(carrier)
    if backend in NATIVE:
        return None
    default = getattr(type(carrier), "_attention_backend", None)
    if default is not None and backend == getattr(default, "value", default):
        return f"{who}: it needs the backend {backend!r}, which never reaches torch's SDPA"
    remedy = "call set_attention_backend('native') on the model, or run it inside diffusers' attention_backend('native')"
    if not hasattr(carrier, "_attention_backend"):
        return f"{who}: it has no backend of its own, so that its calls of {backend!r} cannot be told apart: {remedy}"
    if any(name.lower().endswith(("_backends", "current_attention_backend")) for name in names):
        return f"{who}: it makes its masks for the backend {backend!r}: {remedy}"
    return None
