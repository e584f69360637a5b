"""What several variants on one input did, in its forms: terminal, notebook, one self-contained HTML file, pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .forms import write_html, write_picture
from .sweep_outcome import SweepOutcome


@dataclass
class Sweep(SweepOutcome):
    """Several variants beside the untouched run, on one input and seed: what `compare` gives for a list of variants.

    Shows itself in a terminal (`print()`), a notebook, as `html(path)`, as `json()`, and pictures as a grid: `grid()`, `png(path)`.
    What it holds: see `SweepOutcome`.
    """

    def grid(self) -> Any:
        """A PIL picture: the untouched picture and every variant's, each with its name and how far it lies from the untouched one.

        Raises ReattendError where the outputs are no pictures.
        """
        from .sweep_pictures import grid

        return grid(self)

    def png(self, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
        """Writes `grid()` as a PNG file, over one that is there unless overwrite=False, and returns its path."""
        return write_picture(self.grid(), path, overwrite=overwrite)

    def html(self, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
        """Writes one self-contained HTML file, over one that is there unless overwrite=False, and returns its path."""
        from .sweep_page import render

        return write_html(lambda: render(self), path, overwrite=overwrite)

    def print(self) -> None:
        """Shows the report in the terminal."""
        from rich.console import Console

        Console().print(self)

    def _repr_html_(self) -> str:
        from .sweep_page import render

        return render(self, page=False)

    def __rich__(self) -> Any:
        from .sweep_terminal import renderable

        return renderable(self)
