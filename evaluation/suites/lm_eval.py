"""Any task of lm-eval as a suite, document by document, so that changes under recipes get paired intervals."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ...interventions import ReattendError, ReattendWarning
from .. import lm_eval as bridge
from ..metrics.sums import Sums, ratio
from ..subject import Subject
from .base import Item, Suite

WIDEST_ANSWER = 200


class LmEval(Suite):
    """Ask for it as "lm-eval:TASK". Metrics are those of the task, over all documents asked: with a group, over those of all its tasks.

    A likelihood is one pass over prompt and answer, so recipes that act on generated tokens only never act on such tasks.
    """

    name: ClassVar[str] = "lm-eval"
    kind: ClassVar = "llm"
    does: ClassVar[str] = "Any task of the lm-eval package: lm-eval:TASK, for example lm-eval:arc_easy."
    argument: ClassVar[str] = "task"
    batch: ClassVar[int] = 32

    task: str = Field(description="name of a task, group or tag of lm-eval")
    shots: int | None = Field(None, ge=0, description="examples in the prompt; None = as the task says")
    chat: bool = Field(False, description="prompts in the model's chat template")
    include_path: str | None = Field(None, description="folder with YAML task files of your own")
    rows: int = Field(
        1, ge=1, description="texts in one pass; lm-eval pads batches with tokens that recipes would take for text"
    )

    @classmethod
    def named(cls, argument: str) -> type[Suite]:
        return _class_of(argument)

    @property
    def tasks(self) -> dict[str, Any]:
        return bridge.load_tasks(self.task, self.include_path, self.shots)

    @property
    def lower(self) -> Sequence[str]:  # type: ignore[override]
        better = {name: up for task in self.tasks.values() for name, up in task.higher_is_better().items()}
        return [name for name, up in better.items() if up is False]

    def items(self, count: int, seed: int) -> list[Item]:
        """`count` documents, drawn by the seed; all of them where there are no more."""
        held = [(name, k) for name, task in self.tasks.items() for k in range(len(task.eval_docs))]
        if not held:
            raise ReattendError(f"lm-eval's task {self.task!r} has no documents")
        drawn = sorted(random.Random(f"lm-eval {seed}").sample(held, min(count, len(held))))
        return [Item(f"{name}-{k}", {"task": name, "document": k}) for name, k in drawn]

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        documents: dict[str, list[int]] = {}
        for item in items:
            documents.setdefault(item.data["task"], []).append(item.data["document"])
        samples = bridge.run(subject, self.tasks, documents, self.chat, self.rows)
        return [self._record(item, samples[item.data["task"], item.data["document"]]) for item in items]

    def _record(self, item: Item, samples: list[dict[str, Any]]) -> dict[str, Any]:
        task = self.tasks[item.data["task"]]
        values: dict[str, Any] = {}
        for sample in samples:
            for metric in sample["metrics"]:
                how = bridge.aggregation(task, metric)
                label = metric if sample["filter"] == "none" else f"{metric}/{sample['filter']}"
                if how not in bridge.BY_SUMS:
                    _warn_once(item.data["task"], metric, how)
                    continue
                value = sample[metric]
                values[label] = [how, *(float(v) for v in (value if isinstance(value, (list, tuple)) else [value]))]
        if not values:
            raise ReattendError(
                f"lm-eval's task {item.data['task']!r} has no metric that is a mean or a perplexity of its documents"
            )
        return {
            **item.data, "values": values, "wanted": str(samples[0]["target"])[:WIDEST_ANSWER],
            "said": str(samples[0]["filtered_resps"])[:WIDEST_ANSWER],
        }  # fmt: skip

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, (how, *value) in record["values"].items():
            if how == "nanmean" and math.isnan(value[0]):
                continue
            found[f"{how} {label}"], found[f"weight {label}"] = value[0], value[1] if len(value) > 1 else 1.0
        return found

    def metrics(self, sums: Sums) -> dict[str, Any]:
        found = {}
        for key in sums:
            how, label = key.split(" ", 1)
            if how == "weight":
                continue
            value = ratio(sums[key], sums[f"weight {label}"])
            if how in ("perplexity", "weighted_perplexity"):
                value = np.exp(-value)
            elif how == "bits_per_byte":
                value = -value / math.log(2)
            found[label] = value
        return found


@functools.cache
def _class_of(task: str) -> type[LmEval]:
    """The suite of one task under a name of its own, so that several tasks can stand in one table."""
    label = f"{LmEval.name}:{task}"

    class LmEvalTask(LmEval):
        name: ClassVar[str] = label

    return LmEvalTask


@functools.cache
def _warn_once(task: str, metric: str, how: str) -> None:
    warnings.warn(
        f"lm-eval's task {task!r}: metric {metric!r} is left out, its {how} cannot be computed document by document",
        ReattendWarning,
        stacklevel=2,
    )
