"""Key-value retrieval: one entry of a JSON object of random keys and values (Liu et al. 2023, "Lost in the Middle", with short keys)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

THIRDS = ("first", "middle", "last")


class KeyValues(Suite):
    name: ClassVar[str] = "key-values"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Looks up one key of a JSON object of random keys: values given back exactly, by where they stand."
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_first", "accuracy_middle", "accuracy_last")
    batch: ClassVar[int] = 8

    pairs: int = Field(12, ge=3, le=1000, description="entries of the object")
    groups: int = Field(2, ge=1, le=8, description="groups of four hexadecimal digits in a key or value; a uuid has eight")

    def items(self, count: int, seed: int) -> list[Item]:
        items = []
        for i in range(count):
            rng = random.Random(f"key-values {seed} {i}")
            words: dict[str, None] = {}
            while len(words) < 2 * self.pairs:
                words["-".join(f"{rng.randrange(16**4):04x}" for _ in range(self.groups))] = None
            drawn = list(words)
            # the thirds of the object in turn, so that every count asks for all of them
            third = i % 3
            place = rng.randrange(third * self.pairs // 3, (third + 1) * self.pairs // 3)
            entries = dict(zip(drawn[: self.pairs], drawn[self.pairs :]))
            items.append(Item(f"{seed}-{i}", {"entries": entries, "key": drawn[place], "third": THIRDS[third]}))
        return items

    def prompt(self, subject: Subject, item: Item) -> str:
        shown = json.dumps(item.data["entries"], indent=0)
        question = f'Here is a JSON object:\n{shown}\n\nWhat is the value of the key "{item.data["key"]}"?'
        return subject.chat(question, answer=f'The value of the key "{item.data["key"]}" is "')

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        wanted = [item.data["entries"][item.data["key"]] for item in items]
        room = max(len(subject.tokenizer(value, add_special_tokens=False)["input_ids"]) for value in wanted) + 3
        texts = subject.generate([self.prompt(subject, item) for item in items], max_new_tokens=room)
        return [
            {"wanted": value, "said": text.strip().split("\n")[0], "third": item.data["third"]}
            for value, text, item in zip(wanted, texts, items)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        right = record["said"].strip(' "').startswith(record["wanted"])
        third = record["third"]
        return {"asked": 1, "right": right, f"asked {third}": 1, f"right {third}": right}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            **{f"accuracy_{third}": ratio(sums[f"right {third}"], sums[f"asked {third}"]) for third in THIRDS},
        }
