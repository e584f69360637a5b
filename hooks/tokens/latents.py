"""Where the scheduler's latents lie in a denoiser's input: which rows, channels and tokens; the rest a pipeline joins to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..sites.inputs import hidden_in


@dataclass(frozen=True)
class Place:
    """parts: how often the latents are repeated in the batch (halves of guidance). cuts: (axis, size), the latents come first there."""

    parts: int
    cuts: tuple[tuple[int, int], ...] = ()

    def cut(self, hidden: Tensor) -> Tensor:
        """The latents, scaled: those of the first part."""
        return self._inner(hidden[: hidden.shape[0] // self.parts])

    def put(self, hidden: Tensor, latents: Tensor) -> Tensor:
        """The input with other latents in all its parts; what is joined to them stays."""
        new = hidden.clone()
        self._inner(new).copy_(torch.cat([latents] * self.parts))
        return new

    def alike(self, hidden: Tensor) -> bool:
        """Whether all parts hold the same latents."""
        first, *others = self._inner(hidden).chunk(self.parts)
        return all(torch.equal(first, other) for other in others)

    def _inner(self, hidden: Tensor) -> Tensor:
        for axis, size in self.cuts:
            hidden = hidden.narrow(axis, 0, size)
        return hidden


def place_of(denoiser: nn.Module, given: Mapping[str, Any], branches: Mapping[str, Tensor]) -> Place | str:
    """Where the latents lie in a call's input, or why that is not known."""
    hidden, kind = hidden_in(given), type(denoiser).__name__
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() not in (3, 4, 5):
        return f"{kind} was called without latents of 3 to 5 dimensions of floating point numbers, in one tensor"
    rows = next((int(branches[half].sum()) for half in ("conditional", "unconditional") if half in branches), 0) or len(hidden)
    if len(hidden) % rows:
        return f"the batch of {len(hidden)} rows holds no whole number of copies of {rows} latents"
    channels = _channels(denoiser, hidden)
    tokens = _tokens(given, hidden)
    if isinstance(channels, str) or isinstance(tokens, str):
        return channels if isinstance(channels, str) else str(tokens)
    place = Place(len(hidden) // rows, (*channels, *tokens))
    if not place.alike(hidden):
        return f"the {place.parts} parts of the batch of {kind} hold different latents"
    return place


def _channels(denoiser: nn.Module, hidden: Tensor) -> tuple[tuple[int, int], ...] | str:
    """The channels of the latents, where more are joined to them: as many as are predicted come first."""
    config: Any = getattr(denoiser, "config", None)
    taken, given = getattr(config, "in_channels", None), getattr(config, "out_channels", None) or 0
    if not isinstance(taken, int) or not isinstance(given, int):
        return ()
    if hidden.dim() == 3:
        # packed: a token holds a patch
        patch = getattr(config, "patch_size", 1)
        given *= patch**2 if isinstance(patch, int) and given * patch**2 <= taken else 1
    if not given or given == taken or given == 2 * taken:
        return ()  # twice: the variance is predicted too
    axis = hidden.dim() - 1 if hidden.dim() == 3 else 1
    if hidden.shape[axis] != taken and hidden.dim() == 5 and hidden.shape[2] == taken:
        axis = 2
    if hidden.shape[axis] != taken or given > taken:
        return f"which of the {taken} channels of {type(denoiser).__name__} are latents, of which it predicts {given}, is not known"
    return ((axis, given),)


def _tokens(given: Mapping[str, Any], hidden: Tensor) -> tuple[tuple[int, int], ...] | str:
    """The tokens of the latents, where those of other images follow on them."""
    if hidden.dim() != 3:
        return ()
    ids, shapes, count = given.get("img_ids"), given.get("img_shapes"), hidden.shape[1]
    own = count
    if isinstance(shapes, (list, tuple)) and shapes:
        own = prod(shapes[0][0]) if isinstance(shapes[0], (list, tuple)) else prod(shapes[0])
    elif isinstance(ids, Tensor) and ids.shape[-2] == count:
        latents = ids[..., 0] == 0
        own = int(latents.reshape(-1, count)[0].sum())
        if not bool(latents[..., :own].all()):
            return "tokens of other images (img_ids) come before those of the latents"
    if not 0 < own <= count:
        return f"the input's {count} tokens are fewer than the {own} of its latents"
    return () if own == count else ((1, own),)
