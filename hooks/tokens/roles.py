"""Roles of tokens, from what a forward pass was given: ids, padding mask, image grids, and the tokenizer's chat template."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...interventions import TokenMap
from .chat import add_chat_roles, has_template
from .images import add_images, image_roles
from .spans import BEGIN_EARLIER, tokenizer_of
from .transcript import Transcript, transcripts


def build_roles(
    tokens: TokenMap,
    model: Any,
    ids: Tensor | None,
    mask: Any,
    given: dict[str, Any],
    sessions: Sequence[Any],
    later: Tensor | None = None,
    padding: Tensor | None = None,
) -> None:
    """Fills tokens.roles and tokens.grids. Raises ReattendError when a span that a session asked for is not in the prompt.

    later [B, n]: ids of the prompt that come in further chunks, where passages may lie. padding [B, m] bool: what is known of the
    tokens that a mask of new tokens alone does not speak of.
    """
    prompt, is_decoder_side = tokens.prompt_length, _is_decoder_side(model, ids, given)
    # roles are kept on the CPU: an accelerator is asked for its ids once, and for nothing after that
    ids, later = (None if x is None else x.cpu() for x in (ids, later))
    padding = tokens.roles["padding"] = padding_of(mask, tokens.batch, prompt, padding)
    # the first real token: models park attention there whether or not it is a BOS token
    real = ~padding
    real[:, : tokens.virtual] = False
    tokens.roles["bos"] = real & (real.cumsum(dim=1) == 1)
    if ids is None:
        tokens.blind = True
    elif tokens.unread:
        # roles that are found by id would leave out those that nobody has read
        tokens.blind = True
        tokens.unknown = f"{tokens.unread} tokens of this sequence were read when this session did not look: {BEGIN_EARLIER}"
    else:
        add_images(tokens, model, ids, given)
    if is_decoder_side:
        return
    if later is None:
        add_text_roles(tokens, ids, sessions)
        return
    assert ids is not None
    whole = TokenMap(
        tokens.batch, prompt + later.shape[1], prompt + later.shape[1], virtual=tokens.virtual, unread=tokens.unread
    )
    whole.roles = {role: pad(marked, (0, later.shape[1])) for role, marked in tokens.roles.items()}
    found = torch.cat([ids, later], dim=1)
    whole.roles.update(image_roles(model, found))
    add_text_roles(whole, found, sessions)
    by_id = ("image", "video")
    tokens.roles = {**{role: marked for role, marked in whole.roles.items() if role not in by_id}, **tokens.roles}


def padding_of(mask: Any, batch: int, prompt: int, known: Tensor | None = None) -> Tensor:
    """Bool [batch, prompt]: padded positions, from a 2-d mask or from the 4-d masks that `generate` prepares for static caches.

    known [batch, n]: the padding of the first n positions, for masks that do not reach back to them.
    """
    before = torch.zeros(batch, 0, dtype=torch.bool) if known is None else known[:, :prompt]
    before = pad(before, (0, prompt - before.shape[1]))
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] >= prompt:
        # whatever the window, a real token sees itself and a padded one is seen by nobody
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        mask = seen.any(dim=1)[:, :prompt].expand(batch, -1)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
        return before
    padding = ~mask[:, :prompt].bool().cpu()
    return torch.cat([before[:, : prompt - padding.shape[1]], padding], dim=1)


def add_text_roles(tokens: TokenMap, ids: Tensor | None, sessions: Sequence[Any]) -> None:
    """The roles that follow from the prompt's text: who speaks, and each session's own spans."""
    texts: dict[int, list[Transcript]] = {}

    def read(tokenizer: Any) -> list[Transcript] | None:
        if tokenizer is None or ids is None:
            return None
        if id(tokenizer) not in texts:
            texts[id(tokenizer)] = transcripts(ids, tokens.roles["padding"], tokenizer)
        return texts[id(tokenizer)]

    speaker = next((s.tokenizer for s in sessions if has_template(s.tokenizer)), None)
    rows = read(tokenizer_of(speaker))
    if rows is not None:
        add_chat_roles(tokens, speaker, rows)
    for session in sessions:
        for step in session.spans:
            step.mark(tokens, ids, session.tokenizer, functools.partial(read, tokenizer_of(session.tokenizer)))


def _is_decoder_side(model: Any, ids: Tensor | None, given: dict[str, Any]) -> bool:
    """Whether these are the decoder's tokens of an encoder-decoder model, whose prompt is what the encoder reads."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    read = given.get("input_ids")
    return ids is None or not isinstance(read, Tensor) or ids.data_ptr() != read.data_ptr()
