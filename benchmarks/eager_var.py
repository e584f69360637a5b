"""VAR the usual way, for comparison: eager attention with whole maps, edited in place, for one LLaVA and one prompt.

Vectorised over heads and rows, so cheaper than a loop over heads.
"""

from __future__ import annotations

from typing import Any

import torch
from reattend.recipes import recipe_class
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "eager_var"


class EagerVAR:
    """Context in which the decoder of `model` attends eagerly and VAR edits its maps. ids [1, T]; parameters as of the recipe."""

    def __init__(self, model: Any, ids: Tensor, parameters: dict[str, Any]) -> None:
        self.model, self.recipe = model, recipe_class("var")(**parameters)
        self.decoder = model.model.language_model
        self.image = ids[0] == model.config.image_token_id
        self.after = int(self.image.nonzero().max()) + 1
        self.sinks: dict[int, Tensor] = {}

    def __enter__(self) -> None:
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.decoder.set_attn_implementation(NAME)
        self.hooks = [
            layer.register_forward_pre_hook(lambda module, args, i=i: self.find(i, args[0]))
            for i, layer in enumerate(self.decoder.layers)
            if i >= self.recipe.first_layer
        ]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.decoder.set_attn_implementation("sdpa")

    def find(self, layer: int, hidden: Tensor) -> None:
        """Which prompt tokens are sinks, from the state entering a layer at prefill."""
        if hidden.shape[1] > 1:
            scale = hidden.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
            self.sinks[layer] = ((hidden.float() * scale).abs()[0, :, list(self.recipe.sink_dims)] > self.recipe.tau).any(-1)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        scores = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[2]]
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        sinks = self.sinks.get(module.layer_idx)
        if sinks is not None and bool((sinks & self.image).any()):
            weights = self.edit(weights, sinks)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def edit(self, weights: Tensor, sinks: Tensor) -> Tensor:
        start = self.after if weights.shape[2] > 1 else 0
        width = sinks.numel()
        rows = weights[:, :, start:, :width]
        image = rows[..., self.image]
        mass, visual = image.sum(-1, keepdim=True), rows[..., sinks & self.image].sum(-1, keepdim=True)
        rest = self.image & ~sinks
        chosen = (visual / (mass + self.image.sum() * 1e-6) <= self.recipe.rho) & (mass >= self.recipe.summ)
        budget = self.recipe.move * rows[..., sinks].sum(-1, keepdim=True)
        new = rows.clone()
        new[..., sinks] *= 1 - self.recipe.move
        kept = rows[..., rest]
        new[..., rest] = kept + budget * kept / kept.sum(-1, keepdim=True)
        weights[:, :, start:, :width] = torch.where(chosen, new, rows)
        return weights
