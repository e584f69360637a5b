"""The token maps of one pass of an encoder: class token, registers and patches of images, texts of a text half, a mask decoder's tokens.

Roles of an image encoder are "cls", "distillation", "register" and "patch" (and "padding" in windows that reach over the border); of a
text half "bos", "eos" and "padding"; of SAM's mask decoder "iou", "mask" and "point" on one side and "patch" on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, Site, TokenGrid, TokenMap
from ..sites.encoders import ENCODERS, model_type, prefix_of
from .merging import MergedTokens
from .roles import padding_of

Maps = tuple["TokenMap | None", "TokenMap | None"]


@dataclass(eq=False)
class EncoderPass:
    """One pass of an encoder. batch: images, texts, or sets of points. grid: (rows, cols) of an image's patches, None where not known.

    prefix: roles of the tokens before the patches. outputs: tokens of a mask decoder's own before the points. text: the map of a text half.
    """

    stack: str
    name: str
    batch: int = 0
    grid: tuple[int, int] | None = None
    prefix: list[str] = field(default_factory=list)
    pictures: bool = False
    outputs: int = 0
    text: TokenMap | None = None
    maps: dict[Any, Maps] = field(default_factory=dict)
    # what its layers run on after a merge, and the last states of all tokens that were given back, and the short ones that they came from
    merged: MergedTokens | None = None
    given_back: tuple[Tensor | None, Tensor | None] = (None, None)

    def maps_at(self, site: Site, call: Call) -> Maps:
        """(map of the keys, map of the queries where these are other tokens)."""
        if self.merged is not None and call.num_keys == self.merged.tokens.length:
            tokens = self.merged.tokens
            return tokens, None if site.kind == "self" else TokenMap(call.batch, call.num_queries, call.num_queries)
        key = (
            site.stack,
            site.kind,
            "image_to_token" in site.name,
            call.batch,
            call.num_queries,
            call.num_keys,
            call.query.device,
        )
        if key not in self.maps:
            self.maps[key] = self._maps(site, call)
        return self.maps[key]

    def _maps(self, site: Site, call: Call) -> Maps:
        batch, device = call.batch, call.query.device
        if self.stack == "text_encoder":
            own = self.text is not None and (batch, call.num_keys) == (self.text.batch, self.text.length)
            return (self.text if own else self._unknown(site, batch, call.num_keys)), None
        if self.stack == "mask_decoder":
            tokens, image = self._points, self._patches
            if site.kind == "self":
                return tokens(site, batch, call.num_keys, device), None
            keys, queries = (tokens, image) if "image_to_token" in site.name else (image, tokens)
            return keys(site, batch, call.num_keys, device), queries(site, batch, call.num_queries, device)
        if site.kind == "cross":  # a pooling head: learned rows that read the patches
            return self._patches(site, batch, call.num_keys, device), TokenMap(batch, call.num_queries, call.num_queries)
        return self._patches(site, batch, call.num_keys, device), None

    def _unknown(self, site: Site, batch: int, length: int) -> TokenMap:
        return TokenMap(
            batch, length, length, unknown=f"{site.name} attends over {length} tokens, of which it is not known what they are"
        )

    def _patches(self, site: Site, batch: int, length: int, device: torch.device) -> TokenMap:
        rows, cols = self.grid or (0, 0)
        first = len(self.prefix)
        if batch == self.batch and length == first + rows * cols:
            roles = {role: torch.tensor([own == role for own in self.prefix]) for role in dict.fromkeys(self.prefix)}
            roles = {role: torch.nn.functional.pad(marked, (0, rows * cols)) for role, marked in roles.items()}
            roles["patch"] = torch.arange(length) >= first
            index = torch.arange(first, length, device=device).view(rows, cols)
            marks = {role: marked.to(device).expand(batch, -1) for role, marked in roles.items()}
            return TokenMap(batch, length, length, marks, [TokenGrid.of_image(row, index, "patch") for row in range(batch)])
        side = math.isqrt(length)
        high, wide = (-(-size // side) if side else 0 for size in (rows, cols))
        if not self.pictures or side * side != length or batch != self.batch * high * wide:
            return self._unknown(site, batch, length)
        # windows of all images, row by row, the last ones filled up
        patch = torch.zeros(batch, side, side, dtype=torch.bool)
        index = torch.arange(length, device=device).view(side, side)
        grids = []
        for number in range(batch):
            down, across = divmod(number % (high * wide), wide)
            real = index[: min(side, rows - down * side), : min(side, cols - across * side)]
            patch[number, : real.shape[0], : real.shape[1]] = True
            grids.append(TokenGrid.of_image(number, real, "patch"))
        marked = patch.flatten(1).to(device)
        return TokenMap(batch, length, length, {"patch": marked, "padding": ~marked}, grids)

    def _points(self, site: Site, batch: int, length: int, device: torch.device) -> TokenMap:
        known, places = self.outputs, torch.arange(length, device=device).expand(batch, -1)
        if length < known:
            return self._unknown(site, batch, length)
        return TokenMap(
            batch, length, length, {"iou": places == 0, "mask": (places > 0) & (places < known), "point": places >= known}
        )


def read_pass(stack: str, module: nn.Module, given: Mapping[str, Any]) -> EncoderPass:
    """What the arguments of an encoder's forward, by name, tell about its tokens."""
    name = type(module).__name__
    if stack == "text_encoder":
        return EncoderPass(stack, name, text=_text(module, given))
    if stack == "mask_decoder":
        image, points = given.get("image_embeddings"), given.get("sparse_prompt_embeddings")
        sets = points.shape[1] if isinstance(points, Tensor) else 1
        count = module.num_mask_tokens
        if not isinstance(image, Tensor) or image.dim() != 4 or not isinstance(count, int):
            return EncoderPass(stack, name)
        return EncoderPass(stack, name, image.shape[0] * sets, (image.shape[2], image.shape[3]), outputs=1 + count)
    pixels, patch = given.get("pixel_values"), getattr(module.config, "patch_size", None)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not patch:
        return EncoderPass(stack, name)
    high, wide = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    grid = pixels.shape[2] // high, pixels.shape[3] // wide
    return EncoderPass(stack, name, pixels.shape[0], grid, prefix_of(module.config), ENCODERS[model_type(module)].pictures)


def _text(module: nn.Module, given: Mapping[str, Any]) -> TokenMap | None:
    """Roles of texts: the end is the first end token, or the highest id where the config says 2, as CLIP reads it; after it is padding."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    batch, length = ids.shape
    end = getattr(module.config, "eos_token_id", None)
    is_end = (
        ids == ids.max(dim=1, keepdim=True).values
        if end == 2
        else ids == end
        if isinstance(end, int)
        else torch.zeros_like(ids).bool()
    )
    first = is_end & (is_end.cumsum(dim=1) == 1)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padding = padding_of(mask, batch, length).to(ids.device)
    else:
        padding = (first.cumsum(dim=1) > 0) & ~first
    real = ~padding
    roles = {"padding": padding, "bos": real & (real.cumsum(dim=1) == 1)}
    if bool(first.any()):
        roles["eos"] = first
    return TokenMap(batch, length, length, roles)
