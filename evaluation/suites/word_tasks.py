"""Tasks that demonstrations define: the prompt holds an input and, unless shots is above 0, no word about what to do with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ...interventions import ReattendError
from ...recipes.profiling.material.word_pairs import TABLES, parted
from ...recipes.profiling.soft_injection import task_prompt
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class WordTasks(Suite):
    name: ClassVar[str] = "word-tasks"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Opposites, capitals, past tenses or plurals of words, which only demonstrations (shots) ask for."
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "answers_input")
    neutral: ClassVar[Sequence[str]] = ("answers_input",)

    task: str = Field(
        "opposite", description=f"one of {', '.join(TABLES)}; asked are the pairs that profiles do not learn from"
    )
    shots: int = Field(0, ge=0, le=16, description="demonstrations before each question, from the other pairs")

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in TABLES:
            raise ValueError(f"task must be one of {', '.join(TABLES)}")
        return value

    def items(self, count: int, seed: int) -> list[Item]:
        train, test = parted(self.task)
        if count > len(test):
            raise ReattendError(f"suite 'word-tasks' has {len(test)} pairs of task {self.task!r}, {count} were asked for")
        pairs = random.Random(f"word-tasks {seed}").sample(test, len(test))[:count]
        items = []
        for i, (x, y) in enumerate(pairs):
            shown = random.Random(f"word-tasks {seed} {i}").sample(train, self.shots)
            items.append(Item(f"{seed}-{i}", {"input": x, "output": y, "shown": [list(pair) for pair in shown]}))
        return items

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [task_prompt(item.data["input"], [(a, b) for a, b in item.data["shown"]]) for item in items]
        wanted = [item.data["output"] for item in items]
        room = max(len(subject.tokenizer(f" {y}", add_special_tokens=False)["input_ids"]) for y in wanted) + 2
        texts = subject.generate(prompts, max_new_tokens=room)
        return [
            {"input": item.data["input"], "wanted": y, "said": text.strip().split("\n")[0].strip()}
            for item, y, text in zip(items, wanted, texts)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        # the answer's first line up to the length of what is wanted, as the paper scores it
        said = record["said"].lower()
        return {
            "asked": 1,
            "right": said.startswith(record["wanted"].lower()),
            "input": said.startswith(record["input"].lower()),
        }

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["right"], sums["asked"]), "answers_input": ratio(sums["input"], sums["asked"])}
