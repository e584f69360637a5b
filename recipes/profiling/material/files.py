"""Data of a profiling run from a JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ....interventions import ReattendError
from ...kit.checks import read_json, read_text, shown


def content_of(data: Any) -> Any:
    """The content of a JSON file where data is its path, else data itself. Raises ReattendError for a file that cannot be read."""
    if not isinstance(data, (str, Path)):
        return data
    return read_json(read_text(data, "data file"), f"data: {str(data)!r}")


def list_of(data: Any) -> list[Any]:
    """The examples of data as a list. Raises ReattendError where it is none."""
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise ReattendError(f"data must be a list of examples, got {shown(data)}")
    return list(data)
