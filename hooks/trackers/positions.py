"""The positions of a pass, for passes of our own that have to go on with the same ones.

A model that is called without `position_ids` finds positions of its own: from the cache's length, or from the attention mask (OPT,
multimodal RoPE). A branch with another mask would be given other positions, and a trial has no mask to find them from. So what the
real pass came to is read on the way to its first layer, and handed to the others.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError
from ..handles import Handles
from ..host import Host
from ..passes import Forward
from ..sites.discovery import layer_module

NAME = "position_ids"


def positions_misfit(config: Any) -> str:
    """Why the positions of a model cannot be given to it, or ""."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False):
        return "it counts distances from its attention mask (alibi), so hiding a token would move all others"
    return ""


def takers(host: Host) -> list[nn.Module]:
    """The modules that are given positions on the way to the first decoder layer, from outside in."""
    root = host.tracker.root
    site = next((s for s in host.table if s.stack == "decoder"), None)
    if root is None or site is None:
        return []
    layer = layer_module(host.model, site.name)
    way: list[nn.Module] = []
    for module in root.modules():
        if module is not root and any(inner is layer for inner in module.modules()):
            way += [module, *(child for child in module.children() if not isinstance(child, nn.ModuleList))]
    found: list[nn.Module] = []
    for module in way:
        if NAME in inspect.signature(type(module).forward).parameters and all(module is not other for other in found):
            found.append(module)
    return found


def install_positions(host: Host, handles: Handles) -> None:
    """Hooks that keep the positions of a pass with it (`Forward.positions`)."""
    for module in takers(host):
        handles.before(module, _reader(host, module), kwargs=True)


def _reader(host: Host, module: nn.Module) -> Any:
    place = list(inspect.signature(type(module).forward).parameters).index(NAME) - 1  # without self

    def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
        forward = host.tracker.current()
        if forward.sequence is None or forward.positions is not None:
            return
        positions = kwargs.get(NAME, args[place] if place < len(args) else None)
        if isinstance(positions, Tensor):
            forward.positions = positions.detach()

    return read


def with_positions(given: dict[str, Any], found: Tensor | None) -> dict[str, Any]:
    """The arguments of a pass with the positions that it had."""
    return given if found is None or given.get(NAME) is not None else {**given, NAME: found}


def next_position(positions: Tensor) -> Tensor:
    """Positions [..., 1] of the token after these; in multimodal RoPE it stands beyond the highest of an image's planes."""
    last = positions[..., -1:]
    if last.dim() < 3 or last.shape[0] < 3:
        return last + 1
    text, planes = last[: last.shape[0] - 3], last[-3:]
    return torch.cat([text, planes.amax(dim=0, keepdim=True).expand_as(planes)], dim=0) + 1


def last_columns(forward: Forward, width: int, count: int) -> Tensor:
    """[B, count] long: columns of the pass whose logits are fused, the last real ones of each row."""
    tokens = forward.tokens
    assert tokens is not None
    last = torch.full((tokens.batch,), width - count)
    if forward.fresh and count == 1:
        real = ~tokens.positions("padding", 0, width)
        last = torch.where(real, torch.arange(width), 0).amax(dim=1)
    return last[:, None] + torch.arange(count)


def shown_at(logits: Tensor, given: dict[str, Any], width: int, columns: Tensor) -> Tensor | None:
    """[B, count] long: where the columns lie in the returned logits; None where these are just all of them."""
    shown = logits.shape[1]
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor):
        kept = keep.to(columns.device) % width
    else:
        kept = torch.arange(width - shown, width)
    if shown == columns.shape[1] and bool((columns == kept).all()):
        return None
    place = (columns[..., None] == kept).long().argmax(dim=-1)
    if not torch.equal(kept[place], columns):
        raise ReattendError(
            f"logits_to_keep leaves out the last token of a prompt, whose logits are fused with those of a branch: keep column "
            f"{int(columns.max())} too"
        )
    return place.to(logits.device)
