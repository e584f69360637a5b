"""A layer of a cache that has let tokens go, for each key head its own, while length and positions stay those of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...interventions import HeldKV, ReattendError


@dataclass
class Part:
    """What some key heads of a layer hold, of as many tokens each: columns [B, h, m] long, ascending, key and value [B, h, m, D]; valid
    bool [B, h, m] where a row of the batch holds fewer."""

    heads: list[int]
    columns: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes all its tensors in the same way."""
        self.columns, self.key, self.value = change(self.columns), change(self.key), change(self.value)
        self.valid = None if self.valid is None else change(self.valid)

    def append(self, key: Tensor, value: Tensor, start: int) -> None:
        """Further tokens, from position `start` on; key and value [B, Hkv, T, D] of all heads."""
        batch, count = key.shape[0], key.shape[2]
        new = torch.arange(start, start + count, device=key.device).expand(batch, len(self.heads), -1)
        self.columns = torch.cat([self.columns, new], dim=2)
        self.key = torch.cat([self.key, key[:, self.heads]], dim=2)
        self.value = torch.cat([self.value, value[:, self.heads]], dim=2)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(new, dtype=torch.bool)], dim=2)


class Permit(Protocol):
    """Says whether the session that shrank a cache is at work here; copies of the cache share it."""

    recipe: str

    @property
    def holds(self) -> bool: ...


class Origin:
    """The prompt whose tokens a layer has let go: the same object in all copies of the layer."""

    def __deepcopy__(self, memo: Any) -> Origin:
        return self


class HeldLayer(CacheLayerMixin):
    """A cache's layer in the place of one that held all tokens. `update` gives keys and values that nobody can use: the session's edit
    (`edits`) attends with the parts. Raises ReattendError where that session is not at work, or for tokens that cannot be taken back."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, parts: list[Part], length: int, heads: int, permit: Permit, origin: Origin | None = None) -> None:
        super().__init__()
        self.parts, self.length, self.heads, self.permit = parts, length, heads, permit
        self.origin = Origin() if origin is None else origin
        # before this position tokens are gone
        self.evicted_at = length
        self.is_initialized = True
        self.device, self.dtype = parts[0].key.device, parts[0].key.dtype

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """It never starts empty."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.permit.holds:
            raise ReattendError(
                f"this cache holds what recipe {self.permit.recipe!r} kept of its prompt, and that session is not at work here: go on "
                "inside it, or run the whole prompt again without this cache"
            )
        self.append(key_states, value_states)
        batch, heads = key_states.shape[:2]
        # stand for all columns without any memory; whoever attended with them would get nan
        none = key_states.new_full((), float("nan"))
        key, value = (none.expand(batch, heads, self.length, x.shape[3]) for x in (key_states, value_states))
        return key, value

    def append(self, key: Tensor, value: Tensor) -> None:
        """Further tokens, [B, Hkv, T, D] of all heads."""
        for part in self.parts:
            part.append(key, value, self.length)
        self.length += key.shape[2]

    def edits(self, num_heads: int) -> list[HeldKV]:
        """What a call with so many query heads attends with."""
        times = num_heads // self.heads
        return [
            HeldKV(
                heads=None if len(self.parts) == 1 else [head * times + i for head in part.heads for i in range(times)],
                columns=part.columns, key=part.key, value=part.value, valid=part.valid,
            )
            for part in self.parts
        ]  # fmt: skip

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """(key, value [B, Hkv, length, D], held bool [B, Hkv, length]) with zeros where nothing is held."""
        first = self.parts[0]
        batch = first.key.shape[0]
        # unused places write into a column of their own, which is dropped
        key = first.key.new_zeros(batch, self.heads, self.length + 1, first.key.shape[3])
        value = first.value.new_zeros(batch, self.heads, self.length + 1, first.value.shape[3])
        held = torch.zeros(batch, self.heads, self.length + 1, dtype=torch.bool, device=first.key.device)
        for part in self.parts:
            at = part.columns if part.valid is None else part.columns.masked_fill(~part.valid, self.length)
            for whole, own in ((key, part.key), (value, part.value)):
                whole[:, part.heads] = whole[:, part.heads].scatter(2, at[..., None].expand(-1, -1, -1, own.shape[3]), own)
            held[:, part.heads] = held[:, part.heads].scatter(2, at, True)
        return key[:, :, :-1], value[:, :, :-1], held[:, :, :-1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        # transformers before 5.2x gave the length that is left, as a positive number
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.length - tokens_to_remove)
        if count == 0:
            return
        if self.length - count < self.evicted_at:
            raise ReattendError(
                f"this cache has let tokens go of its first {self.evicted_at}, so it cannot be cut to {self.length - count}: run the "
                "prompt again"
            )
        self.length -= count
        for part in self.parts:
            part.each(lambda x: x[:, :, :-count])

    def reset(self) -> None:
        raise ReattendError("a cache that has let tokens go cannot be used for another text: make a new one")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in self.parts:
            part.each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.parts:
            part.each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for part in self.parts:
            part.each(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        for part in self.parts:
            part.each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for part in self.parts:
            part.each(lambda x: x.to(self.device, non_blocking=True))

    @property
    def held(self) -> int:
        """Numbers that it keeps, of keys and values together."""
        return sum(part.key.numel() + part.value.numel() for part in self.parts)


def shrunk(
    key: Tensor, value: Tensor, keep: Tensor, permit: Permit, padding: Tensor | None, origin: Origin | None = None
) -> HeldLayer:
    """The layer that holds, of key and value [B, Hkv, n, D], what `keep` [B, Hkv, n] says. Heads that hold as many share their tensors.

    padding bool [B, n]: columns that are nobody's, which fill rows with fewer. origin: that of a layer which has let tokens go before.
    """
    batch, heads, length = keep.shape
    if padding is not None:
        keep = keep & ~padding[:, None]
    counts = keep.sum(dim=2)
    widths = counts.amax(dim=0).tolist()
    parts = []
    for width in sorted(set(widths), reverse=True):
        own = [head for head, count in enumerate(widths) if count == width]
        kept = keep[:, own]
        # those that stay come first in a stable sort; what follows fills rows that hold fewer
        columns = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[..., :width].sort(dim=2).values
        valid = kept.gather(2, columns)
        wide = columns[..., None]
        taken = [x[:, own].gather(2, wide.expand(-1, -1, -1, x.shape[3])) for x in (key, value)]
        parts.append(Part(own, columns, taken[0], taken[1], None if bool(valid.all()) else valid))
    return HeldLayer(parts, length, heads, permit, origin)
