"""Who called the model: what a forward pass's arguments do not say and the call stack does.

Which call of `generate` it belongs to, which of its tokens are drafts, which tokens of the prompt are still to come, and how many
virtual tokens PEFT has put before the user's. Looked up for passes that read a prompt, never for a step of cached decoding.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

GENERATION = "transformers.generation.utils"
PEFT = "peft.peft_model"


@dataclass(frozen=True)
class Caller:
    """call: the same object in all passes of one call of generate, None elsewhere. assistant: this pass drafts for another one.
    beams: rows may change places between passes. copies: how many rows there are of each prompt (beams, several answers). drafts: tokens
    at the end that may be taken back. virtual: tokens of PEFT's."""

    call: Any = None
    whole: Tensor | None = None
    assistant: bool = False
    beams: bool = False
    copies: int = 1
    drafts: int = 0
    virtual: int = 0

    def to_come(self, ids: Tensor, past: int, began: int) -> Tensor | None:
        """[B, n] long: what follows on these tokens in the prompt of this call of generate; None for nothing, or not known.

        past: tokens before this pass. began: tokens before the call.
        """
        whole, width = self.whole, ids.shape[1]
        if whole is None or whole.dim() != 2 or whole.shape[0] != ids.shape[0]:
            return None
        # generate is given the whole text of a conversation, or what is new in it
        for start in (past, past - began):
            piece = whole[:, start : start + width]
            if start + width < whole.shape[1] and torch.equal(piece.to(ids.device), ids):
                return whole[:, start + width :]
        return None


def caller(given: dict[str, Any], width: int) -> Caller:
    """The caller of the forward pass under way."""
    generation, peft = (getattr(sys.modules.get(name), "__file__", None) for name in (GENERATION, PEFT))
    frame: FrameType | None = sys._getframe(1)
    call = whole = None
    assistant = beams = False
    copies, drafts, virtual = 1, 0, 0
    while frame is not None:
        code = frame.f_code
        if code.co_filename == generation:
            if code.co_name == "generate" and call is None:
                # its own copy of the settings lives as long as the call, and belongs to no other one
                settings = frame.f_locals.get("generation_config")
                call = None if settings is None else _reference(settings)
                copies = max(getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences"))
                if getattr(settings, "prefill_chunk_size", None) is not None:
                    whole = frame.f_locals.get("input_ids")
            elif code.co_name == "_assisted_decoding":
                assistant = call is not None
                drafts = 0 if assistant else _drafts(given, width, frame)
            elif code.co_name == "_beam_search":
                beams = True
        elif code.co_filename == peft and not virtual:
            settings = getattr(frame.f_locals.get("self"), "active_peft_config", None)
            virtual = virtual_tokens(settings)
        frame = frame.f_back
    return Caller(call, whole if isinstance(whole, Tensor) else None, assistant, beams, copies, drafts, virtual)


def virtual_tokens(settings: Any) -> int:
    """How many virtual tokens a PEFT configuration puts before the user's (prefix, prompt and P-tuning)."""
    return int(getattr(settings, "num_virtual_tokens", None) or 0) if getattr(settings, "is_prompt_learning", False) else 0


def _reference(settings: Any) -> Any:
    try:
        return weakref.ref(settings)
    except TypeError:
        return settings


def _drafts(given: dict[str, Any], width: int, frame: FrameType) -> int:
    """Drafted tokens among this pass's: assisted decoding asks for the logits of its drafts and of the token before them."""
    keep = given.get("logits_to_keep")
    count = keep - 1 if isinstance(keep, int) else frame.f_locals.get("candidate_length", 0)
    return count if isinstance(count, int) and 0 < count < width else 0
