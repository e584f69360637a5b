"""What a model writes after prompts of a profiling run: greedy, in one batch padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def written(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], limit: int) -> list[tuple[list[int], str]]:
    """(new tokens, their text) after each row of tokens, up to an end or a line break, `limit` tokens at most."""
    width = max(len(row) for row in rows)
    pads = torch.tensor([width - len(row) for row in rows])
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = (torch.arange(width)[None] >= pads[:, None]).long().to(model.device)
    ends = _ends(model)
    with torch.no_grad():
        made = model.generate(ids, attention_mask=mask, generation_config=_greedy(limit, ends, filler))[:, width:].tolist()
    return [_first_line(tokenizer, set(ends), new) for new in made]


def _greedy(limit: int, ends: list[int], filler: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=limit, eos_token_id=ends or None, pad_token_id=filler)


def _ends(model: Any) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _first_line(tokenizer: Any, ends: set[int], new: list[int]) -> tuple[list[int], str]:
    kept = []
    for token in new:
        if token in ends or "\n" in tokenizer.decode([token]):
            break
        kept.append(token)
    return kept, tokenizer.decode(kept)
