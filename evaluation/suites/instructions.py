"""Instruction following under highlighting: a question with a rule for the form of the answer, the rule marked, obeyed or not by code."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ..material.questions import CAPITALS
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

TOPICS = (
    "Write one sentence about {0}.", "Tell me something about {0}.", "Why do people visit {0}?", "What do people eat in {0}?",
    "What is the weather like in {0}?",
)  # fmt: skip
LONGEST_ANSWER = 32


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isalpha())


# rule: (what the prompt says, whether an answer obeys), {w} and the second argument: a word drawn for the item. Answers may be cut off
# after LONGEST_ANSWER tokens, so no rule looks at their end.
RULES: dict[str, tuple[str, Callable[[str, str], bool]]] = {
    "word": ('Use the word "{w}" in your answer.', lambda text, w: re.search(rf"\b{w}s?\b", text.lower()) is not None),
    "capitals": ("Answer in capital letters only.", lambda text, w: _letters(text).isupper()),
    "small": ("Do not use any capital letter in your answer.", lambda text, w: _letters(text).islower()),
    "one_word": ("Answer with one single word.", lambda text, w: len(_words(text)) == 1),
    "begin": ('Begin your answer with "Honestly".', lambda text, w: text.lstrip(' "').lower().startswith("honestly")),
    "number": ("Begin your answer with a number.", lambda text, w: text.lstrip(' "')[:1].isdigit()),
    "list": ("Answer with a list; begin each line with a dash.", lambda text, w: text.lstrip().startswith(("-", "–", "—"))),
}
WORDS = "river|music|mountain|train|garden|market|football|bridge|forest|bread|coffee|museum|horse|island|school|winter"


class Instructions(Suite):
    name: ClassVar[str] = "instructions"
    kind: ClassVar = "llm"
    does: ClassVar[str] = (
        "Questions with a rule for the answer (use a word, capitals only, a list), the rule marked: how often it is obeyed."
    )
    shown: ClassVar[Sequence[str] | None] = ("obeyed",)
    marks: ClassVar[Sequence[str]] = ("highlight",)

    rules: tuple[str, ...] = Field(
        ("word",), min_length=1, description=f"rules, taken in turn: {', '.join(RULES)}; small models obey none but the first"
    )

    @field_validator("rules")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [rule for rule in value if rule not in RULES]:
            raise ValueError(f"unknown rule {unknown[0]!r}; rules are: {', '.join(RULES)}")
        return value

    def items(self, count: int, seed: int) -> list[Item]:
        countries = [pair.split(":")[0] for pair in CAPITALS.split()]
        items = []
        for i in range(count):
            rng = random.Random(f"instructions {seed} {i}")
            rule, word = self.rules[i % len(self.rules)], rng.choice(WORDS.split("|"))
            data = {
                "rule": rule, "text": RULES[rule][0].format(w=word), "word": word,
                "question": rng.choice(TOPICS).format(rng.choice(countries)), "first": rng.random() < 0.5,
            }  # fmt: skip
            items.append(Item(f"{seed}-{i}", data))
        return items

    def prompt(self, subject: Subject, item: Item) -> str:
        parts = [item.data["text"], item.data["question"]]
        return subject.chat(" ".join(parts if item.data["first"] else parts[::-1]))

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        with subject.marked(highlight=[[item.data["text"]] for item in items]):
            texts = subject.generate([self.prompt(subject, item) for item in items], max_new_tokens=LONGEST_ANSWER)
        kept = ("rule", "text", "word", "question")
        return [{**{name: item.data[name] for name in kept}, "said": text} for item, text in zip(items, texts)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        obeyed = bool(record["said"].strip()) and RULES[record["rule"]][1](record["said"], record["word"])
        return {"asked": 1, "obeyed": obeyed, f"asked {record['rule']}": 1, f"obeyed {record['rule']}": obeyed}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "obeyed": ratio(sums["obeyed"], sums["asked"]),
            **{f"obeyed_{rule}": ratio(sums[f"obeyed {rule}"], sums[f"asked {rule}"]) for rule in self.rules},
        }
