"""Prompts with a few possible answers, of which a model chooses by the logits of their first tokens: for searches over heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....interventions import ReattendError

Example = tuple[str, str] | tuple[str, str, Sequence[str]]
Batch = tuple[dict[str, Any], list["Choice"]]


@dataclass
class Choice:
    """A prompt's tokens, the first tokens of its choices, and which choice is right. place: which example it was."""

    ids: list[int]
    choices: list[int]
    right: int
    place: int = 0


def read_choices(tokenizer: Any, examples: Sequence[Example]) -> list[Choice]:
    """Examples are (prompt, label) or (prompt, label, choices), where all labels are the choices unless some are given.

    Raises ReattendError where they cannot be judged, such as choices that begin with the same token.
    """
    if not examples:
        raise ReattendError("data must hold at least one (prompt, label)")
    labels = list(dict.fromkeys(e[1] for e in examples))
    result = []
    for place, example in enumerate(examples):
        prompt, label = example[0], example[1]
        choices = list(example[2]) if len(example) > 2 else labels
        if label not in choices or len(choices) < 2:
            raise ReattendError(f"data: label {label!r} must be one of at least two choices, got {choices}")
        ids = list(tokenizer(prompt)["input_ids"])
        first = [first_token(tokenizer, prompt, ids, choice) for choice in choices]
        if len(set(first)) < len(first):
            raise ReattendError(
                f"data: the choices {choices} must begin with different tokens, since the model chooses by those"
            )
        result.append(Choice(ids, first, choices.index(label), place))
    return result


def first_token(tokenizer: Any, prompt: str, ids: list[int], choice: str) -> int:
    """The token that a choice begins with after its prompt, however the tokenizer treats spaces."""
    whole = list(tokenizer(prompt + choice)["input_ids"])
    if whole[: len(ids)] == ids and len(whole) > len(ids):
        return whole[len(ids)]
    return tokenizer(choice, add_special_tokens=False)["input_ids"][0]


def batches_of(model: Any, tokenizer: Any, questions: list[Choice], size: int) -> list[Batch]:
    """Left-padded batches of prompts of similar length."""
    accepted = inspect.signature(type(model).forward).parameters
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    order = sorted(questions, key=lambda q: len(q.ids))
    result = []
    for part in (order[i : i + size] for i in range(0, len(order), size)):
        width = max(len(q.ids) for q in part)
        ids = torch.tensor([[filler] * (width - len(q.ids)) + q.ids for q in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(q.ids)) + [1] * len(q.ids) for q in part], device=model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        result.append((inputs, part))
    return result


def last_logits(model: Any, batches: list[Batch]) -> Iterator[tuple[Choice, Tensor]]:
    """(question, logits [vocabulary] after its prompt), float32 on the CPU, under whatever session is active."""
    for inputs, part in batches:
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits[:, -1].float().cpu()
        yield from zip(part, logits, strict=True)


def lead_of(model: Any, batches: list[Batch]) -> float:
    """Mean over questions of the right choice's logit minus the best other one's, in nats."""
    leads = []
    for q, logits in last_logits(model, batches):
        values = logits[q.choices].tolist()
        leads.append(values[q.right] - max(v for i, v in enumerate(values) if i != q.right))
    return sum(leads) / len(leads)
