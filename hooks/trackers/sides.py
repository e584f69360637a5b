"""One branch of one batch of sequences: its prompt, positions and cache, which do what the real cache does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...interventions import ReattendError, TokenMap
from ..prompts.text_only import PER_TOKEN


class Side:
    """One branch of one batch of sequences: what it has read so far."""

    def __init__(self, arguments: dict[str, Any], mirrored: bool, tokens: TokenMap, shared: bool) -> None:
        # mirrored: it has the positions of the real pass. shared: it has its token map too
        self.arguments, self.mirrored, self.tokens, self.shared = arguments, mirrored, tokens, shared
        self.mask: Tensor | None = arguments.get("attention_mask")
        self.later: Tensor | None = arguments.pop("later_attention_mask", None)
        positions = arguments.get("position_ids")
        self.position: Tensor | None = None if mirrored or positions is None else positions[..., -1:]
        self.cache: Any = None
        self.offsets: list[Any] | None = None
        self.batch, self.prompt = _shape_of(arguments)

    def move(self, index: Tensor) -> None:
        """The rows of the real cache come from these."""
        if self.cache is not None:
            self.cache.reorder_cache(index)
        if not self.shared:
            self.tokens.move(index)
        self.mask = _rows(self.mask, index)
        if self.position is not None:
            self.position = self.position.index_select(-2, index.to(self.position.device))
        if self.offsets is not None:
            self.offsets = [self._moved(offset, index) if isinstance(offset, Tensor) else offset for offset in self.offsets]
        self.batch = index.numel()

    def _moved(self, offset: Tensor, index: Tensor) -> Tensor:
        """Offsets of rows; a model may hold one for each prompt, from before its rows became beams."""
        return offset.repeat_interleave(self.batch // offset.shape[0], dim=0).index_select(0, index.to(offset.device))

    def grown(self, ids: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of its prompt with further tokens [B, n] at the end."""
        arguments, count = dict(self.arguments), ids.shape[1]
        if self.mirrored:
            arguments["position_ids"] = given.get("position_ids")
        if count == 0:
            return arguments
        if arguments.get("input_ids") is None:
            raise ReattendError("tokens after a prompt of embeddings need a cache: generate with use_cache=True")
        arguments["input_ids"] = torch.cat([arguments["input_ids"], ids.to(arguments["input_ids"])], dim=1)
        if self.mask is not None:
            arguments["attention_mask"] = pad(self.mask, (0, count), value=1)
        for name in PER_TOKEN:
            known: Any = arguments.get(name)
            real = given.get(name)
            if isinstance(known, Tensor):
                # what the real pass says of these tokens: a generated one may be of another type than the prompt's
                more = real[:, -count:].to(known) if isinstance(real, Tensor) else known.new_zeros(len(known), count)
                arguments[name] = torch.cat([known, more], dim=1)
        if not self.mirrored and self.position is not None:
            before: Any = arguments["position_ids"]
            arguments["position_ids"] = torch.cat([before, self._next(count)], dim=-1)
        return arguments

    def step(self, ids: Tensor, given: dict[str, Any], cache_name: str) -> dict[str, Any]:
        """The arguments of a pass that goes on with its cache, which the model takes by this name."""
        count = ids.shape[1]
        arguments = dict(given) if self.mirrored else {k: v for k, v in given.items() if k in PER_TOKEN}
        for name in PER_TOKEN:
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name][:, -count:]
        arguments |= {"input_ids": ids, "attention_mask": None, cache_name: self.cache}
        if self.mask is not None:
            arguments["attention_mask"] = pad(self.mask, (0, count), value=1)
        if self.position is not None:
            arguments["position_ids"] = self._next(count)
        return arguments

    def read(self, count: int) -> None:
        """Notes that so many tokens after the prompt are in its cache now."""
        if self.later is not None:
            self.mask, self.later = self.later, None
        if self.mask is not None:
            self.mask = pad(self.mask, (0, count), value=1)
        if self.position is not None and count:
            self.position = self._next(count)[..., -1:]

    def crop(self, count: int) -> None:
        """Takes the last tokens back: drafts that were refused. Raises ReattendError where its cache has dropped what came before."""
        records = records_past(self.cache)
        if count and not records:
            fixed = next((f"a {type(x).__name__}" for x in self.cache.layers if outgrown(x)), "")
            if fixed:
                raise ReattendError(
                    f"a branch cannot take tokens back from {fixed}, which has dropped what came before: decode without drafts"
                )
        # layers that keep more than their window for this purpose cut themselves to size, also where nothing is taken back
        if count or records:
            self.cache.crop(-count)
        if self.mask is not None and count:
            self.mask = self.mask[:, :-count]
        if self.position is not None:
            self.position = self.position - count

    def _next(self, count: int) -> Tensor:
        assert self.position is not None
        return self.position + torch.arange(1, count + 1, device=self.position.device)


def records_past(cache: Any) -> bool:
    """Whether a cache keeps more than its windows, because drafts may be taken back."""
    return any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ()))


def outgrown(layer: Any) -> bool:
    """Whether a layer of a cache has dropped tokens that it would need if the last ones were taken back."""
    if getattr(layer, "record_past", True):
        return False  # it keeps all of them, or is told to
    window = getattr(layer, "sliding_window", None)
    return window is None or layer.get_seq_length() >= window  # without a window: a state that sums up what came before


def holds_on(layer: Any) -> bool:
    """Whether a layer of a cache can give its last token back, now or once it has been told to keep more than its window."""
    if not hasattr(layer, "crop") or hasattr(layer, "_quantized_keys"):
        return False  # up to transformers 5.23 quantised layers have a `crop` that does not fit them
    if hasattr(layer, "activate_past_recording"):
        return True
    if hasattr(layer, "is_croppable"):
        return bool(layer.is_croppable)
    return True


def recording_cache(root: Any) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=root.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    return cache


def _rows(x: Tensor | None, index: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(0, index.to(x.device))


def width_of(arguments: dict[str, Any]) -> int:
    return _shape_of(arguments)[1]


def _shape_of(arguments: dict[str, Any]) -> tuple[int, int]:
    """(rows, tokens) of a prompt."""
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    assert isinstance(source, Tensor)
    return source.shape[0], source.shape[1]
