"""The token map of a denoiser's calls, from the arguments of its forward and the facts of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, Clock, Site, TokenGrid, TokenMap
from ..passes import Forward
from ..sites.denoisers import family_of


@dataclass
class DenoiserForward(Forward):
    """One forward pass of a denoiser: its clock, and what its arguments tell about tokens.

    batch: rows of the pass, guide branches included. text_length: tokens of encoder_hidden_states (registers included), None where
    there are none. text_lengths [batch]: valid ones per sample, where a text mask was given. text_mask: bool [batch, text_length],
    True = real. latent: (height, width) of the latents where they are images.
    """

    denoiser: nn.Module | None = None
    batch: int = 1
    text_length: int | None = None
    text_mask: Tensor | None = None
    latent: tuple[int, int] | None = None
    maps: dict[Any, tuple[TokenMap, TokenMap | None]] = field(default_factory=dict)


def read_forward(
    denoiser: nn.Module, given: Mapping[str, Any], clock: Clock, memory: dict[Any, Any], maps: dict[Any, Any] | None = None
) -> DenoiserForward:
    """What the arguments of a denoiser's forward, by name, tell about its tokens. maps: a run's own, for passes without a text mask,
    whose maps follow from their shapes."""
    hidden = given.get("hidden_states", given.get("sample"))
    batch = hidden.shape[0] if isinstance(hidden, Tensor) else 1
    forward = DenoiserForward(clock, loose_memory=memory, denoiser=denoiser, batch=batch)
    if isinstance(hidden, Tensor) and hidden.dim() in (4, 5):
        forward.latent = (hidden.shape[-2], hidden.shape[-1])
    text = given.get("encoder_hidden_states")
    if isinstance(text, Tensor) and text.dim() == 3:
        length = text.shape[1]
        mask = given.get("encoder_attention_mask", given.get("encoder_hidden_states_mask"))
        second = given.get("encoder_hidden_states_t5")
        if isinstance(second, Tensor):
            length += second.shape[1]
        if isinstance(mask, Tensor) and mask.shape == (batch, length):
            forward.text_mask = mask.bool()
        registers = family_of(denoiser).registers
        if registers is not None:
            length += getattr(denoiser, registers).shape[1]
        forward.text_length = length
    if maps is not None and forward.text_mask is None:
        forward.maps = maps.setdefault((id(denoiser), batch, forward.text_length, forward.latent), {})
    return forward


def locate(call: Call, forward: Forward, index: int) -> None:
    """Fills in the tokens and the clock of a site's call; `index` counts the calls of this site in this pass.

    The keys' map has the roles "image", "text" and "padding"; `query_tokens` is set where the queries are other tokens than the keys.
    """
    call.tokens, call.clock = forward.tokens, forward.clock
    if not isinstance(forward, DenoiserForward) or forward.denoiser is None or call.site is None:
        return
    sample = None
    if call.batch < forward.batch and family_of(forward.denoiser).per_sample:
        sample = index
        branches = {name: rows[index : index + 1] for name, rows in call.clock.branches.items()}
        source = call.clock.source
        call.clock = replace(call.clock, branches=branches, source=None if source is None else source[index : index + 1])
    key = (call.site.kind, call.site.stack, call.batch, call.num_queries, call.num_keys, call.query.device, sample)
    if key not in forward.maps:
        forward.maps[key] = _maps(call, forward, sample)
    call.tokens, call.query_tokens = forward.maps[key]


def _maps(call: Call, forward: DenoiserForward, sample: int | None) -> tuple[TokenMap, TokenMap | None]:
    assert call.site is not None and forward.denoiser is not None
    site, batch, keys, device = call.site, call.batch, call.num_keys, call.query.device
    if site.stack == "denoiser.pool":
        return _one_role(batch, keys, "text", device), _one_role(batch, call.num_queries, "text", device)
    if site.kind == "cross" or keys != call.num_queries:
        queries = _one_role(batch, call.num_queries, "image", device)
        is_text = forward.text_length in (None, keys) and site.kind == "cross"
        tokens = _one_role(batch, keys, "text" if is_text else "reference", device)
        if is_text:
            _mark_padding(tokens, forward)
        _add_grids(queries, forward)
        return tokens, queries
    if site.kind in ("self", "temporal"):
        tokens = _one_role(batch, keys, "text" if site.stack == "denoiser.text_refiner" else "image", device)
        if site.stack == "denoiser.text_refiner":
            _mark_padding(tokens, forward)
        elif site.kind == "self":
            _add_grids(tokens, forward)
        return tokens, None
    return _joint_map(site, batch, keys, device, forward, sample), None


def _one_role(batch: int, length: int, role: str, device: torch.device) -> TokenMap:
    roles = {name: torch.zeros(batch, length, dtype=torch.bool, device=device) for name in ("image", "text", "padding")}
    roles[role] = torch.ones(batch, length, dtype=torch.bool, device=device)
    return TokenMap(batch, length, length, roles)


def _joint_map(
    site: Site, batch: int, length: int, device: torch.device, forward: DenoiserForward, sample: int | None
) -> TokenMap:
    family = family_of(forward.denoiser)  # type: ignore[arg-type]
    tokens = TokenMap(batch, length, length)
    name = type(forward.denoiser).__name__
    if family.order is None:
        tokens.unknown = f"{site.name}: the order of image and text tokens in {name} is not known"
        return tokens
    if forward.text_length is None:
        tokens.unknown = f"{site.name}: {name} was called without encoder_hidden_states, so its text tokens are not known"
        return tokens
    valid = None if forward.text_mask is None else forward.text_mask.to(device)
    places = torch.arange(length, device=device)[None]
    padding = torch.zeros(batch, length, dtype=torch.bool, device=device)
    if sample is not None:
        text_length = torch.full((1, 1), forward.text_length, device=device)
        if valid is not None:
            text_length = valid[sample].sum().view(1, 1)
        text = places >= length - text_length
    elif family.ragged and valid is not None:
        text_length = valid.sum(dim=1, keepdim=True)
        text = places < text_length
        padding = places >= length - text_length.max() + text_length
    elif family.order == "text":
        text = places < forward.text_length
    else:
        text = places >= length - forward.text_length
    text = text.expand(batch, length)
    if valid is not None and sample is None and not family.ragged and batch == valid.shape[0]:
        start = 0 if family.order == "text" else length - forward.text_length
        start += forward.text_length - valid.shape[1]
        padding[:, start : start + valid.shape[1]] = ~valid
    tokens.roles = {"image": ~text & ~padding, "text": text & ~padding, "padding": padding}
    _add_grids(tokens, forward)
    return tokens


def _mark_padding(tokens: TokenMap, forward: DenoiserForward) -> None:
    """Takes the padding out of the text of a map whose columns are the text tokens; rows repeat where a site folds frames."""
    mask = forward.text_mask
    if mask is None or mask.shape[1] != tokens.length or tokens.batch % mask.shape[0]:
        return
    mask = mask.to(tokens.roles["text"].device).repeat_interleave(tokens.batch // mask.shape[0], dim=0)
    tokens.roles["text"], tokens.roles["padding"] = mask, ~mask


def _add_grids(tokens: TokenMap, forward: DenoiserForward) -> None:
    """The raster of each row's image tokens, where one image's latents, halved some times, account for them all."""
    if forward.latent is None:
        return
    count = int(tokens.roles["image"][0].sum())
    height, width = forward.latent
    while height * width > count and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != count:
        return
    for row in range(tokens.batch):
        index = tokens.roles["image"][row].nonzero()[:, 0]
        tokens.grids.append(TokenGrid.of_image(row, index.view(height, width)))
