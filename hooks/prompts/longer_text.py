"""A denoiser's text with a second one after it, in the same stream: its arguments, and the columns where it ends up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Call, ReattendError
from ..actions import RootCall
from ..sites.families import family_of
from .second_text import MASKS, Encoded


def lengthening_misfit(denoiser: nn.Module) -> str:
    """Why a denoiser's text cannot be made longer, or ""."""
    family, name = family_of(denoiser), type(denoiser).__name__
    if hasattr(denoiser, "text_embedding_padding") or len(family.text) != 1:
        return f"{name} joins its text from several inputs, so there is no place after it"
    if family.ragged or family.per_sample or family.block > 1:
        return f"{name} lays out the text of each sample by its length, so there is no place after it"
    return ""


def lengthened(given: Mapping[str, Any], text: Encoded, number: Tensor) -> dict[str, Any]:
    """The arguments of a call with a second text after each row's own, by name. number long [B]: which one; -1 where there is to be none.

    Raises ReattendError for a text of another width, and for tokens whose positions are numbered.
    """
    own = given.get("encoder_hidden_states")
    if not isinstance(own, Tensor) or own.dim() != 3 or own.shape[2] != text.embeds.shape[2]:
        width = own.shape[-1] if isinstance(own, Tensor) else "no"
        raise ReattendError(f"prompt_embeds of the second text are {text.embeds.shape[2]} wide, those of the prompt {width}")
    number = number.repeat_interleave(len(own) // len(number)).to(own.device)
    # something has to stand in rows without one: nobody sees it there
    more = text.embeds.to(own)[number.clamp_min(0)]
    found: dict[str, Any] = {"encoder_hidden_states": torch.cat([own, more], dim=1)}
    mask = next((name for name in MASKS if isinstance(given.get(name), Tensor)), None)
    if mask is not None:
        words = torch.ones(text.embeds.shape[:2]) if text.mask is None else text.mask
        words = words.to(given[mask])[number.clamp_min(0)] * (number >= 0)[:, None].to(given[mask])
        found[mask] = torch.cat([given[mask], words.to(given[mask])], dim=1)
    elif text.mask is not None and not bool(text.mask.all()):
        raise ReattendError("this model is called without a mask of its text: leave prompt_attention_mask out")
    if isinstance(given.get("txt_seq_lens"), list):
        found["txt_seq_lens"] = [length + text.embeds.shape[1] for length in given["txt_seq_lens"]]
    ids = given.get("txt_ids")
    if isinstance(ids, Tensor):
        if not bool((ids == ids[..., :1, :]).all()):
            raise ReattendError("this model numbers its text tokens, and which numbers a second text has is not known")
        found["txt_ids"] = torch.cat([ids, ids[..., :1, :].expand(*ids.shape[:-2], text.embeds.shape[1], -1)], dim=-2)
    return found


def put(call: RootCall, changes: Mapping[str, Any]) -> None:
    """Other arguments for a pass, by name."""
    args, kwargs = list(call.args), dict(call.kwargs)
    for name, value in changes.items():
        place = list(call.names).index(name)
        if place < len(args):
            args[place] = value
        else:
            kwargs[name] = value
    call.replace(tuple(args), kwargs)


def columns_of(call: Call, length: int) -> Tensor:
    """Bool [B, Tk]: where the last `length` tokens of the text stream are among the keys, padding too. Raises ReattendError where that is
    not known."""
    text = call.columns("text")
    if call.tokens is not None and "padding" in call.tokens:
        text = text | call.columns("padding")
    place = text.cumsum(dim=1)
    return text & (place > place[:, -1:] - length)
