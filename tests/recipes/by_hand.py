"""Whole matrices in the place of a model's attention, to be changed by hand: what naive implementations of methods stand on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reattend.hooks import sites
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


@contextlib.contextmanager
def attention_by_hand(
    model: Any,
    scores: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    weights: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Inside, layers of the decoder hand out what these two make of their matrices.

    scores(layer, scores [B, H, Tq, Tk], visible [B, 1, Tq, Tk]): not masked yet; weights(layer, weights [B, H, Tq, Tk]).
    """
    decoder = sites(model).stack("decoder")
    layers = {id(decoder.module(site)): site.layer for site in decoder}

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        times, layer = query.shape[1] // key.shape[1], layers.get(id(module))
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        found = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        visible = torch.ones(found.shape[2:], dtype=torch.bool)[None, None]
        if attention_mask is None and causal and query.shape[2] > 1:
            visible = visible.tril()
        elif attention_mask is not None and attention_mask.dtype != torch.bool:
            found = found + attention_mask  # Pixtral's vision tower
        elif attention_mask is not None:
            visible = attention_mask[..., : key.shape[2]]
        if scores is not None and layer is not None:
            found = scores(layer, found, visible)
        found = found.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()
        if weights is not None and layer is not None:
            found = weights(layer, found)
        return (found @ value).transpose(1, 2), found

    before = model.config._attn_implementation
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    AttentionInterface.register("by_hand", attention)
    try:
        model.set_attn_implementation("by_hand")
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("by_hand", None)
        AttentionMaskInterface._global_mapping.pop("by_hand", None)
