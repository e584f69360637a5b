"""Where image and text lie in a joint stream, by the facts of the denoiser's class (`sites.families`).

Nothing here is believed without the number of tokens: what the latents and the text make has to be what the call has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import Call, TokenGrid, TokenMap
from .rasters import Piece, Raster


def laid_out(batch: int, pieces: Sequence[Piece], device: torch.device, gridless: str = "") -> TokenMap:
    """The map of rows that all have these tokens, in this order."""
    length = sum(piece.count for piece in pieces)
    roles = {name: torch.zeros(batch, length, dtype=torch.bool, device=device) for name in ("image", "text", "padding")}
    tokens = TokenMap(batch, length, length, roles, gridless=gridless)
    start = 0
    for piece in pieces:
        if piece.role not in roles:
            roles[piece.role] = torch.zeros_like(roles["image"])
        roles[piece.role][:, start : start + piece.count] = True
        if piece.raster is not None:
            own = piece.raster
            index = torch.arange(start, start + own.count, device=device).view(own.frames, own.height, own.width)
            tokens.grids += [TokenGrid(row, index, piece.role, own.whole) for row in range(batch)]
        start += piece.count
    tokens.grids.sort(key=lambda grid: grid.row)
    return tokens


def raster_of(tokens: TokenMap) -> Raster | None:
    """The raster of the image of a map's first row."""
    return next((Raster(*grid.shape) for grid in tokens.grids if grid.role == "image"), None)


def unknown(call: Call, reason: str) -> TokenMap:
    """The map of a call whose tokens cannot be told apart."""
    assert call.site is not None
    reason = f"{call.site.name}: {reason}"
    return TokenMap(call.batch, call.num_keys, call.num_keys, unknown=reason, gridless=reason)


def joint_stream(call: Call, forward: Any, sample: int | None) -> TokenMap:
    """The map of a call whose queries and keys are image and text together. sample: whose tokens these are, in models that make a call
    per sample."""
    family, latents, name = forward.family, forward.latents, type(forward.denoiser).__name__
    if family.order is None:
        return unknown(call, f"the order of image and text tokens in {name} is not known")
    if forward.text_length is None:
        return unknown(call, f"{name} was called without {' and '.join(family.text)}, so its text tokens are not known")
    if latents.mixed or latents.count is None:
        return unknown(call, latents.reason)
    if forward.samples or family.ragged:
        return _ragged(call, forward)
    text = forward.text_length
    if sample is not None and forward.text_mask is not None:
        text = int(forward.text_mask[sample].sum())
    registers = getattr(forward.denoiser, family.registers).shape[1] if family.registers else 0
    spare = _spare(call, forward, registers + text)
    found = registers + text + latents.count + spare
    if found != call.num_keys or (sample is None and call.batch != forward.batch):
        return unknown(
            call,
            f"{call.batch} rows of {call.num_keys} tokens are not the {text} of the text and {latents.told} in {forward.batch} rows",
        )
    image = [*latents.pieces, Piece("padding", spare)]
    words = [Piece("register", registers), Piece("text", text)]
    pieces = [piece for piece in (words + image if family.order == "text" else image + words) if piece.count]
    tokens = laid_out(call.batch, pieces, call.query.device, latents.reason)
    if forward.text_mask is not None and sample is None:
        mask = forward.text_mask.to(call.query.device)
        start = registers if family.order == "text" else call.num_keys - text
        tokens.roles["text"][:, start : start + text] = mask
        tokens.roles["padding"][:, start : start + text] = ~mask
    return tokens


def _spare(call: Call, forward: Any, text: int) -> int:
    """How many empty places follow the image, in models that fill images up to a fixed number of tokens."""
    most = getattr(forward.denoiser, "max_seq", None)
    return (
        most - forward.latents.count
        if isinstance(most, int) and call.num_keys == text + most > text + forward.latents.count
        else 0
    )


def _ragged(call: Call, forward: Any) -> TokenMap:
    """Streams whose samples have text of different lengths, with the empty places of the shorter ones at the end."""
    family, latents, count, device = forward.family, forward.latents, forward.latents.count, call.query.device
    lengths: Tensor = (
        torch.tensor(forward.samples, device=device)
        if forward.samples
        else torch.full((forward.batch,), forward.text_length, device=device)
        if forward.text_mask is None
        else forward.text_mask.to(device).sum(dim=1)
    )
    filled = [-(-size // family.block) * family.block for size in lengths.tolist()]
    room = -(-count // family.block) * family.block
    if call.batch != forward.batch or call.num_keys != room + max(filled):
        said = f"texts of {sorted(set(lengths.tolist()))} tokens and {latents.told}, filled up to multiples of {family.block}"
        return unknown(call, f"{call.batch} rows of {call.num_keys} tokens are not {said}")
    tokens = laid_out(call.batch, [Piece("padding", call.num_keys)], device)
    tokens.gridless = latents.reason
    for row, (text, places) in enumerate(zip(lengths.tolist(), filled, strict=True)):
        at = 0 if family.order == "text" else room
        tokens.roles["text"][row, at : at + text] = True
        start = places if family.order == "text" else 0
        for piece in latents.pieces:
            tokens.roles.setdefault(piece.role, torch.zeros_like(tokens.roles["text"]))[row, start : start + piece.count] = True
            if piece.raster is not None:
                shape = (piece.raster.frames, piece.raster.height, piece.raster.width)
                tokens.grids.append(
                    TokenGrid(row, torch.arange(start, start + piece.count, device=device).view(shape), piece.role)
                )
            start += piece.count
    tokens.roles["padding"] = ~torch.stack([marked for role, marked in tokens.roles.items() if role != "padding"]).any(dim=0)
    return tokens
