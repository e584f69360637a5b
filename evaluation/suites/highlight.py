"""The task that all prompt highlighters share: two facts contradict each other, and one of them is marked.

Every pair of facts is asked twice, once with each of the two marked; an untouched model prefers the marked one half of the time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..likelihood import option_scores, written_losses
from ..material.facts import KINDS, draw
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class Highlight(Suite):
    name: ClassVar[str] = "highlight"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Two contradicting facts, one of them marked: how often the answer follows the marked one."
    lower: ClassVar[Sequence[str]] = ("loss",)
    marks: ClassVar[Sequence[str]] = ("highlight",)

    prompt_form: Literal["chat", "plain"] = Field(
        "chat", description="in the model's chat template where it has one, or as plain text"
    )
    prompting: Literal["none", "repeated", "important", "capitals"] = Field(
        "none",
        description="the marked fact also stands out in the prompt's words, as without any recipe: said once more after the facts, "
        'introduced by "Important:", or in capitals; of what is said twice no passage is named to recipes',
    )
    written: int = Field(
        0,
        ge=0,
        description="let the model write so many tokens, and measure how unlikely the untouched model finds them (loss)",
    )

    @property
    def shown(self) -> Sequence[str]:  # type: ignore[override]
        return ("followed", "on_top", "lead", *(("loss",) if self.written else ()))

    def items(self, count: int, seed: int) -> list[Item]:
        """Two items for each of `count` pairs of facts, in one group."""
        items = []
        for i in range(count):
            asked = draw(random.Random(f"highlight {seed} {i}"), KINDS[i % len(KINDS)], 1, 2)
            for marked in (0, 1):
                data = {
                    "facts": asked.sentences, "question": asked.question, "start": asked.start, "words": asked.words, "marked": marked
                }  # fmt: skip
                items.append(Item(f"{seed}-{i}-{marked}", data, group=f"{seed}-{i}"))
        return items

    def facts(self, item: Item) -> list[str]:
        """Both facts, and one of them once more, as they stand in the prompt."""
        facts, marked = list(item.data["facts"]), item.data["marked"]
        if self.prompting == "repeated":
            facts.append(facts[marked])
        elif self.prompting == "important":
            facts[marked] = f"Important: {facts[marked]}"
        elif self.prompting == "capitals":
            facts[marked] = facts[marked].upper()
        return facts

    def prompt(self, subject: Subject, item: Item, facts: Sequence[str] | None = None) -> str:
        said = " ".join(self.facts(item) if facts is None else facts)
        if self.prompt_form == "chat":
            return subject.chat(f"{said}\n{item.data['question']}", answer=item.data["start"])
        return f"{said}\nQuestion: {item.data['question']} Answer: {item.data['start']}"

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [self.prompt(subject, item) for item in items]
        # a fact that the prompt's words let stand out already needs no mark
        marks = [[self.facts(item)[item.data["marked"]]] for item in items] if self.prompting != "repeated" else None
        highlight = {"highlight": marks} if marks is not None else {}
        scores = option_scores(subject, prompts, [[f" {word}" for word in item.data["words"]] for item in items], **highlight)
        records: list[dict[str, Any]] = [
            {
                "question": item.data["question"], "words": item.data["words"], "marked": item.data["marked"],
                "logprobs": [round(s.logprob, 5) for s in row], "top": [s.top for s in row],
            }
            for item, row in zip(items, scores)
        ]  # fmt: skip
        if self.written:
            with subject.marked(**highlight):
                texts = subject.generate(prompts, max_new_tokens=self.written)
            # what nobody marked, as the untouched model reads it: the same for every recipe and every prompting
            plain = [self.prompt(subject, item, item.data["facts"]) for item in items]
            with subject.untouched():
                losses = written_losses(subject, plain, texts)
            for record, text, loss in zip(records, texts, losses):
                record |= {"text": text, "losses": [round(value, 4) for value in loss]}
        return records

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        marked = record["marked"]
        mine, other = record["logprobs"][marked], record["logprobs"][1 - marked]
        place = ("first", "second")[marked]
        losses = record.get("losses", [])
        return {
            "asked": 1, "followed": mine > other, "top": record["top"][marked], "logprob": mine, "lead": mine - other,
            f"asked {place}": 1, f"followed {place}": mine > other, "loss": sum(losses), "written": len(losses),
        }  # fmt: skip

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "followed": ratio(sums["followed"], sums["asked"]),
            "on_top": ratio(sums["top"], sums["asked"]),
            "lead": ratio(sums["lead"], sums["asked"]),
            "logprob": ratio(sums["logprob"], sums["asked"]),
            "followed_first": ratio(sums["followed first"], sums["asked first"]),
            "followed_second": ratio(sums["followed second"], sums["asked second"]),
            **({"loss": ratio(sums["loss"], sums["written"])} if self.written else {}),
        }

    def chance(self) -> dict[str, float]:
        return {"followed": 0.5, "followed_first": 0.5, "followed_second": 0.5}
