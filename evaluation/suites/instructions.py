"""Instruction following under highlighting: a question with a rule for the form of the answer, the rule marked, obeyed or not by code."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ..material.questions import CAPITALS
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

TOPICS = (
    "What is the capital of {0}?", "Tell me something about {0}.", "Why do people visit {0}?", "What do people eat in {0}?",
    "What is the weather like in {0}?",
)  # fmt: skip
LONGEST_ANSWER = 24


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalpha())


# rule: (what the prompt says, whether an answer obeys). Answers may be cut off after LONGEST_ANSWER tokens: no rule looks at their end.
RULES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "capitals": ("Answer in capital letters only.", lambda text: _letters(text).isupper()),
    "small": ("Do not use any capital letter in your answer.", lambda text: _letters(text).islower()),
    "one_word": ("Answer with one single word.", lambda text: len(_words(text)) == 1),
    "begin": ('Begin your answer with the word "Honestly".', lambda text: text.lstrip(' "').lower().startswith("honestly")),
    "number": ("Begin your answer with a number.", lambda text: text.lstrip(' "')[:1].isdigit()),
    "list": ("Answer with a list; begin each line with a dash.", lambda text: text.lstrip().startswith(("-", "–", "—"))),
}


class Instructions(Suite):
    name: ClassVar[str] = "instructions"
    kind: ClassVar = "llm"
    does: ClassVar[str] = (
        "Questions with a rule for the answer's form (capitals, one word, a list), the rule marked: how often it is obeyed."
    )
    shown: ClassVar[Sequence[str] | None] = ("obeyed",)
    marks: ClassVar[Sequence[str]] = ("highlight",)

    def items(self, count: int, seed: int) -> list[Item]:
        countries = [pair.split(":")[0] for pair in CAPITALS.split()]
        items = []
        for i in range(count):
            rng = random.Random(f"instructions {seed} {i}")
            data = {
                "rule": list(RULES)[i % len(RULES)], "question": rng.choice(TOPICS).format(rng.choice(countries)),
                "first": rng.random() < 0.5,
            }  # fmt: skip
            items.append(Item(f"{seed}-{i}", data))
        return items

    def prompt(self, subject: Subject, item: Item) -> str:
        parts = [RULES[item.data["rule"]][0], item.data["question"]]
        return subject.chat(" ".join(parts if item.data["first"] else parts[::-1]))

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        with subject.marked(highlight=[[RULES[item.data["rule"]][0]] for item in items]):
            texts = subject.generate([self.prompt(subject, item) for item in items], max_new_tokens=LONGEST_ANSWER)
        return [
            {"rule": item.data["rule"], "question": item.data["question"], "said": text} for item, text in zip(items, texts)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        obeyed = bool(record["said"].strip()) and RULES[record["rule"]][1](record["said"])
        return {"asked": 1, "obeyed": obeyed, f"asked {record['rule']}": 1, f"obeyed {record['rule']}": obeyed}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "obeyed": ratio(sums["obeyed"], sums["asked"]),
            **{f"obeyed_{rule}": ratio(sums[f"obeyed {rule}"], sums[f"asked {rule}"]) for rule in RULES},
        }
