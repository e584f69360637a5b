"""Log-likelihoods of answers and of text: what a model would have written, without letting it write."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hooks.sites.discovery import pretrained_root
from ..hooks.trackers.caches import cache_name, cache_of
from ..interventions import ReattendError
from .subject import Subject


@dataclass(frozen=True)
class OptionScore:
    """logprob: natural log-probability of an option's tokens after its prompt, summed. top: greedy decoding would write just these."""

    logprob: float
    tokens: int
    top: bool


def option_scores(
    subject: Subject, prompts: Sequence[str], options: Sequence[Sequence[str]], **marks: list[list[str]]
) -> list[list[OptionScore]]:
    """For every prompt the log-likelihoods of its options, as continuations of the prompt's text.

    options[i]: with the space that parts them from the prompt, where one belongs there. marks: passages to mark, by kind, for
    every prompt (see `Subject.marked`). The prompt is one prefill and the options' tokens are decode steps after it, so recipes see
    what they would see in `generate`; options of one token each share the prefill of their prompt.
    Raises ReattendError for an empty prompt or option.
    """
    split = [[_split(subject, prompt, option) for option in those] for prompt, those in zip(prompts, options)]
    rows: list[_Row] = []
    # where to read each option: options of one token need no row of their own, one with the same prompt will do
    places: list[list[int]] = []
    for owner, those in enumerate(split):
        places.append([])
        for start, answer in sorted(those, key=lambda pair: -len(pair[1])):
            if len(answer) > 1 or not any(row.owner == owner and row.start == start for row in rows[-len(those) :]):
                rows.append(_Row(owner, start, answer))
        for start, answer in those:
            fits = [k for k, row in enumerate(rows) if row.owner == owner and row.start == start]
            places[-1].append(next(k for k in fits if len(answer) == 1 or rows[k].answer == answer))
    with subject.marked(**{kind: [passages[row.owner] for row in rows] for kind, passages in marks.items()}):
        first, followed = _follow(subject, rows)
    return [
        [
            followed[k]
            if rows[k].answer == answer
            else OptionScore(float(first[k, answer[0]]), 1, int(first[k].argmax()) == answer[0])
            for k, (_, answer) in zip(those, row)
        ]
        for those, row in zip(places, split)
    ]


def token_losses(subject: Subject, rows: Sequence[Sequence[int]], last: Sequence[int]) -> list[list[float]]:
    """Negative log-probability of each of the last `last[i]` tokens of row i, given the tokens before them; one forward pass."""
    if any(not 0 < n < len(row) for row, n in zip(rows, last)):
        raise ReattendError("every row needs at least one token before those that are scored")
    inputs = _padded(subject, rows)
    with torch.no_grad():
        logits = subject.module(**inputs, use_cache=False, **_kept(subject, max(last) + 1, inputs["input_ids"].shape[1])).logits
    logits = logits[:, -max(last) - 1 : -1].float().log_softmax(-1)
    targets = inputs["input_ids"][:, -max(last) :]
    found = -logits.gather(-1, targets[..., None])[..., 0]
    return [line[-n:].tolist() for line, n in zip(found, last)]


def written_losses(subject: Subject, prompts: Sequence[str], texts: Sequence[str]) -> list[list[float]]:
    """Negative log-probabilities of the tokens of what was written after each prompt; none for an empty text."""
    split = [_split(subject, prompt, text) if text else None for prompt, text in zip(prompts, texts)]
    some = [pair for pair in split if pair is not None]
    if not some:
        return [[] for _ in split]
    found = iter(token_losses(subject, [before + after for before, after in some], [len(after) for _, after in some]))
    return [next(found) if pair is not None else [] for pair in split]


def _split(subject: Subject, prompt: str, option: str) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the option), divided where the prompt's own tokens end."""
    tokenizer = subject.tokenizer
    special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
    before = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole = tokenizer(prompt + option, add_special_tokens=special)["input_ids"]
    # some tokenizers close every text with a token of their own
    while before and len(whole) > len(before) and before[-1] == whole[-1] and whole[: len(before)] != before:
        before, whole = before[:-1], whole[:-1]
    if not before or len(whole) <= len(before):
        raise ReattendError(f"options need a prompt of at least one token and text of their own, got {prompt!r} and {option!r}")
    return list(whole[: len(before)]), list(whole[len(before) :])


@dataclass(frozen=True)
class _Row:
    """One row of the batch: the tokens of a prompt, and of the option that follows it there."""

    owner: int
    start: list[int]
    answer: list[int]


def _follow(subject: Subject, rows: list[_Row]) -> tuple[Tensor, list[OptionScore]]:
    """(log-probabilities [rows, vocabulary] right after the prompts, scores of the rows' own options)."""
    longest = max(len(row.answer) for row in rows)
    decoder = _Decoder(subject, [row.start for row in rows], cached=longest > 1)
    first = decoder.logits
    total, top = [0.0] * len(rows), [True] * len(rows)
    for step in range(longest):
        best = decoder.logits.argmax(-1).tolist()
        for i, row in enumerate(rows):
            if step < len(row.answer):
                total[i] += float(decoder.logits[i, row.answer[step]])
                top[i] &= best[i] == row.answer[step]
        if step + 1 < longest:
            # rows whose option has ended go along; nobody reads them any more
            decoder.feed([row.answer[min(step, len(row.answer) - 1)] for row in rows])
    return first, [OptionScore(total[i], len(row.answer), top[i]) for i, row in enumerate(rows)]


class _Decoder:
    """A batch of prompts and the tokens fed after them. logits: log-probabilities [rows, vocabulary] of the next token, float32."""

    def __init__(self, subject: Subject, rows: list[list[int]], cached: bool = False) -> None:
        self.subject, self.inputs, self.cache = subject, _padded(subject, rows), None
        self.logits = self._run(self.inputs, use_cache=cached)

    def feed(self, tokens: list[int]) -> None:
        ids = torch.tensor(tokens, device=self.subject.device)[:, None]
        mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self.inputs:
            step["position_ids"] = self.inputs["position_ids"][:, -1:] + 1
        self.inputs = step
        self.logits = self._run(step, use_cache=True, **{cache_name(self.subject.module): self.cache})

    def _run(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        with torch.no_grad():
            out = self.subject.module(**inputs, **options, **_kept(self.subject, 1, inputs["input_ids"].shape[1]))
        self.cache = cache_of(out)
        return out.logits[:, -1].float().log_softmax(-1)


def _padded(subject: Subject, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows padded on the left, with the positions their tokens have without padding."""
    if getattr(getattr(subject.module, "config", None), "is_encoder_decoder", False):
        raise ReattendError(
            f"{type(subject.module).__name__} reads its prompt with an encoder: this suite needs a decoder that reads it"
        )
    tokenizer, width = subject.tokenizer, max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=subject.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=subject.device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if _takes(subject, "position_ids"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _kept(subject: Subject, count: int, width: int) -> dict[str, Tensor]:
    # the vocabulary's logits of a whole prompt can outweigh the model. As a number, more than 1 would look like drafts being checked
    if not _takes(subject, "logits_to_keep"):
        return {}
    return {"logits_to_keep": torch.arange(width - count, width, device=subject.device)}


def _takes(subject: Subject, name: str) -> bool:
    return name in inspect.signature(type(pretrained_root(subject.module)).forward).parameters
