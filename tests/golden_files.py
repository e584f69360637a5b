"""Golden data: what official code gave, as tensors with the facts of the run beside them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_file(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, facts) of one file below tests/golden."""
    with safe_open(GOLDEN / folder / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
