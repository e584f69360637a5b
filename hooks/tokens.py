"""Roles of tokens, from what a forward pass was given: ids, padding mask, image grids, and the tokenizer's chat template."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..interventions import TokenMap
from .chat import add_chat_roles, has_template
from .images import add_images
from .question import Question, add_question
from .segments import Segments, add_segments
from .spans import add_spans, tokenizer_of
from .transcript import Transcript, transcripts


def build_roles(tokens: TokenMap, model: Any, ids: Tensor | None, mask: Any, given: dict[str, Any], sessions: list) -> None:
    """Fills tokens.roles and tokens.images. Raises ReattendError when a span that a session asked for is not in the prompt."""
    prompt = tokens.prompt_length
    padding = tokens.roles["padding"] = padding_of(mask, tokens.batch, prompt)
    # the first real token: models park attention there whether or not it is a BOS token
    real = ~padding
    tokens.roles["bos"] = real & (real.cumsum(dim=1) == 1)
    if ids is None:
        tokens.blind = True
    else:
        add_images(tokens, model, ids, given)
    if not _is_decoder_side(model, ids, given):
        add_text_roles(tokens, ids, sessions)


def padding_of(mask: Any, batch: int, prompt: int) -> Tensor:
    """Bool [batch, prompt]: padded positions, from a 2-d mask or from the 4-d masks that `generate` prepares for static caches."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] >= prompt:
        # whatever the window, a real token sees itself and a padded one is seen by nobody
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
        mask = seen.any(dim=1)[:, :prompt].expand(batch, -1)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
        return torch.zeros(batch, prompt, dtype=torch.bool)
    padding = ~mask[:, :prompt].bool().cpu()
    return torch.nn.functional.pad(padding, (max(0, prompt - padding.shape[1]), 0))


def add_text_roles(tokens: TokenMap, ids: Tensor | None, sessions: list) -> None:
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
        for spans in session.spans:
            own = functools.partial(read, tokenizer_of(session.tokenizer))
            if isinstance(spans, Segments):
                add_segments(tokens, ids, spans, own)
            elif isinstance(spans, Question):
                add_question(tokens, ids, spans, session.tokenizer, own)
            else:
                add_spans(tokens, ids, spans, own)


def _is_decoder_side(model: Any, ids: Tensor | None, given: dict[str, Any]) -> bool:
    """Whether these are the decoder's tokens of an encoder-decoder model, whose prompt is what the encoder reads."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    read = given.get("input_ids")
    return ids is None or not isinstance(read, Tensor) or ids.data_ptr() != read.data_ptr()
