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

# what a model says before any question, so that an option's own likelihood can be taken away (Holtzman et al. 2021, arXiv 2104.08315)
EMPTY = "Answer:"


class Choices(Suite):
    name: ClassVar[str] = "choices"
    kind: ClassVar = "llm"
    does: ClassVar[str] = (
        "Multiple choice with four options over capitals, opposites, kinds of things, order, numbers, everyday life."
    )
    shown: ClassVar[Sequence[str] | None] = ("accuracy", "accuracy_norm", "accuracy_calibrated")
    version: ClassVar[int] = 2

    def items(self, count: int, seed: int) -> list[Item]:
        pool = questions.pool(seed)
        if count > len(pool):
            raise ReattendError(f"suite 'choices' has {len(pool)} questions, {count} were asked for")
        return [Item(f"{seed}-{i}", {"kind": q.kind, "prompt": q.prompt, "options": q.options, "right": q.right})
                for i, q in enumerate(pool[:count])]  # fmt: skip

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        options = [[f" {o}" for o in item.data["options"]] for item in items]
        asked = option_scores(subject, [item.data["prompt"] for item in items], options)
        empty = option_scores(subject, [EMPTY] * len(items), options)
        return [
            {**item.data, "logprobs": [round(s.logprob, 5) for s in row], "empty": [round(s.logprob, 5) for s in bare]}
            for item, row, bare in zip(items, asked, empty)
        ]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        plain = _best(record["logprobs"]) == record["right"]
        # per character, as lm-eval's acc_norm
        norm = _best([p / len(o) for p, o in zip(record["logprobs"], record["options"])]) == record["right"]
        calibrated = _best([p - q for p, q in zip(record["logprobs"], record["empty"])]) == record["right"]
        kind = record["kind"]
        return {"asked": 1, "right": plain, "norm": norm, "calibrated": calibrated, f"asked {kind}": 1, f"right {kind}": plain}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {
            "accuracy": ratio(sums["right"], sums["asked"]),
            "accuracy_norm": ratio(sums["norm"], sums["asked"]),
            "accuracy_calibrated": ratio(sums["calibrated"], sums["asked"]),
            **{f"accuracy_{kind}": ratio(sums[f"right {kind}"], sums[f"asked {kind}"]) for kind in questions.KINDS},
        }

    def chance(self) -> dict[str, float]:
        return dict.fromkeys(
            ["accuracy", "accuracy_norm", "accuracy_calibrated", *(f"accuracy_{k}" for k in questions.KINDS)], 0.25
        )


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
