"""transformers' attention implementations beside sdpa and eager: flash attention 2, 3 and 4, flash kernels from the Hub, flex attention.

They are called with [B, H, T, D] as all are, but with masks of their own form: flash attention is told of causality, a window, and which
columns are padding; flex attention gets a function of query and key, compressed to blocks. A call is read from these as they read it, so
that edits run on our own kernels beside the user's.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ...interventions import Call, ReattendError

# those that are given the whole mask
WITH_MASKS = ("sdpa", "eager")
FLEX = "flex_attention"
REMEDY = 'call model.set_attn_implementation("sdpa") first (on a GPU it uses flash kernels too)'
PACKED = f"several sequences are packed in one row, which cannot be edited: {REMEDY}"

# block masks, which all layers of a pass share -> the same as tensors
_dense: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
# the padding masks of a pass -> (their version, {(window, causal, rows): what they leave})
_masks: Any = WeakTensorKeyDictionary()
# position ids of a pass -> (their version, whether they begin anew inside)
_restarts: Any = WeakTensorKeyDictionary()


def is_served(name: str) -> bool:
    """Whether calls of an implementation can be edited."""
    return name in WITH_MASKS or name == FLEX or is_flash(name)


def is_flash(name: str) -> bool:
    """Whether an implementation is called as flash attention is: by its name, as transformers tells it, and by the masks it asks for."""
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    mask = AttentionMaskInterface._global_mapping.get(name)
    return "flash" in name and "|" not in name and mask is flash_attention_mask


def is_told_little(module: nn.Module) -> bool:
    """Whether a module's attention is given no whole masks, be it under its own name or under ours."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name is not None and not name.endswith(WITH_MASKS)


def packs(name: str, module: nn.Module) -> bool:
    """Whether a module packs images of different sizes in one row, of which flash attention alone is told where each begins."""
    return is_flash(name) and "cu_seqlens" in inspect.signature(type(module).forward).parameters


class Outside:
    """An object that reads as another one, but for what is set on it."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def from_outside(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an implementation, called with a module whose config names it: it looks its kernel up by that name, not by ours."""
    return function if name in WITH_MASKS else functools.partial(_from_outside, name, function)


def _from_outside(name: str, function: Callable[..., Any], module: nn.Module, *states: Any, **kwargs: Any) -> Any:
    seen: Any = Outside(module)
    config: Any = Outside(module.config)
    config._attn_implementation, seen.config = name, config
    return function(seen, *states, **kwargs)


def call_of(name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> Call:
    """The call of an implementation that is not given whole masks. Raises ReattendError for what it cannot be read from."""
    return (flex_call if name == FLEX else flash_call)(name, module, query, key, value, mask, kwargs)


def flex_call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Call:
    """The call of flex attention; mask: None, a block mask, or numbers [B, 1, Tq, Tk] that are added to the scores."""
    keys = key.shape[2]
    if mask is not None:
        mask = mask.to(query.dtype)[..., :keys] if isinstance(mask, Tensor) else _as_tensor(mask)[..., :keys]
    bias = kwargs.get("position_bias")
    if bias is not None:
        bias = bias[..., :keys]
        hidden = mask is not None and mask.dtype == torch.bool
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf")) if hidden else bias + mask
    return Call(
        query, key, value, mask, False, kwargs.get("scaling"), softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"),
        original_is_sdpa=False,
    )  # fmt: skip


def _as_tensor(block_mask: Any) -> Tensor:
    """Bool [B, 1 or H, Tq, Tk]: a block mask, its blocks unfolded."""
    if block_mask not in _dense:
        from torch.nn.attention.flex_attention import create_mask

        batch, heads = block_mask.kv_num_blocks.shape[:2]
        device = block_mask.kv_num_blocks.device
        _dense[block_mask] = create_mask(block_mask.mask_mod, batch, heads, *block_mask.seq_lengths, device=device)
    return _dense[block_mask]


def flash_call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Call:
    """The call of a flash implementation; mask: None or [B, Tk], 1 where a column is no padding.

    Raises ReattendError for sequences packed in one row, and for masks of another form.
    """
    who = f"{type(module).__name__} under {name!r}"
    if _is_packed(kwargs, mask, query):
        raise ReattendError(f"{who}: {PACKED}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ReattendError(
            f"{who}: expected a mask [batch, keys] or none, got {getattr(mask, 'shape', type(mask).__name__)}: {REMEDY}"
        )
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    query, key, value = _in_half_precision(module, query, key, value)
    if mask is not None:
        # a static cache's buffer is longer than what it holds
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
    seen = _visible(mask, kwargs.get("sliding_window"), causal, query.shape[2], key.shape[2], query.device)
    sinks = kwargs.get("s_aux")
    return Call(
        query, key, value, seen, causal, kwargs.get("scaling"), softcap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.to(query.dtype), original_is_sdpa=False,
    )  # fmt: skip


def _visible(
    mask: Tensor | None, window: int | None, causal: bool, rows: int, keys: int, device: torch.device
) -> Tensor | None:
    """Bool [B or 1, 1, Tq or 1, Tk]: what padding and a window leave; None where that is all. One tensor for all layers of a pass."""
    window = window if window is not None and keys > window else None
    if mask is None:
        return None if window is None else _near(torch.arange(keys, device=device)[None], window, causal, rows)
    if mask.is_inference():
        return _unpadded(mask, window, causal, rows)
    known = _masks.get(mask)
    if known is None or known[0] != mask._version:
        known = _masks[mask] = mask._version, {}
    if (window, causal, rows) not in known[1]:
        known[1][window, causal, rows] = _unpadded(mask, window, causal, rows)
    return known[1][window, causal, rows]


def _unpadded(mask: Tensor, window: int | None, causal: bool, rows: int) -> Tensor:
    seen = mask.ne(0)[:, None, None]
    return seen if window is None else seen & _near(mask.ne(0).cumsum(dim=1), window, causal, rows)


def _near(at: Tensor, window: int, causal: bool, rows: int) -> Tensor:
    """Bool [B, 1, Tq, Tk]: the keys less than `window` tokens from a row, before it or on both sides. at [B, Tk]: their numbers."""
    row, column = at[:, -rows:, None], at[:, None, :]
    near = column > row - window
    return (near if causal else near & (column < row + window))[:, None]


def _in_half_precision(module: nn.Module, *states: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the dtype that flash attention casts them to where they come in float32: under autocast, and with PEFT's norms."""
    if states[0].dtype != torch.float32:
        return states
    from transformers.integrations.flash_attention import get_target_dtype

    dtype = get_target_dtype(states[0], module)
    return tuple(x.to(dtype) for x in states)


def _is_packed(kwargs: dict[str, Any], mask: Any, query: Tensor) -> bool:
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        return True
    positions = kwargs.get("position_ids")
    if (
        mask is not None
        or query.shape[0] != 1
        or query.shape[2] == 1
        or not isinstance(positions, Tensor)
        or positions.dim() != 2
    ):
        return False
    # asked once a pass: all layers are given the same tensor
    version = 0 if positions.is_inference() else positions._version
    known = _restarts.get(positions)
    if known is None or known[0] != version:
        known = _restarts[positions] = version, int((positions == positions.min()).sum()) > 1
    return known[1]
