"""A comparison's result in its forms: terminal, notebook, one self-contained HTML file, pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interventions import ReattendError
from .forms import from_template, write_html, write_picture
from .looks import Looks
from .outcome import Outcome

if TYPE_CHECKING:
    from .word_maps import WordMaps

TEMPLATE = "report.html"


@dataclass
class Report(Outcome):
    """Before and after of one comparison. Shows itself in a terminal (`print()`), a notebook, as `html(path)` and as `json()`;
    pictures also as `grid()` and `png(path)`. What it holds: see `Outcome`. maps: what reads where pictures look for words.
    """

    maps: WordMaps | None = field(default=None, repr=False, compare=False)

    def attention_map(self, image: Any = None, *, groups: int = 3) -> Any:
        """A PIL picture of where the answer looks, before, after and what moved.

        Over the prompt's picture: a row per group of layers. image: which picture of the prompt (0 is the first), or a picture to draw
        on instead of the first. Without a picture in the prompt: its tokens as a strip, as `attention_strip`. Raises ReattendError
        where the attention was not looked at, or image tokens form no known grid.
        """
        from .pictures import sheet

        looks = self._looks()
        if image is None and not any(looks.image):
            return self.attention_strip()
        picture, grid = self._picture(image)
        return sheet(looks, picture, grid, groups)

    def attention_strip(self) -> Any:
        """A PIL picture of the prompt's tokens after the first, coloured by the share of attention that they lost or gained."""
        from .pictures import strip

        return strip(self._looks().shared_cells())

    def attention_inside(
        self, box: Sequence[float], image: Any = None, layers: Sequence[int] | None = None
    ) -> dict[str, float]:
        """{"before", "after"}: the share of the attention on a picture that lies in a box (left, top, right, bottom) in its pixels.

        image: as for `attention_map`. layers: which layers, default all. Raises ReattendError for a box without area.
        """
        from .pictures import shown_part

        picture, grid = self._picture(image)
        left, top, right, bottom = shown_part(picture, self._looks().cropped)
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ReattendError(f"box must be (left, top, right, bottom) with left < right and top < bottom, got {tuple(box)}")
        width, height = right - left, bottom - top
        part = ((box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height)
        before, after = self._looks().inside(grid, part, layers)
        return {"before": before, "after": after}

    def words(self, words: str | Sequence[str] | None = None, *, picture: int = 0) -> Any:
        """A PIL picture of where a drawn picture looks for the words of its prompt, before and after.

        words: some of the prompt, default its content words, up to where its text encoders stop reading. picture: which of the pictures that
        the report shows. Draws both variants once more, with the same seed, and needs the pipeline for it: see `word_maps`, which gives the
        numbers. Raises ReattendError where the
        outputs are no pictures, the pipeline is gone, or a word is not in the prompt.
        """
        from .word_maps import sheet

        maps = self.word_maps(words, picture=picture)
        return sheet(maps, {"before": self.before.pictures[picture], "after": self.after.pictures[picture]})

    def word_maps(self, words: str | Sequence[str] | None = None, *, picture: int = 0) -> dict[str, dict[str, Any]]:
        """{"before", "after"}: {word: [height, width]}, the attention that each place of a picture gives to a word of its prompt.

        Summed over steps and layers, mean over heads and a word's tokens; all occurrences of a word together.
        """
        if self.maps is None:
            raise ReattendError("maps of words are of pictures that a diffusers pipeline has drawn, and this report holds none")
        shown = self.before.shown
        if shown and not (isinstance(picture, int) and 0 <= picture < len(shown)):
            raise ReattendError(f"picture must be 0 to {len(shown) - 1}, got {picture!r:.80}")
        return self.maps.read(words, shown[picture] if shown else picture)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "maps": None}  # what draws them once more needs the pipeline

    def _looks(self) -> Looks:
        if self.looks is None or not self.looks.layers:
            raise ReattendError(
                "this report holds no attention per token: compare(attention=True) records it for texts and pictures that are read "
                "as one row of tokens"
            )
        return self.looks

    def _picture(self, image: Any) -> tuple[Any, Any]:
        """(picture, grid of its tokens). image: None, a number, or a picture of the user's."""
        looks = self._looks()
        own = image if hasattr(image, "convert") else None
        number = 0 if image is None or own is not None else image
        if not isinstance(number, int) or not any(looks.image):
            given = "no picture" if isinstance(number, int) else repr(image)
            raise ReattendError(f"image must be the number of a picture in the prompt, or a picture to draw on; got {given}")
        if own is None and not self.inputs:
            raise ReattendError("this report does not hold the prompt's pictures: give the one to draw on as image=")
        grid = looks.grid(number, max(1, len(self.inputs)))
        return (own if own is not None else self.inputs[number]), grid

    def html(self, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
        """Writes one self-contained HTML file, over one that is there unless overwrite=False, and returns its path."""
        return write_page([self], path, self.title, overwrite=overwrite)

    def grid(self) -> Any:
        """A PIL picture: the untouched picture and the changed one side by side, named, with how far they lie apart.

        Raises ReattendError where the outputs are no pictures.
        """
        from .sweep_pictures import pair

        return pair(self)

    def png(self, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
        """Writes `grid()` as a PNG file, over one that is there unless overwrite=False, and returns its path."""
        return write_picture(self.grid(), path, overwrite=overwrite)

    def print(self) -> None:
        """Shows the report in the terminal."""
        from rich.console import Console

        Console().print(self)

    def _repr_html_(self) -> str:
        return render([self], self.title, page=False)

    def __rich__(self) -> Any:
        from .terminal import renderable

        return renderable(self)


def write_page(
    reports: Sequence[Report], path: str | os.PathLike, title: str, intro: str = "", *, overwrite: bool = True
) -> Path:
    """Writes several reports into one self-contained HTML file, over one that is there unless overwrite=False."""
    return write_html(lambda: render(reports, title, intro=intro), path, overwrite=overwrite)


def render(reports: Sequence[Report], title: str, *, page: bool = True, intro: str = "") -> str:
    """HTML of reports: a whole page, or a fragment for a notebook cell. Every text in it is escaped."""
    from .page import FILTERS, views

    return from_template(TEMPLATE, FILTERS, views=views(reports), title=title, intro=intro, page=page)
