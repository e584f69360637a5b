"""The result of an analysis in its forms: a table in the terminal, a dict, JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..comparison.forms import finite
from .findings import Findings


@dataclass
class Analysis(Findings):
    """What `reattend.analyse` found. Everything can be asked again with other thresholds; nothing is run again. See `Findings`."""

    def as_dict(self) -> dict[str, Any]:
        """Every number as JSON values; what does not exist is None."""
        largest, first = self.largest(), self.first_token()
        data = {
            "model": self.model,
            "stack": self.stack,
            "recipes": self.recipes,
            "texts": len(self.samples),
            "tokens": [len(s) for s in self.samples],
            "layers": self.layers,
            "epsilon": self.epsilon,
            "skip_last": self.skip_last,
            "sink_rate": self.sink_rate(),
            "sink_rate_per_position": self.sink_rates().tolist(),
            "first_token_weight": {n: first[n].tolist() for n in self.layers},
            "norms": {name: values.tolist() for name, values in self.norms().items()},
            "largest": {n: largest[i, :-1].tolist() for i, n in enumerate(self.layers)},
            "median": {n: float(largest[i, -1]) for i, n in enumerate(self.layers)},
            "sink_dims": self.sink_dims(),
            "similarity_with_first": self.similarity(),
            "per_text": [self._text(i) for i in range(len(self.samples))],
            "notes": self.notes,
        }
        return finite(data)

    def _text(self, number: int) -> dict[str, Any]:
        text = self.samples[number]
        facts: dict[str, Any] = {
            "tokens": text.tokens,
            "answer": text.answer,
            "sinks": [dict(zip(("position", "token", "share_of_heads"), row)) for row in self.sinks(number)],
            "drawing": [dict(zip(("position", "token", "times_even"), row)) for row in self.drawing(number)],
            "massive": [m._asdict() for m in self.massive(number)],
            "intermediate_sinks": [
                dict(zip(("position", "token", "layers", "cosine"), row)) for row in self.intermediate_sinks(number)
            ],
        }
        if text.near:
            rhythm = self.rhythm(number)
            facts["rhythm"] = {
                "waad": rhythm.waad.tolist(),
                "fai": rhythm.fai.tolist(),
                "preplan": rhythm.preplan,
                "anchors": rhythm.anchors,
                "dominated_anchors": rhythm.dominated,
                "local_heads": rhythm.local,
                "global_heads": rhythm.distant,
            }
        return facts

    def json(self, indent: int | None = 2) -> str:
        """`as_dict()` as a JSON text."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)

    def print(self) -> None:
        """Shows the analysis as tables in the terminal."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Any:
        from .table import renderable

        return renderable(self)
