"""What a denoiser makes of a text on its way to cross-attention, and the keys and values that a site makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, ReattendError, Site

# modules of a denoiser that its text passes, in this order, before the first layer reads it
PATH = ("caption_projection", "caption_norm", "condition_embedder.text_embedder")


def reading_misfit(denoiser: nn.Module, site: Site, attention: nn.Module) -> str:
    """Why a second text cannot be brought to a cross-attention site, or ""."""
    name = type(denoiser).__name__
    if site.kind != "cross":
        return f"{site.name} of {name} is no cross-attention"
    if not all(isinstance(getattr(attention, part, None), nn.Module) for part in ("to_k", "to_v")):
        return f"{site.name} of {name} has no to_k and to_v that could make keys and values of a second text"
    kind = getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None)
    if hasattr(denoiser, "text_embedding_padding") or kind not in (None, "text_proj", "ip_image_proj"):
        return f"{name} joins its text from several inputs, and what a second one becomes there is not known"
    return ""


def text_at_sites(denoiser: nn.Module, text: Tensor) -> Tensor:
    """A text [P, T, C] as the denoiser's cross-attention reads it."""
    if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) == "text_proj":
        return denoiser.encoder_hid_proj(text)  # type: ignore[operator]
    for path in PATH:
        module: Any = denoiser
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            text = module(text)
    return text


def keys_and_values(attention: Any, text: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """key and value [P, heads, T, D] of a text [P, T, C], by the site's own projections and norms (and what was added to these)."""
    if getattr(attention, "norm_cross", None):
        text = attention.norm_encoder_hidden_states(text)
    if getattr(attention, "fused_projections", False) and hasattr(attention, "to_kv"):
        key, value = attention.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attention.to_k(text), attention.to_v(text)
    norm, dim = getattr(attention, "norm_k", None), key.shape[2] // heads
    across = norm is not None and _width(norm) not in (None, dim)
    key = norm(key) if norm is not None and across else key
    key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (key, value))
    return norm(key) if norm is not None and not across else key, value


def _width(norm: nn.Module) -> int | None:
    """How many numbers a norm takes together."""
    weight, shape = getattr(norm, "weight", None), getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    if isinstance(weight, Tensor):
        return weight.numel()
    return int(shape[-1]) if isinstance(shape, (tuple, list, torch.Size)) else None


def second_keys(call: Call, attention: nn.Module, second: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """key and value [P, H, T, D] of a second text at a call's site. second, prompt: both as cross-attention reads them.

    Raises ReattendError where the keys that the site made of the prompt are not those that `keys_and_values` makes of it.
    """
    assert call.site is not None
    heads = call.site.num_kv_heads or call.key.shape[1]
    shared = call.key.shape[1] // heads
    (mine, _), made = (keys_and_values(attention, text, heads) for text in (prompt, second))
    mine, key, value = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (mine, *made))
    own = call.key[: len(mine)]
    error = 1e-4 if own.dtype in (torch.float32, torch.float64) else 2e-2
    if mine.shape != own.shape or not torch.allclose(
        mine.float(), own.float(), rtol=error, atol=error * float(own.float().abs().amax())
    ):
        raise ReattendError(
            f"the keys that {call.site.name} makes of the prompt are not those that its projections give, so what it would make of a "
            "second text is not known"
        )
    return key, value
