"""Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826).

Fixes: a thing that the prompt names and the picture does not show. Before each of the first steps the latents go down the gradient of a
loss that is 0 once every chosen word has a place in the picture that attends to it alone.
Acts on: the latents. It reads cross-attention of a UNet at one resolution (all such layers and heads, mean), in a further pass of the prompt's
rows that ends at the last of these layers. Attention itself and the negative prompt's rows are computed as without the recipe.
With C [places, columns] these weights: softmax(100 C) over the text's columns without the first and the last; each word's map smoothed (3 x 3
Gaussian), m its largest value, L = max over words of max(0, 1 - m), and x' = x - a_s dL/dx, a_s = scale sqrt(linspace(1, 0.5, steps)[s]).
At the steps in `thresholds` this is repeated until L <= 1 - threshold, at most `tries` times.
Conventions: the official Gaussian divides by 2 sigma before it squares. A word of several tokens has the mean of their maps; `each` makes
every one a word of its own, as the official code does, which is given tokens.
Ours: every picture of a batch by its own words, the scheduler's scaling of the input, and pictures that are not square; maps of at least
8 x 8 places where the latents have them (a quarter of small ones tells too few places apart). Passes of the official
code that change nothing (two per try) and those that it repeats are left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from ..hooks import AtStep, Capture, Latents, SiteTable, Words
from ..hooks.plan import Step
from ..interventions import Call, ReattendError, column_weights
from .kit.base import Info
from .kit.denoisers import NamedWords, reads_prompt
from .kit.descent import Descent, Looked

SHARPEN = 100


class AttendAndExcite(Descent):
    slug = "attend-and-excite"
    info = Info(
        does="Moves a picture, before each early step, until every chosen word of the prompt has a place that attends to it.",
        paper="Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models",
        year=2023,
        arxiv="2301.13826",
        families=("guidance", "reweighting"),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture ignores a word",),
        try_first={},
        sweep={"scale": (10.0, 20.0, 40.0)},
        code="yuval-alaluf/Attend-and-Excite",
        licence="MIT",
    )

    marks = {"words": "words"}

    words: NamedWords = Field(
        None, description="the words that must show: a list of those of every prompt, or a list of such lists, one per prompt"
    )
    columns: list[list[int]] | None = Field(
        None,
        description="instead of words, the tokens that must show, each by itself: their columns in the text that the denoiser gets, a list per "
        "prompt or one for all. Neither 0, the start token, nor the last one: they are compared with no word",
    )
    occurrence: int | Literal["all"] = Field(
        "all", description='which occurrence of a word that occurs more than once, from 0, -1 = the last, or "all" of them'
    )
    each: bool = Field(False, description="every token of a word must show by itself, instead of their mean")
    thresholds: dict[int, float] = Field(
        {0: 0.05, 10: 0.5, 20: 0.8},
        description="{step: how much the least attended word must have}: there the change is repeated until it has",
    )
    tries: int = Field(20, ge=0, le=100, description="how often a change is repeated at most")
    smooth: bool = Field(True, description="smooth the maps before their largest value is taken")
    sigma: float = Field(0.5, gt=0, le=10, description="width of the smoothing")
    normalize_eot: bool = Field(
        False,
        description="compare a word with the other words of the prompt alone, without the end token and the padding (SD 2.1)",
    )
    length: int | None = Field(
        None, ge=3, description="with columns and normalize_eot: tokens of the prompt, with start and end"
    )

    @model_validator(mode="after")
    def _consistent(self) -> AttendAndExcite:
        if (self.words is None) == (self.columns is None):
            raise ValueError("give words that must show, or columns")
        if not (self.words or self.columns) or not all(self.words or self.columns or ()):
            raise ValueError("words and columns must hold at least one entry per prompt")
        if any(not word.strip() for row in self.words or () for word in ([row] if isinstance(row, str) else row)):
            raise ValueError("words must not hold an empty word")
        last = self.length
        for column in (c for row in self.columns or () for c in row):
            if column < 1 or (last is not None and column >= last - 1):
                end = "" if last is None else f" to {last - 2}, the last one before the end token"
                raise ValueError(f"columns count from 1, the first token after the start token{end}; got {column}")
        if any(step < 0 or not 0 <= least <= 1 for step, least in self.thresholds.items()):
            raise ValueError(f"thresholds must be {{step from 0 on: number from 0 to 1}}, got {self.thresholds}")
        if (self.length is not None) != (self.columns is not None and self.normalize_eot):
            raise ValueError(
                "columns with normalize_eot need length, which goes with these alone: with words the prompt tells it"
            )
        return self

    def plan(self, sites: SiteTable) -> list[Step]:
        table = self.read_at(sites)
        columns = None if self.columns is None else [[[column] for column in row] for row in self.columns]
        words: Any = [self.words] if self.words and isinstance(self.words[0], str) else self.words
        found = Words("excite", words, columns, self.occurrence)
        named = [role for role in found.roles if role.startswith("excite.")]
        reader = Capture(table, lambda call, edits: self.read(named, call), grad=True)
        return [Latents(partial(self.before, table), steps=[found, reader])]

    def before(self, table: SiteTable, at: AtStep) -> Tensor | None:
        """Before a step's ordinary pass: the latents x [B, ...], moved; None where they stay."""
        step = at.clock.step
        size = self.size(at.clock)
        if not self.scale or step >= self.steps:
            return None
        x, (loss, slope) = at.latents, self.evaluate(table, at, at.latents)
        bound = 1 - self.thresholds.get(step, 0.0)
        going = loss > bound
        for _ in range(self.tries if step in self.thresholds else 0):
            if not bool(going.any()):
                break
            x = torch.where(going.view(-1, *[1] * (x.dim() - 1)), x - size * slope, x)
            # the loss that was too large is that of before the move: one more is made where it no longer is
            before, (loss, slope) = loss, self.evaluate(table, at, x)
            going = going & (before > bound)
        x = x - size * slope
        return None if torch.equal(x, at.latents) else x

    def loss(self, looked: Looked) -> Tensor:
        return self.neglect(looked.mean("cross"), *looked.text)

    def read(self, named: list[str], call: Call) -> None:
        """Keeps the weights of all text columns, mean over heads, at the resolution that is asked for."""
        if not reads_prompt(call):
            return
        looked: Looked = call.memory["looked"]
        grid = self.grid(call)
        if grid is not None:
            weights = column_weights(call, [], torch.arange(call.num_keys)).mean(dim=1)
            looked.keep(call, weights[:, grid])
            looked.text = self.compared(call), [call.columns(role) for role in named]

    def compared(self, call: Call) -> Tensor:
        """Bool [B, K]: the text columns that words are compared with."""
        if self.normalize_eot and self.words is not None:
            return call.columns("words")
        places = torch.arange(call.num_keys, device=call.query.device)
        last = call.num_keys if self.length is None else self.length
        if last > call.num_keys or any(column >= last - 1 for row in self.columns or () for column in row):
            said = f"length {self.length}" if last > call.num_keys else f"columns {self.columns}"
            raise ReattendError(
                f"{self.slug}: {said} of a text that has {call.num_keys} columns, of which 1 to {call.num_keys - 2} can be compared"
            )
        return ((places > 0) & (places < last - 1)).expand(call.batch, -1)

    def neglect(self, weights: Tensor, compared: Tensor, words: list[Tensor]) -> Tensor:
        """L [B]: how little the least attended word has. weights [B, h, w, K]; words: the columns of each, bool [B, K]."""
        scores = (SHARPEN * weights).masked_fill(~compared[:, None, None], float("-inf"))
        shares = scores.softmax(dim=-1)
        maps, there = [], []
        for word in words:
            # a word that a prompt does not have needs nothing there
            pieces = word.long().cumsum(dim=1) * word
            for number in range(1, int(pieces.max()) + 1) if self.each else [0]:
                own = (pieces == number if number else word).to(shares.dtype)
                maps.append(torch.einsum("bhwk,bk->bhw", shares, own / own.sum(dim=1, keepdim=True).clamp_min(1)))
                there.append(own.any(dim=1))
        found = torch.stack(maps, dim=1)  # [B, words, h, w]
        found = self.smoothed(found) if self.smooth else found
        missing = (1 - found.flatten(2).amax(dim=2)).clamp_min(0)
        return missing.masked_fill(~torch.stack(there, dim=1), 0).amax(dim=1)

    def smoothed(self, maps: Tensor) -> Tensor:
        """A 3 x 3 Gaussian, reflected at the edges; its weights are the squares of whole quotients, as in the official code."""
        line = torch.exp(-(((torch.arange(3, device=maps.device) - 1) / (2 * self.sigma)) ** 2)).to(maps.dtype)
        kernel = line[:, None] * line / line.sum() ** 2
        framed = pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
        return torch.nn.functional.conv2d(framed, kernel[None, None])[:, 0].unflatten(0, maps.shape[:2])
