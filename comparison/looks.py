"""Where the answer looks in its prompt, token by token and layer by layer, before and after: what the attention pictures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hooks import Recording
from ..interventions import ReattendError


class Group(NamedTuple):
    """Some layers that are drawn as one."""

    label: str
    layers: list[int]


class Cell(NamedTuple):
    """One cell of the token strip: a token, or a whole run of image tokens, with its share of the attention before and after."""

    text: str
    tokens: int
    before: float
    after: float


@dataclass
class Looks:
    """The attention of the rows that predict the answer, on the n tokens of the prompt.

    pieces: the text of each token. image: which tokens are an image's. grids: per image or tile [rows, cols] long, positions of its
    tokens. cropped: the model sees the centre square of a picture only. before, after: {layer: [n]}, mean over heads and answer tokens;
    what a row gives to the answer itself is not in it. answer: how many answer tokens were looked at, before and after.
    """

    pieces: list[str]
    image: list[bool]
    grids: list[Tensor] = field(default_factory=list)
    cropped: bool = False
    before: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, Tensor] = field(default_factory=dict)
    answer: tuple[int, int] = (0, 0)

    @property
    def layers(self) -> list[int]:
        return sorted(set(self.before) & set(self.after))

    def groups(self, count: int = 3) -> list[Group]:
        """All layers in `count` groups of about the same size, or fewer where there are not so many."""
        layers = self.layers
        if count < 1:
            raise ReattendError(f"groups must be 1 or more, got {count}")
        parts = torch.tensor(layers).tensor_split(min(count, len(layers))) if layers else ()
        named = [[int(n) for n in part] for part in parts]
        return [Group(f"layer {p[0]}" if len(p) == 1 else f"layers {p[0]} to {p[-1]}", p) for p in named]

    def weights(self, layers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(before, after), [n] each: mean over these layers, default all."""
        chosen = self.layers if layers is None else layers
        return tuple(torch.stack([side[n] for n in chosen]).mean(dim=0) for side in (self.before, self.after))  # type: ignore

    def shares(self, layers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(before, after), [n] each: shares of the attention on the prompt after its first token, which has 0 here; mean over these layers."""

        def of(weights: Tensor) -> Tensor:
            own = weights.clone()
            own[:1] = 0
            return own / own.sum().clamp_min(1e-30)

        before, after = self.weights(layers)
        return of(before), of(after)

    def grid(self, number: int, pictures: int) -> Tensor:
        """The grid of one of the prompt's pictures, [rows, cols] of positions.

        Where a picture has several (tiles and an overview), the largest one, or the last of equal ones: the overview. Raises
        ReattendError where the tokens of an image form no known grid.
        """
        if not 0 <= number < pictures:
            raise ReattendError(f"image must be 0 to {pictures - 1}, or a picture to draw on; got {number}")
        if not self.grids or len(self.grids) % pictures:
            raise ReattendError(f"the image tokens of this model form {len(self.grids)} known grids for {pictures} pictures")
        each = len(self.grids) // pictures
        own = self.grids[number * each : (number + 1) * each]
        return max(reversed(own), key=lambda grid: grid.numel())

    def inside(
        self, grid: Tensor, box: tuple[float, float, float, float], layers: Sequence[int] | None = None
    ) -> tuple[float, float]:
        """(before, after): the share of a grid's attention that lies in a box (left, top, right, bottom) in parts of its width and height."""
        cover = _cover(grid.shape[0], box[1], box[3])[:, None] * _cover(grid.shape[1], box[0], box[2])[None]
        before, after = (w[grid].double() for w in self.weights(layers))
        return tuple(float((w * cover).sum() / w.sum().clamp_min(1e-30)) for w in (before, after))  # type: ignore

    def cells(self, layers: Sequence[int] | None = None) -> list[Cell]:
        """The prompt as cells of a strip; every run of image tokens is one cell."""
        return self._cells(0, *self.weights(layers))

    def shared_cells(self, layers: Sequence[int] | None = None) -> list[Cell]:
        """The prompt after its first token as cells, with `shares` instead of parts of all attention: what reports show."""
        return self._cells(1, *self.shares(layers))

    def _cells(self, start: int, *sides: Tensor) -> list[Cell]:
        before, after = (w.tolist() for w in sides)
        found, place = [], start
        for is_image, run in groupby(self.image[start:]):
            size = len(list(run))
            part = range(place, place + size)
            if is_image:
                found.append(Cell("image", size, sum(before[i] for i in part), sum(after[i] for i in part)))
            else:
                found += [Cell(self.pieces[i], 1, before[i], after[i]) for i in part]
            place += size
        return found

    def as_dict(self) -> dict[str, Any]:
        cells = [cell._asdict() for cell in self.cells()] if self.layers else []
        return {"answer_tokens": list(self.answer), "grids": [list(g.shape) for g in self.grids], "prompt": cells}


def _cover(cells: int, low: float, high: float) -> Tensor:
    """[cells]: how much of each of `cells` equal parts of 0..1 lies between low and high."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    return ((edges[1:].clamp_max(high) - edges[:-1].clamp_min(low)).clamp_min(0)) * cells


def add_side(looks: Looks | None, seen: Recording, pieces: list[str], after: bool, cropped: bool) -> Looks | None:
    """What a recording saw of one run, put beside the other run's. None where tokens are not known or prompts are no plain rows of tokens."""
    tokens = seen.tokens
    if tokens is None or not pieces or len(pieces) != tokens.prompt_length:
        return None
    stacks = {site.stack for site in seen.table}
    spread = seen.spread_by_layer(tokens.prompt_length, next(iter(stacks))) if len(stacks) == 1 else {}
    if not spread:
        return None
    if looks is None:
        marks = tokens.positions("image", 0, tokens.prompt_length)[0].tolist() if "image" in tokens else [False] * len(pieces)
        looks = Looks(pieces, marks, [g.image.cpu() for g in tokens.grids if g.row == 0], cropped)
    steps = max(map(len, seen.readings.values()), default=0)
    if after:
        looks.after, looks.answer = spread, (looks.answer[0], steps)
    else:
        looks.before, looks.answer = spread, (steps, 0)
    return looks
