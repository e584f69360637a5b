"""The token map of a denoiser's calls, from the arguments of its forward and the facts of its class.

Every map is tried against the number of tokens that the call really has: where the latents and the text that the model was given do not
make that number, the roles are unknown, and whoever asks for one is told the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, Clock, TokenMap
from ..passes import Forward
from ..sites.families import Family, family_of
from .marks import Marks, mark
from .rasters import Latents, Piece, Raster, read_latents
from .streams import joint_stream, laid_out, raster_of, unknown


@dataclass
class DenoiserForward(Forward):
    """One forward pass of a denoiser: its clock, and what its arguments tell about tokens.

    batch: rows of the pass, guide branches included. text_length: tokens of the text arguments, None where there are none. samples: the
    text tokens of each sample, where they are given apart. text_mask: bool [batch, text_length], True = real. reference_length: tokens of
    `encoder_hidden_states_image`, None where there are none. marks: roles of the text's columns.
    """

    denoiser: nn.Module | None = None
    family: Family = field(default_factory=Family)
    batch: int = 1
    text_length: int | None = None
    samples: tuple[int, ...] = ()
    text_mask: Tensor | None = None
    reference_length: int | None = None
    latents: Latents = field(default_factory=Latents)
    maps: dict[Any, tuple[TokenMap, TokenMap | None]] = field(default_factory=dict)
    marks: list[Marks] = field(default_factory=list)


def read_forward(
    denoiser: nn.Module, given: Mapping[str, Any], clock: Clock, memory: dict[Any, Any], maps: dict[Any, Any] | None = None
) -> DenoiserForward:
    """What the arguments of a denoiser's forward, by name, tell about its tokens. maps: a run's own, for passes without a text mask,
    whose maps follow from their shapes."""
    family = family_of(denoiser)
    hidden = given.get(family.latents) if family.latents else given.get("hidden_states", given.get("sample"))
    batch = hidden.shape[0] if isinstance(hidden, Tensor) else len(hidden) if isinstance(hidden, (list, tuple)) else 1
    forward = DenoiserForward(clock, loose_memory=memory, denoiser=denoiser, family=family, batch=batch)
    forward.latents = read_latents(denoiser, family, hidden, given, {} if maps is None else maps)
    _read_text(forward, given)
    images = given.get("encoder_hidden_states_image")
    if isinstance(images, Tensor) and images.dim() == 3:
        forward.reference_length = images.shape[1]
    if maps is not None and forward.text_mask is None:
        told = (forward.text_length, forward.samples, forward.reference_length, forward.latents)
        forward.maps = maps.setdefault((id(denoiser), batch, *told), {})
    return forward


def _read_text(forward: DenoiserForward, given: Mapping[str, Any]) -> None:
    """Fills in what is said of the text."""
    texts = [given.get(name) for name in forward.family.text]
    texts = [text for text in texts if text is not None]
    if texts and all(isinstance(text, Tensor) and text.dim() in (3, 4) for text in texts):
        forward.text_length = sum(text.shape[-2] for text in texts)
    elif len(texts) == 1 and isinstance(texts[0], (list, tuple)) and all(isinstance(t, Tensor) for t in texts[0]):
        forward.samples = tuple(len(text) for text in texts[0])
        forward.text_length = max(forward.samples, default=None)
    named = ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask")
    mask = next((given[name] for name in named if given.get(name) is not None), None)
    lengths = given.get(forward.family.lengths)
    if isinstance(lengths, Tensor) and forward.text_length is not None:
        mask = torch.arange(forward.text_length, device=lengths.device) < lengths[:, None]
    if isinstance(mask, Tensor) and mask.shape == (forward.batch, forward.text_length):
        forward.text_mask = mask.bool()


def locate(call: Call, forward: Forward, index: int, module: nn.Module | None = None) -> None:
    """Fills in the tokens and the clock of a site's call; `index` counts the calls of this site, the module, in this pass.

    The keys' map has the roles "image", "text" and "padding", and, where there are such tokens, "reference" (images that the one being made
    looks at), "register", "frame" (each token is a frame of one place) and "condition"; `query_tokens` is set where the queries are other
    tokens than the keys.
    """
    call.tokens, call.clock, call.number = forward.tokens, forward.clock, index
    if not isinstance(forward, DenoiserForward) or forward.denoiser is None or call.site is None:
        return
    sample = None
    if call.batch < forward.batch and forward.family.per_sample:
        sample = index
        branches = {name: rows[index : index + 1] for name, rows in call.clock.branches.items()}
        source = call.clock.source
        call.clock = replace(call.clock, branches=branches, source=None if source is None else source[index : index + 1])
    processor = type(getattr(module, "processor", None)).__name__
    # an IP-Adapter's processor looks at its images in further calls, after the site's own
    prompted = index > 0 and "IPAdapter" in processor
    apart = next((role for pattern, role in forward.family.apart if re.search(pattern, call.site.name)), None)
    shape = (call.batch, call.num_queries, call.num_keys, call.query.device)
    key = (call.site.kind, call.site.stack, *shape, sample, prompted, apart, *forward.marks)
    if key not in forward.maps:
        maps = _prompted(call, forward, processor) if prompted else _maps(call, forward, sample, processor, apart)
        for tokens in maps:
            for marks in forward.marks if tokens is not None else ():
                mark(tokens, marks, forward.text_mask, sample, call.site.name)  # type: ignore[arg-type]
        forward.maps[key] = maps
    call.tokens, call.query_tokens = forward.maps[key]


def _maps(
    call: Call, forward: DenoiserForward, sample: int | None, processor: str, apart: str | None
) -> tuple[TokenMap, TokenMap | None]:
    """The maps of the keys and, where these are other tokens, of the queries. apart: the one role of the site's tokens (`Family.apart`)."""
    assert call.site is not None
    site, batch, keys, queries, device = call.site, call.batch, call.num_keys, call.num_queries, call.query.device
    if apart not in (None, "text", "reference"):
        return unknown(call, f"its tokens are {apart}, neither image nor text"), None
    if apart == "reference":
        return laid_out(batch, [Piece("reference", keys)], device), None
    if site.stack == "denoiser.pool":
        length = forward.text_length
        if length is None or keys not in (length, length + 1):  # their mean may be one more
            return unknown(call, f"its {keys} tokens are not the {length} of the text"), None
        return _text(batch, keys, forward, device), _text(batch, queries, forward, device)
    if site.kind == "joint":
        if keys == queries:
            return joint_stream(call, forward, sample), None
        return _added(call, forward, processor), _latents(call, forward, queries)
    if site.kind == "cross":
        return _context(call, forward), _latents(call, forward, queries)
    if keys != queries:
        return unknown(call, f"its {queries} queries attend to {keys} tokens, their own and others"), _latents(
            call, forward, queries
        )
    if site.stack == "denoiser.text_refiner" or apart == "text":
        if forward.samples or keys == forward.text_length:
            return _text(batch, keys, forward, device), None
        return unknown(call, f"its {keys} tokens are not the {forward.text_length} of the text"), None
    return _latents(call, forward, keys), None


def _text(batch: int, length: int, forward: DenoiserForward, device: torch.device) -> TokenMap:
    """Text alone, less its padding."""
    tokens = laid_out(batch, [Piece("text", length)], device)
    if forward.samples and len(forward.samples) == batch:
        real = torch.arange(length)[None] < torch.tensor(forward.samples)[:, None]
        tokens.roles["text"], tokens.roles["padding"] = real.to(device), ~real.to(device)
    elif forward.text_mask is not None and forward.text_mask.shape[1] == length:
        _mark_padding(tokens, forward, 0)
    return tokens


def _latents(call: Call, forward: DenoiserForward, length: int) -> TokenMap:
    """The latents alone: all of them, or, folded into the batch, the places of one frame or the frames of one place."""
    assert call.site is not None
    latents, batch, device = forward.latents, call.batch, call.query.device
    if call.site.kind == "temporal" or call.site.stack.endswith(".motion"):
        for raster in latents.sizes():
            if length == raster.frames and batch == forward.batch * raster.height * raster.width:
                frames = Raster(raster.frames, 1, 1)
                tokens = laid_out(batch, [Piece("image", length, frames)], device)
                tokens.roles["frame"] = tokens.roles["image"]
                return tokens
        return unknown(call, f"{batch} rows of {length} tokens are not the frames of {latents.told}")
    if latents.mixed:
        return unknown(call, latents.reason)
    room = -(-(latents.count or 0) // forward.family.block) * forward.family.block
    if room and length == room and batch == forward.batch:
        return laid_out(batch, [*latents.pieces, Piece("padding", room - latents.count)], device, latents.reason)  # type: ignore
    for raster in latents.sizes():
        if length == raster.count and batch == forward.batch:
            return laid_out(batch, [Piece("image", length, raster)], device)
        if length == raster.height * raster.width and batch == forward.batch * raster.frames:
            return laid_out(batch, [Piece("image", length, replace(raster, frames=1))], device)
    return unknown(call, f"{batch} rows of {length} tokens are not {latents.told} in {forward.batch} rows")


def _context(call: Call, forward: DenoiserForward) -> TokenMap:
    """The keys of cross-attention."""
    keys = call.num_keys
    lengths = {"text": forward.text_length, "reference": forward.reference_length}
    roles = [role for role, length in lengths.items() if length == keys]
    if len(roles) == 1:
        if roles == ["text"] and forward.family.context == "text":
            return _text(call.batch, keys, forward, call.query.device)
        role = forward.family.context if roles == ["text"] else roles[0]
        return laid_out(call.batch, [Piece(role, keys)], call.query.device)
    said = " and ".join(f"{length} of {role}" for role, length in lengths.items() if length is not None)
    return unknown(call, f"its {keys} keys are not told apart by what the model was given: {said or 'no text'}")


def _added(call: Call, forward: DenoiserForward, processor: str) -> TokenMap:
    """Keys of a text beside those of the latents, for queries of the latents alone."""
    more, length = call.num_keys - call.num_queries, forward.text_length
    own = _latents(call, forward, call.num_queries)
    if own.unknown:
        return own
    image = Piece("image", call.num_queries, raster_of(own))
    family, added = forward.family, "AddedKV" in processor
    order = "text" if added else family.order
    if family.text and length is None and not added:
        order = None
    if more <= 0 or order is None or (family.text and length not in (None, more)):
        return unknown(call, f"{more} of its {call.num_keys} keys are no latents, and the text has {length} tokens")
    text = Piece("text" if family.text else "condition", more)
    tokens = laid_out(call.batch, [text, image] if order == "text" else [image, text], call.query.device)
    tokens.own = more if order == "text" else 0
    if family.text:
        _mark_padding(tokens, forward, 0 if order == "text" else call.num_queries)
    return tokens


def _mark_padding(tokens: TokenMap, forward: DenoiserForward, start: int) -> None:
    """Takes the padding out of the text, which begins at column `start`; rows repeat where a site folds frames into the batch."""
    mask = forward.text_mask
    if mask is not None and tokens.batch % mask.shape[0] == 0:
        mask = mask.to(tokens.roles["text"].device).repeat_interleave(tokens.batch // mask.shape[0], dim=0)
        tokens.roles["text"][:, start : start + mask.shape[1]] = mask
        tokens.roles["padding"][:, start : start + mask.shape[1]] = ~mask


def _prompted(call: Call, forward: DenoiserForward, processor: str) -> tuple[TokenMap, TokenMap | None]:
    """A call of an IP-Adapter: its images alone, or (SD3) after the latents."""
    more = call.num_keys - (call.num_queries if processor.startswith("SD3") else 0)
    queries = _latents(call, forward, call.num_queries)
    pieces = [Piece("reference", more)]
    if more < call.num_keys:
        pieces = [Piece("image", call.num_queries, raster_of(queries)), *pieces]
    return laid_out(call.batch, pieces, call.query.device), queries
