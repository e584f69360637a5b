"""Data of a profiling run from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...interventions import ReattendError


def content_of(data: Any) -> Any:
    """The content of a JSON file where data is its path, else data itself. Raises ReattendError for a file that cannot be read."""
    if not isinstance(data, (str, Path)):
        return data
    if not Path(data).is_file():
        raise ReattendError(f"data: no file at {str(data)!r}")
    try:
        return json.loads(Path(data).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReattendError(f"data: no JSON in {str(data)!r}: {error}") from None
