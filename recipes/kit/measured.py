"""What each recipe did and cost when it was measured, as the package brings it along: written by benchmarks/which.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

NOTHING = {"did": [], "cost": ""}


@functools.cache
def measured() -> dict[str, dict[str, Any]]:
    """{slug: {"did": [a text per measure and model], "cost": times of the untouched model's, or ""}}; what was not measured is missing."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
