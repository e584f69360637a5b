"""The same prompt without its images: for methods that compare what a model does with and without them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...interventions import ReattendError
from ..tokens.image_grids import runs
from .prompt import Prompt

# Config names of the tokens that open and close an image; what lies between them is the image's too (llama4's tile separators).
PAIRS = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
    ("video_start_token_id", "video_end_token_id"),
    ("boi_token_id", "eoi_token_id"),
)
# Families whose processors write so many tokens before and after each run of placeholders, and whose configs do not name them:
# <img> and </img>; the fake token with the row and column tag, then the next fake token or the end of the row.
NEIGHBOURS = {"internvl": (1, 1), "idefics3": (2, 1), "smolvlm": (2, 1), "fuyu": (0, 1)}
PIXTRAL = (0, 1)  # [IMG_BREAK] after each row, [IMG_END] after the last
# Arguments with one number per token, which stay with their tokens.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
# Their forward passes cannot do without pixels.
NEVER_WITHOUT = {"blip-2", "instructblip", "instructblipvideo", "idefics", "kosmos-2", "kosmos-2.5"}


def placeholders(ids: Tensor, config: Any) -> Tensor:
    """Bool [B, T]: the tokens that stand for images and videos."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for name in ("image_token_id", "video_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            found |= ids == token
    return found


def image_parts(ids: Tensor, config: Any) -> Tensor:
    """Bool [B, T]: placeholders and the tokens that processors write around and between them."""
    found = placeholders(ids, config)
    parts = found.clone()
    for start, end in ((getattr(config, a, None), getattr(config, b, None)) for a, b in PAIRS):
        opens, closes = ids == start if isinstance(start, int) else None, ids == end if isinstance(end, int) else None
        if opens is not None:
            parts |= opens
        if closes is not None:
            parts |= closes
        if opens is not None and closes is not None:
            depth = opens.long().cumsum(dim=1) - closes.long().cumsum(dim=1)
            # an opened image that is never closed would reach to the end of the prompt
            balanced = (depth[:, -1:] == 0) & (depth >= 0).all(dim=1, keepdim=True) & (depth <= 1).all(dim=1, keepdim=True)
            parts |= (depth > 0) & balanced
    family = getattr(config, "model_type", "")
    pixtral = getattr(getattr(config, "vision_config", None), "model_type", "") == "pixtral"
    before, after = PIXTRAL if pixtral else NEIGHBOURS.get(family, (0, 0))
    if before or after:
        for row, start, length in runs(found.cpu()):
            parts[row, max(0, start - before) : start + length + after] = True
    return parts


def without_images(prompt: Prompt, side: Literal["right", "left"] = "right") -> dict[str, Any]:
    """The arguments of a pass over the prompt's text alone: images and their wrapper tokens taken out, rows padded on one side.

    On the right, positions are left to the model, which counts them from each row's first token; on the left, where tokens can follow,
    they are given (`position_ids`). Raises ReattendError for prompts given as
    embeddings and for rows that hold nothing but images.
    """
    ids = prompt.arguments.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ReattendError(
            "a prompt can be run without its image only where its tokens are known: pass input_ids instead of embeds"
        )
    width = prompt.tokens.prompt_length
    ids = ids[:, :width]
    keep = prompt.tokens.positions("prompt", 0, width, ids.device) & ~image_parts(ids, prompt.config)
    lengths = keep.sum(dim=1)
    if not bool(lengths.all()):
        row = int((lengths == 0).nonzero()[0, 0])
        raise ReattendError(f"prompt {row} holds nothing but images: without them there is no text to compare with")
    longest = int(lengths.max())
    # a stable sort moves what is kept to one side in its order
    if side == "right":
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]
    else:
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, width - longest :]
        mask = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
    pad = getattr(prompt.config.get_text_config(), "pad_token_id", None)
    arguments: dict[str, Any] = {
        "input_ids": ids.gather(1, order).masked_fill(~mask, pad if isinstance(pad, int) and pad >= 0 else 0),
        "attention_mask": mask.long(),
    }
    if side == "left":
        arguments["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    for name in PER_TOKEN:
        value = prompt.arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] >= width:
            arguments[name] = value[:, :width].gather(1, order).masked_fill(~mask, 0)
    return arguments
