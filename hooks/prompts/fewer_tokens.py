"""Images of which fewer tokens are to reach the decoder: what stands for no token any more leaves, in every pass of the sequence.

The encoder itself goes on to give as many features as it is used to, so that whoever calls it counts right; which of them are to stay is
known by its output. What does not stay is taken out before the model's own pass: features, placeholders, mask, positions. The caller
(`generate`, a loop) goes on to count as before: its masks are those of the longer prompt, and are cut in every further pass.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...interventions import ReattendError, Site, UnsupportedError
from ...interventions.families.merging import taken
from ..actions import RootCall
from ..tokens.merging import MergedTokens
from ..trackers.caches import cache_in, cache_length, cache_of, has_buffers
from .text_only import PER_TOKEN

# Vision-language models that read one list of features per image, of any length, at positions that follow from the mask.
FAMILIES = ("llava",)
WHOLE = "with restore=True all tokens are given back"


def fewer_misfit(root: Any, sites: Sequence[Site]) -> str:
    """Why the decoder of this model cannot be given fewer tokens of an image than it is used to; "" where it can."""
    config, name = root.config, type(root).__name__
    if getattr(config, "model_type", "") not in FAMILIES:
        return f"the decoder of {name} cannot be given fewer tokens of an image (it can in models of type {', '.join(FAMILIES)}): {WHOLE}"
    if "mm_encoder_outputs" not in inspect.signature(type(root).forward).parameters:
        return f"{name} of this version of transformers takes no features of images: {WHOLE}"
    depth, read = config.vision_config.num_hidden_layers, config.vision_feature_layer
    first = min(layer if layer >= 0 else depth + 1 + layer for layer in (read if isinstance(read, (list, tuple)) else [read]))
    late = [site.layer for site in sites if site.layer >= first]
    if late:
        return f"the decoder of {name} reads what layer {first - 1} of its encoder gives: merge tokens there or before, not in layer {late[0]}"
    return ""


def reads_images(root: Any) -> bool:
    """Whether a model reads images in its prompts."""
    return getattr(getattr(root, "config", None), "image_token_id", None) is not None


def dense_misfit(model: Any, root: Any, sites: Sequence[Site]) -> str:
    """Why fewer tokens would not do for what reads this model's encoder; "" where they do."""
    if reads_images(root):
        return fewer_misfit(root, sites)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        name = type(module).__name__
        if hasattr(type(module), "forward_with_filtered_kwargs") or name.endswith(("Backbone", "ForMaskedImageModeling")):
            return f"{name} lays the tokens of its layers out as pictures: {WHOLE}"
    return ""


@dataclass(eq=False)
class Cut:
    """keep [B, n'] long: which columns of the caller's prompt are still there, -1 for padding. length: of that prompt."""

    keep: Tensor
    length: int

    def of(self, mask: Tensor) -> Tensor:
        """A mask [B, length + more] of the caller's as the model's, [B, n' + more]."""
        own = taken(mask, self.keep.clamp_min(0)).masked_fill((self.keep < 0).to(mask.device), 0)
        return torch.cat([own, mask[:, self.length :]], dim=1)


class FewerTokens:
    """What one step does with a model's prompts: hooks for its encoder (`encoded`) and actions for its root (`before`, `facts`, `after`)."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.by_output: Any = WeakIdKeyDictionary()
        self.by_cache: weakref.WeakKeyDictionary[Any, Cut] = weakref.WeakKeyDictionary()
        # whether features have been made in this thread that no prompt has followed yet
        self.local = threading.local()

    def encoded(self, output: Any, merged: MergedTokens | None) -> None:
        """The encoder has run; merged: its tokens at the end, where some were merged."""
        if merged is not None and output is not None:
            self.by_output[output] = merged
            self.local.waiting = True

    def before(self, call: RootCall) -> None:
        given = {**dict(zip(call.names, call.args, strict=False)), **call.kwargs}
        ids, cache = given.get("input_ids"), cache_in(given)
        past = 0 if cache is None else cache_length(cache)
        known = self.by_cache.get(cache) if past else None
        if known is not None:
            self._go_on(call, given, known, past)
            return
        if given.get("pixel_values") is not None and given.get("mm_encoder_outputs") is None:
            given = self._with_features(given)
        outputs = (given.get("mm_encoder_outputs") or {}).get("image")
        merged = None if outputs is None else self.by_output.get(outputs)
        if outputs is None or merged is None:
            if outputs is not None and getattr(self.local, "waiting", False):
                raise ReattendError(
                    "the features of this prompt are no longer those that the encoder gave: pass the whole prompt at once"
                )
            call.replace((), given)
            return
        self.local.waiting = False
        if past or not isinstance(ids, Tensor):
            raise UnsupportedError("images whose tokens were merged must come with the input_ids of the first part of a prompt")
        mask = given.get("attention_mask")
        if has_buffers(cache) or (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)):
            raise UnsupportedError(
                "images whose tokens were merged need an attention mask [batch, tokens] and a cache that grows"
            )
        if given.get("labels") is not None:
            raise UnsupportedError("a loss over a prompt whose image tokens were merged is not defined: leave labels out")
        image = ids == self.root.config.image_token_id
        stay, features = _chosen(merged, list(outputs.pooler_output))
        if int(image.sum()) != len(stay):
            raise ReattendError(f"the prompt has {int(image.sum())} image tokens for {len(stay)} features of its images")
        shorter = copy.copy(outputs)
        shorter.pooler_output = features
        cut = _cut(image, stay, mask)
        own = cut.of(torch.ones_like(ids) if mask is None else mask)
        given.update(attention_mask=own, mm_encoder_outputs={**given["mm_encoder_outputs"], "image": shorter})
        for name in ("input_ids", *PER_TOKEN):
            if isinstance(given.get(name), Tensor):
                given[name] = taken(given[name], cut.keep.clamp_min(0)).masked_fill(cut.keep < 0, 0)
        given["position_ids"] = (own.long().cumsum(dim=1) - 1).clamp_min(0)
        call.kept[self] = cut
        call.replace((), given)

    def _with_features(self, given: dict[str, Any]) -> dict[str, Any]:
        """The images' features in the place of their pixels, as `generate` passes them."""
        encode = self.root.base_model.get_image_features
        names = [name for name in inspect.signature(encode).parameters if name != "kwargs" and given.get(name) is not None]
        outputs = encode(**{name: given[name] for name in names}, return_dict=True)
        return {**{n: value for n, value in given.items() if n not in names}, "mm_encoder_outputs": {"image": outputs}}

    def _go_on(self, call: RootCall, given: dict[str, Any], cut: Cut, past: int) -> None:
        """A further pass: the caller's mask and positions are those of the longer prompt."""
        width = (given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]).shape[1]
        mask, missing = given.get("attention_mask"), cut.length - cut.keep.shape[1]
        whole, places = past + width + missing, given.get("position_ids")
        # what generate cut out by the length of the cache is no continuation; of one token it never cuts too many
        astray = width > 1 and mask is None and isinstance(places, Tensor) and bool((places[..., 0] != whole - width).any())
        if astray or (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != whole):
            raise ReattendError(
                f"this sequence has {past} tokens so far, {missing} fewer than its caller knows of because image tokens were merged, and does "
                f"not go on with the {width} tokens that it is given: a further turn needs the whole conversation anew, without the cache"
            )
        mask = cut.keep.new_ones(len(cut.keep), whole) if mask is None else mask  # left out where nothing was padding
        if isinstance(mask, Tensor) and mask.dim() == 2:
            given["attention_mask"] = cut.of(mask.expand(len(cut.keep), -1))
            given["position_ids"] = (given["attention_mask"].long().cumsum(dim=1) - 1).clamp_min(0)[:, -width:]
        else:
            raise UnsupportedError(
                "a sequence whose image tokens were merged goes on with an attention mask [batch, tokens] or none"
            )
        call.replace((), given)

    def facts(self, call: RootCall) -> None:
        """Tokens that were merged form no grid, even where their number is a square."""
        if self in call.kept and call.forward is not None and call.forward.tokens is not None:
            call.forward.tokens.grids = []

    def after(self, call: RootCall) -> None:
        cut, cache = call.kept.get(self), cache_of(call.output)
        if cut is not None and cache is not None and not isinstance(cache, tuple):
            self.by_cache[cache] = cut


def _chosen(merged: MergedTokens, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(bool [placeholders] in reading order: which stay, features of each image for these). Beams repeat images: the same tensors again."""
    members, real = merged.members, merged.size > 0
    number: dict[int, int] = {}
    stays, short = [], []
    for feature in features:
        image = number.setdefault(id(feature), len(number))
        # tokens that the model itself leaves out (a class token) come first
        own = members[image][real[image]] - (merged.where.shape[1] - len(feature))
        own = own[own >= 0]
        short.append(feature[own])
        stays.append(torch.arange(len(feature), device=own.device) < len(own))
    return torch.cat(stays), short


def _cut(image: Tensor, stay: Tensor, mask: Tensor | None) -> Cut:
    """Which columns of bool [B, T] image tokens and others stay. Rows that keep fewer are padded on the side where padding is."""
    stays = ~image
    stays[image] = stay.to(image.device)
    if mask is not None:
        stays &= mask.bool()
    kept = stays.sum(dim=1)
    most = int(kept.max())
    # those that stay first, in their order
    order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    places = torch.arange(most, device=image.device)
    if mask is None or not bool((mask[:, -1] == 0).any()):
        places = places - (most - kept)[:, None]
    places = places.expand(len(kept), -1)
    outside = (places < 0) | (places >= kept[:, None])
    return Cut(taken(order, places.clamp_min(0)).masked_fill(outside, -1), image.shape[1])
