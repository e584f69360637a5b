"""Multiple choice over plain facts, scored by the likelihood of the options' texts as lm-eval does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ...interventions import ReattendError
from ..likelihood import option_scores
from ..material import questions
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite


class Choices(Suite):
    name: ClassVar[str] = "choices"
    kind: ClassVar = "llm"
    does: ClassVar[str] = (
        "Multiple choice with four options over capitals, opposites, kinds of things, order, numbers, everyday life."
    )
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_norm")

    def items(self, count: int, seed: int) -> list[Item]:
        pool = questions.pool(seed)
        if count > len(pool):
            raise ReattendError(f"suite 'choices' has {len(pool)} questions, {count} were asked for")
        return [Item(f"{seed}-{i}", {"kind": q.kind, "prompt": q.prompt, "options": q.options, "right": q.right})
                for i, q in enumerate(pool[:count])]  # fmt: skip

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        scores = option_scores(
            subject, [item.data["prompt"] for item in items], [[f" {o}" for o in item.data["options"]] for item in items]
        )
        return [{**item.data, "logprobs": [round(s.logprob, 5) for s in row]} for item, row in zip(items, scores)]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        plain = _best(record["logprobs"]) == record["right"]
        # per character, as lm-eval's acc_norm
        norm = _best([p / len(o) for p, o in zip(record["logprobs"], record["options"])]) == record["right"]
        kind = record["kind"]
        return {"asked": 1, "right": plain, "norm": norm, f"asked {kind}": 1, f"right {kind}": plain}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            "accuracy_norm": ratio(sums["norm"], sums["asked"]),
            **{f"accuracy_{kind}": ratio(sums[f"right {kind}"], sums[f"asked {kind}"]) for kind in questions.KINDS},
        }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
