"""Perplexity of real prose at several context lengths: the same passages, with ever more of the text before them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from ...interventions import ReattendError
from ..likelihood import token_losses
from ..material import prose
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

CHARACTERS_PER_TOKEN = 12  # more than any tokenizer needs for prose, so that enough context is read


class Perplexity(Suite):
    name: ClassVar[str] = "perplexity"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Perplexity of passages of Python's manual after contexts of several lengths."
    batch: ClassVar[int] = 4

    lengths: tuple[int, ...] = Field((16, 64, 256), min_length=1, description="tokens of context before each passage")
    passage: int = Field(160, ge=20, le=5000, description="characters of each passage")

    @field_validator("lengths")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("lengths must be different numbers of tokens, 1 or more")
        return value

    @property
    def lower(self) -> Sequence[str]:  # type: ignore[override]
        return [f"{name}_{length}" for name in ("perplexity", "bits_per_byte") for length in self.lengths]

    def items(self, count: int, seed: int) -> list[Item]:
        text = prose.text()
        first, last = max(self.lengths) * CHARACTERS_PER_TOKEN, len(text) - self.passage
        if first >= last:
            raise ReattendError(
                f"lengths: the text has {len(text)} characters, too few for contexts of {max(self.lengths)} tokens"
            )
        items = []
        for i in range(count):
            # a place in every stretch of the text, so that no passage comes up twice before the text is used up
            rng = random.Random(f"perplexity {seed} {i}")
            start = text.rfind(" ", 0, first + int((i + rng.random()) / count * (last - first)))
            stop = text.find(" ", start + self.passage)
            items.append(Item(f"{seed}-{i}", {"start": start, "stop": stop if stop > 0 else len(text), "text": prose.digest()}))
        return items

    def rows(self, tokenizer: Any, item: Item) -> tuple[list[int], list[int]]:
        """(tokens of the text before the passage, as many as the longest context; tokens of the passage)."""
        text, start = prose.text(), item.data["start"]
        if item.data["text"] != prose.digest():
            raise ReattendError("these items were made from another version of Python's manual: make them anew")
        before = text[max(0, start - max(self.lengths) * CHARACTERS_PER_TOKEN) : start]
        context = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
        passage = tokenizer(text[start : item.data["stop"]], add_special_tokens=False)["input_ids"]
        return list(context[-max(self.lengths) :]), list(passage)

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        rows = [self.rows(subject.tokenizer, item) for item in items]
        records: list[dict[str, Any]] = [
            {"tokens": len(passage), "bytes": len(prose.text()[item.data["start"] : item.data["stop"]].encode()), "loss": {}}
            for (_, passage), item in zip(rows, items)
        ]
        for length in self.lengths:
            losses = token_losses(subject, [c[-length:] + p for c, p in rows], [len(p) for _, p in rows])
            for record, loss in zip(records, losses):
                record["loss"][str(length)] = sum(loss)
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        losses = {f"loss {length}": loss for length, loss in record["loss"].items()}
        return {"tokens": record["tokens"], "bytes": record["bytes"], **losses}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        found = {}
        for length in self.lengths:
            found[f"perplexity_{length}"] = np.exp(ratio(sums[f"loss {length}"], sums["tokens"]))
        for length in self.lengths:
            found[f"bits_per_byte_{length}"] = ratio(sums[f"loss {length}"], sums["bytes"]) / np.log(2)
        return found
