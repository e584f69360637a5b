"""Data of a profiling run from a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json, read_text


def content_of(data: Any) -> Any:
    """The content of a JSON file where data is its path, else data itself. Raises ReattendError for a file that cannot be read."""
    if not isinstance(data, (str, Path)):
        return data
    return read_json(read_text(data, "data file"), f"data: {str(data)!r}")
