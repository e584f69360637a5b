"""What a comparison found, as data: both runs, what was measured of them, and what a reader must know."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .cost import Cost
from .forms import finite
from .looks import Looks
from .shares import on_prompt


@dataclass
class Side:
    """One of the two runs. Only what fits the kind of comparison is filled in. pictures: those shown, of `shown` by number."""

    text: str | None = None
    tokens: list[str] = field(default_factory=list)
    predictions: list[tuple[str, float]] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    mass: dict[str, float] = field(default_factory=dict)
    mass_by_layer: dict[int, dict[str, float]] = field(default_factory=dict)
    entropy: float | None = None

    @property
    def output(self) -> Any:
        return self.text if self.text is not None else self.pictures or self.predictions

    def output_as_dict(self) -> dict[str, Any]:
        """The output as JSON values; of pictures their number."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "predictions": [{"label": label, "probability": p} for label, p in self.predictions],
            "pictures": len(self.pictures),
        }


@dataclass
class Check:
    """A yes-or-no question about an output, and its answer before and after."""

    what: str
    before: bool
    after: bool


@dataclass
class Outcome:
    """Before and after of one comparison.

    metrics: numbers by name. kl: nats per token, up to and including the first difference. stats: how often each recipe's edits were
    applied in the timed run, by site. ways: {site: {how its edited attention was computed: how often}}. notes: what a reader must know.
    """

    kind: str
    title: str
    model: dict[str, Any] = field(default_factory=dict)
    recipes: list[dict[str, Any]] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    before: Side = field(default_factory=Side)
    after: Side = field(default_factory=Side)
    metrics: dict[str, Any] = field(default_factory=dict)
    kl: list[float] = field(default_factory=list)
    first_difference: int | None = None
    difference: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    ways: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    intro: str = ""
    checks: list[Check] = field(default_factory=list)
    looks: Looks | None = None

    @property
    def outputs(self) -> dict[str, Any]:
        """{"before": ..., "after": ...}: texts, lists of pictures, or lists of (label, probability)."""
        return {"before": self.before.output, "after": self.after.output}

    @property
    def applied(self) -> int:
        return sum(sum(sites.values()) for sites in self.stats.values())

    @property
    def attention_shares(self) -> dict[str, dict[str, float]]:
        """{"before", "after"}: {kind of token: share} of the attention on the prompt after its first token, mean over layers and heads.

        Each adds up to 1. The rows are those that predict the first tokens of the untouched model's answer, read with this answer before
        them in both variants. {} where the attention was not looked at or has no prompt.
        """
        return {"before": on_prompt(self.before.mass), "after": on_prompt(self.after.mass)}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON values."""

        def side(s: Side) -> dict[str, Any]:
            return {
                **s.output_as_dict(),
                "cost": s.cost.as_dict(),
                "attention_by_role": s.mass,
                "attention_by_layer": s.mass_by_layer,
                "entropy": s.entropy,
            }

        data = {
            "kind": self.kind,
            "title": self.title,
            "model": self.model,
            "recipes": self.recipes,
            "request": self.request,
            "seed": self.seed,
            "before": side(self.before),
            "after": side(self.after),
            "metrics": {**self.metrics, "edits_applied": self.applied},
            "kl_per_token": self.kl,
            "attention_shares": self.attention_shares,
            "attention_on_prompt": self.looks.as_dict() if self.looks is not None else None,
            "stats": self.stats,
            "ways": self.ways,
            "checks": [vars(check) for check in self.checks],
            "notes": self.notes,
            "environment": self.environment,
        }
        return finite(data)

    def json(self, indent: int | None = 2) -> str:
        """`as_dict()` as a JSON text. Infinite numbers (the PSNR of equal pictures) are null."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)
