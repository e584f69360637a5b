"""A comparison's result, and its four forms: terminal, notebook, one self-contained HTML file, JSON."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from ..recipes.kit.files import check_output, writing
from .cost import Cost
from .looks import Looks
from .shares import on_prompt

TEMPLATE = "report.html"


@dataclass
class Side:
    """One of the two runs. Only what fits the kind of comparison is filled in."""

    text: str | None = None
    tokens: list[str] = field(default_factory=list)
    predictions: list[tuple[str, float]] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
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
class Report:
    """Before and after of one comparison. Shows itself in a terminal (`print()`), a notebook, as `html(path)` and as `json()`;
    pictures also as `grid()` and `png(path)`.

    metrics: numbers by name. kl: nats per token, up to and including the first difference. stats: how often each recipe's edits were
    applied in the timed run, by site. notes: what a reader must know.
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
            "checks": [vars(check) for check in self.checks],
            "notes": self.notes,
            "environment": self.environment,
        }
        return finite(data)

    def json(self, indent: int | None = 2) -> str:
        """`as_dict()` as a JSON text. Infinite numbers (the PSNR of equal pictures) are null."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False)

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


def write_picture(drawn: Any, path: str | os.PathLike, *, overwrite: bool) -> Path:
    """Writes a PIL picture as a PNG file."""
    path = check_output(path, "path", overwrite=overwrite)
    if path.suffix.lower() != ".png":
        raise ReattendError(f"path: {str(path)!r} must end in .png")
    with writing(path, "path"):
        drawn.save(path)
    return path


def write_page(
    reports: Sequence[Report], path: str | os.PathLike, title: str, intro: str = "", *, overwrite: bool = True
) -> Path:
    """Writes several reports into one self-contained HTML file, over one that is there unless overwrite=False."""
    return write_html(lambda: render(reports, title, intro=intro), path, overwrite=overwrite)


def write_html(make: Callable[[], str], path: str | os.PathLike, *, overwrite: bool) -> Path:
    """Writes the page that `make` gives, which is not made before the path is known to be right."""
    path = check_output(path, "path", overwrite=overwrite)
    text = make()
    with writing(path, "path"):
        # a lone surrogate, as half a letter of a broken tokenizer, has no UTF-8
        path.write_text(text, encoding="utf-8", errors="replace")
    return path


def render(reports: Sequence[Report], title: str, *, page: bool = True, intro: str = "") -> str:
    """HTML of reports: a whole page, or a fragment for a notebook cell. Every text in it is escaped."""
    from .page import FILTERS, views

    return from_template(TEMPLATE, FILTERS, views=views(reports), title=title, intro=intro, page=page)


def from_template(name: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """A template of this folder, filled in; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name).render(**values)


def png(picture: Any) -> str:
    """A PIL picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
