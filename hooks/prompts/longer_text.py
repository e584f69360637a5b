"""A denoiser's text with a second one after it, in the same stream: its arguments, and the columns where it ends up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...interventions import Call, ReattendError
from ..actions import RootCall
from ..sites.families import family_of
from .second_text import MASKS, Encoded


def lengthening_misfit(denoiser: nn.Module) -> str:
    """Why a denoiser's text cannot be made longer, or ""."""
    family, name = family_of(denoiser), type(denoiser).__name__
    if name.startswith("Wan") and any(key.endswith("add_k_proj") for key, _ in denoiser.named_modules()):
        return f"{name} with an image beside its text takes the last 512 tokens for the text, so there is no place after it"
    patches = getattr(denoiser, "patch_embed", None)
    places = getattr(patches, "max_text_seq_length", None)
    if getattr(patches, "use_positional_embeddings", False) and places is not None:
        return f"{name} has places for {places} text tokens, so there is none after them"
    if hasattr(denoiser, "text_embedding_padding") or len(family.text) != 1:
        return f"{name} joins its text from several inputs, so there is no place after it"
    if family.ragged or family.per_sample or family.block > 1:
        return f"{name} lays out the text of each sample by its length, so there is no place after it"
    return ""


def lengthened(given: Mapping[str, Any], text: Encoded, number: Tensor) -> dict[str, Any]:
    """The arguments of a call with a second text after each row's own, by name. number long [B]: which one; -1 where there is to be none.
    A model without a mask of its text sees what fills up a shorter one, until `words_at` hides it.

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
        found[mask] = torch.cat([given[mask][:, : own.shape[1]], words, given[mask][:, own.shape[1] :]], dim=1)
    if isinstance(given.get("txt_seq_lens"), list):
        found["txt_seq_lens"] = [length + text.embeds.shape[1] for length in given["txt_seq_lens"]]
    ids = given.get("txt_ids")
    if isinstance(ids, Tensor):
        if not bool((ids == ids[..., :1, :]).all()):
            raise ReattendError("this model numbers its text tokens, and which numbers a second text has is not known")
        found["txt_ids"] = torch.cat([ids, ids[..., :1, :].expand(*ids.shape[:-2], text.embeds.shape[1], -1)], dim=-2)
    return found


def level(call: RootCall, text: Encoded, store: dict[Any, Any]) -> Encoded:
    """A second text as long as a call's prompt: it is filled up, or, where it is the longer one, the prompt is.

    store: gets both `lengths`, and whether what fills them up has to be hidden at the sites (`filled`), since the model has no mask for it.
    """
    own = call.given.get("encoder_hidden_states")
    if not isinstance(own, Tensor) or own.dim() != 3 or own.shape[2] != text.embeds.shape[2]:
        return text  # what `arguments` says more of
    prompt, second = store["lengths"] = own.shape[1], text.embeds.shape[1]
    store["filled"] = prompt != second and not any(isinstance(call.given.get(name), Tensor) for name in MASKS)
    if second > prompt:
        blank = Encoded(text.embeds.new_zeros(1, second - prompt, own.shape[2]))
        put(call, lengthened(call.given, blank, torch.full((len(own),), -1)))
    if second < prompt:
        mask = torch.ones(text.embeds.shape[:2], dtype=torch.bool, device=own.device) if text.mask is None else text.mask
        more = prompt - second
        words = None if text.words is None else pad(text.words, (0, more))
        text = Encoded(pad(text.embeds, (0, 0, 0, more)), text.pooled, pad(mask, (0, more)), words)
    return text


def padding_of(call: Call, lengths: Tensor) -> Tensor:
    """Bool [B, Tk]: the text columns after the first `lengths` [B] of each row."""
    text = _stream(call)
    return text & (text.cumsum(dim=1) > lengths.to(text.device)[:, None])


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


def words_at(call: Call, words: Tensor, later: int = 0) -> Tensor:
    """Bool [B, Tk]: words bool [B, n] of the last n tokens of each row's text stream, padding too, where these are among the keys. later: how
    many further tokens come after them. Raises ReattendError where that is not known."""
    text, length = _stream(call), words.shape[1]
    place = text.cumsum(dim=1)
    place = place - 1 - (place[:, -1:] - later - length)  # among these, from 0
    if not length:
        return torch.zeros_like(text)
    return text & (place >= 0) & (place < length) & words.to(text.device).gather(1, place.clamp(0, length - 1))


def _stream(call: Call) -> Tensor:
    """Bool [B, Tk]: the text among the keys, padding too."""
    text = call.columns("text")
    return text | call.columns("padding") if call.tokens is not None and "padding" in call.tokens else text
