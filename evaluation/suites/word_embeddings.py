"""Words made stronger in the encoded prompt, before the denoiser sees it: what users do without a recipe."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError


def scaled(pipe: Any, prompts: Sequence[str], words: Sequence[Sequence[str]], factor: float) -> dict[str, Tensor]:
    """Arguments of a pipeline's call: prompts whose words' columns are e + factor (z - e), with e the empty prompt's and z their own.

    words: those of each prompt, in all places where they stand. The pooled texts stay the prompt's. Raises ReattendError for a pipeline that
    has no CLIP tokenizer, or reads its prompts with a T5 too.
    """
    kind = type(pipe).__name__
    if getattr(pipe, "tokenizer_3", None) is not None or "CLIP" not in type(getattr(pipe, "tokenizer", None)).__name__:
        raise ReattendError(
            f"words of an encoded prompt are scaled for pipelines with CLIP text encoders alone, and {kind} has others"
        )
    # without a negative prompt a pipeline encodes the empty one
    given = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    known = inspect.signature(pipe.encode_prompt).parameters
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt=list(prompts),
            device=pipe._execution_device,
            **{name: value for name, value in given.items() if name in known},
        )
    if len(found) not in (2, 4):
        raise ReattendError(f"{kind} encodes its prompts in a form in which words cannot be scaled")
    own, empty, *pooled = found
    own = own.clone()
    read = pipe.tokenizer(
        list(prompts), truncation=True, max_length=pipe.tokenizer.model_max_length, return_offsets_mapping=True
    )
    for row, (prompt, chosen, offsets) in enumerate(zip(prompts, words, read["offset_mapping"], strict=True)):
        places = [found.span() for word in chosen for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt)]
        columns = [c for c, (a, b) in enumerate(offsets) if any(a < stop and start < b for start, stop in places)]
        own[row, columns] = empty[row, columns] + factor * (own[row, columns] - empty[row, columns])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, (own, empty, *pooled), strict=False))
