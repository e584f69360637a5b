"""Regional prompting (Chen et al. 2024, arXiv 2411.02395; in cross-attention the community's "attention couple").

Fixes: attributes of one thing leak to another and things land anywhere, because every image token reads every word.
Acts on: every site that reads the prompt, all heads, the prompt's rows. The regions' texts stand after the prompt in its
stream. In joint attention, within a block that keeps regions apart: a region's text sees itself and the image in its region; an
image token sees the texts of its regions and the image tokens that share one with it, or, in none, those in none. The prompt
sees itself and the whole image. In all blocks the image's outputs are (1 - base_ratio) regional + base_ratio base, with base a
second attention to the prompt and the whole image. In cross-attention: o_i = sum_r w_r(i) Attention(q_i, K_r, V_r), w_r the
mask of region r over the sum of all masks, blended alike. Every kind of row attends to the columns that it sees alone
(`Grouped`): exact, and no mask of pairs.
Cost: attention over 2048 image tokens in four disjoint regions took 0.33 of the time of plain attention at base_ratio 0, and 1.4 times as
much at 0.3, where the base is a second attention of all image tokens (docs/performance.md). The texts' tokens come on top in all other
layers. Beside recipes that change scores or weights of the same calls (prompt-reweight, csg, in joint models pag) these weights are made
as a matrix, a chunk of rows at a time.
Conventions: `interval` of blocks as published (block i keeps regions apart where i % interval is 0; double and single blocks
are counted apart; in the others places of any region read all regional texts and the whole image); before `start` and from
`stop` on the prompt alone is read, which smooths the seams. Where regions overlap, both texts are read, the mean of both in
cross-attention. All texts have text position 0 in Flux; pooled texts are the prompt's.
Ours: places in no region read the prompt, as if it were a region with the rest of the picture (the authors' script adds a text
"a photo" there); in blocks that keep nothing apart they read the prompt and the whole image, and no region's text. One stream:
in single blocks the official base stream keeps image tokens of its own, here both share the blended ones, which saves a second
pass; double blocks equal the official ones. A region holds at least one place of each layer, and every frame of a video has the
regions; regions per picture; images to look at (Kontext) are seen from everywhere. SD3.5's second attention, of the image
alone, and the self-attention of UNets stay as they are.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..hooks import Context, SecondText, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, Grouped, ReattendError, TokenGrid
from .kit.base import Info
from .kit.denoisers import grids_of, reads_prompt
from .kit.layout import Regions, of_picture, per_prompt, pictures_of, places_in
from .kit.second_texts import TextsAside, text_sites


class Regional(TextsAside):
    slug = "regional"
    info = Info(
        does="Gives regions of the picture texts of their own: each thing in its box, with its own colours.",
        paper="Training-free Regional Prompting for Diffusion Transformers",
        year=2024,
        arxiv="2411.02395",
        families=("guidance", "sparsity"),
        kinds=("diffusion",),
        cost="forward",
        problems=("things are in the wrong place of the picture", "the picture ignores a word"),
        sweep={"base_ratio": (0.0, 0.3, 0.6)},
        code="instantX-research/Regional-Prompting-FLUX",
        licence="Apache-2.0",
    )
    placed = {"cells": "regions"}

    regions: Regions = Field(
        description='the text of each region and its box, [left, top, right, bottom] in shares of the picture, or its mask: {"a red circle": '
        "[0, 0, 0.5, 1]}; several prompts may have one such mapping each. What no region holds is drawn by the prompt. Regions may overlap; a "
        "text is cut where the pipeline cuts its prompt",
    )
    base_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="how much the whole prompt is read beside a region's text; 0 = not, 1 = the prompt alone. Default: 0 for models with "
        "cross-attention, 0.3 for others",
    )
    stop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="the fraction of the steps from which on the prompt alone is read: regions late in the schedule leave seams. Default: 1 "
        "for models with cross-attention, 0.4 for others",
    )
    double_interval: int = Field(
        1, ge=1, description="every so many blocks that keep text and image apart, regions are hidden from each other; 1 = all"
    )
    single_interval: int = Field(1, ge=1, description="the same for blocks in which text and image are one stream")

    padding: bool = Field(
        True,
        description="read also what pads the texts to the pipeline's length, where the model reads those of its prompt; False = words alone, "
        "which costs less",
    )

    @model_validator(mode="after")
    def _named(self) -> Regional:
        if not self.layouts or not all(self.layouts):
            raise ValueError("regions must name a text and its region for every prompt")
        if any(not text.strip() for layout in self.layouts for text in layout):
            raise ValueError("a region's text must not be empty: leave the region out, and the prompt draws it")
        return self

    @cached_property
    def layouts(self) -> list[dict[str, Any]]:
        return [dict(layout) for layout in per_prompt(self.regions)]

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen = text_sites(sites)
        ratio, stop = (0.3, 0.4) if len(chosen.kind("joint")) else (0.0, 1.0)
        ratio = ratio if self.base_ratio is None else self.base_ratio
        stop = stop if self.stop is None else self.stop
        if ratio == 1:
            return []
        most = max(map(len, self.layouts))
        # an empty text has no tokens
        texts = [text for layout in self.layouts for text in [*layout, *[""] * (most - len(layout))]]

        def use(call: Call, text: SecondText) -> list[Edit]:
            return self.split(call, text, ratio)

        given = {"each": most, "packed": not self.padding, "called": "mappings of regions", **self.given(texts, stop)}
        return [Context("regional", chosen, use, place="after", **given)]

    # -- at a call -----------------------------------------------------------------------------------------------------

    def split(self, call: Call, text: SecondText, ratio: float) -> list[Edit]:
        """The edit of one call, which is the same for all sites of a pass with as many tokens."""
        rows = call.clock.rows("conditional", call.batch)
        if (
            rows is None
            or text.each is None
            or text.stretch is None
            or call.site is None
            or not reads_prompt(call)
            or not bool(text.each.any())
        ):
            return []
        interval = self.single_interval if call.site.stack.endswith(".single") else self.double_interval
        apart = call.site.kind == "cross" or call.site.layer % interval == 0
        if any(isinstance(edit, Grouped) for edit in call.edits):
            raise ReattendError(
                f"{self.slug}: regions are given twice, and the last would hide the first: give all of them in one"
            )
        size, kept = (call.site.kind, call.num_queries, call.num_keys, apart), call.memory.setdefault("edits", {})
        if kept.get(size, (None,))[0] is not call.clock:
            kept[size] = call.clock, self.edit(call, text.each, text.stretch, rows, ratio, apart)
        return [kept[size][1]]

    def edit(self, call: Call, each: Tensor, stretch: Tensor, rows: Tensor, ratio: float, apart: bool) -> Edit:
        """each bool [B, R, Tk]: the columns of each region's text; stretch bool [B, Tk]: those of all, and what fills them up."""
        joint = call.site is not None and call.site.kind == "joint"
        tokens = call.tokens if call.query_tokens is None else call.query_tokens
        grids = {grid.row: grid for grid in grids_of(tokens, call.site, self.slug)}
        pictures, _, count = pictures_of(call)
        image = call.query_rows("image").cpu()
        seen = call.columns("reference").cpu() if joint and call.tokens is not None and "reference" in call.tokens else None
        found = []
        for row, picture in enumerate(pictures):
            if not bool(rows[row]):
                # not named, and computed like any other
                found.append((torch.ones(call.num_queries, 1), torch.ones(call.num_keys, 1, dtype=torch.bool)))
                continue
            layout, base = of_picture(self.layouts, picture, count), ~stretch[row].cpu()
            # others may have more regions
            own = each[row, : len(layout)].cpu()
            held = torch.zeros(len(own), call.num_queries)
            for number, (words, region) in enumerate(layout.items()):
                inside = held_by(region, grids[row], f"{self.slug}: region {words!r:.40}")
                held[number, grids[row].index.cpu()] = inside.float()  # of every frame
            if joint:
                always = torch.zeros(call.num_keys, dtype=torch.bool) if seen is None else seen[row]
                found.append(joint_groups(held > 0, own, base, image[row], always, ratio, apart))
            else:
                found.append(cross_groups(held, own, base, ratio))
        most = max(shares.shape[1] for shares, _ in found)
        shares, columns = (
            torch.stack([torch.nn.functional.pad(part[which], (0, most - part[which].shape[1])) for part in found])[:, None]
            for which in (0, 1)
        )
        named = None if bool(rows.all()) else rows[:, None]
        return Grouped(shares=shares.to(call.query.device), columns=columns.to(call.query.device), rows=named)


def cross_groups(held: Tensor, each: Tensor, base: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(shares [n, 1 + R], columns bool [K, 1 + R]) of one row in cross-attention.

    held [R, n]: masks, also soft ones; each bool [R, K]: the regions' texts; base bool [K]: the prompt.
    """
    total = held.sum(dim=0)
    weights = held / total.clamp_min(torch.finfo(held.dtype).tiny)
    share = torch.where(total > 0, ratio, 1.0)
    return torch.cat([share[None], (1 - share) * weights]).T, torch.cat([base[None], each]).T


def joint_groups(
    held: Tensor, each: Tensor, base: Tensor, image: Tensor, always: Tensor, ratio: float, apart: bool
) -> tuple[Tensor, Tensor]:
    """(shares [n, G], columns bool [n, G]) of one row in joint attention, a group for each kind of row.

    held bool [R, n]: the image tokens of each region; each bool [R, n]: the tokens of its text; base bool [n]: all tokens but these
    and what fills them up; image bool [n]; always bool [n]: columns that every image token sees.
    apart: whether regions are hidden from each other.
    """
    regional = each.any(dim=0)
    prompt = base & ~image
    # the prompt, and the image's second attention to it
    groups = [(torch.where(image, ratio, base.float()), base)]
    if not apart:
        inside = image & held.any(dim=0)
        groups = [(torch.where(inside, ratio, base.float()), base)]
        rows = regional.float() + (1 - ratio) * inside.float()
        return tuple(torch.stack(t, dim=1) for t in zip(*groups, (rows, regional | image | always), strict=True))  # type: ignore[return-value]
    for region, text in zip(held, each, strict=True):
        groups.append((text.float(), text | region))
    patterns, kind = held.T.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = image & (kind == number)
        if bool(pattern.any()):
            columns = each[pattern].any(dim=0) | held[pattern].any(dim=0) | always
        else:
            columns = prompt | (image & ~held.any(dim=0)) | always
        groups.append(((1 - ratio) * rows.float(), columns))
    groups = [(shares, columns) for shares, columns in groups if bool((shares != 0).any())]
    return tuple(torch.stack(t, dim=1) for t in zip(*groups, strict=True))  # type: ignore[return-value]


def held_by(region: Any, grid: TokenGrid, whose: str) -> Tensor:
    """Bool [height, width]: the places of a region. Layers that see fewer places than the latents have give it one at least.

    Raises ReattendError for a region that holds none of the latents' own places.
    """
    sides = grid.height, grid.width
    if grid.whole is None or grid.whole == sides:
        return places_in(region, *sides, whose)
    all_of_them = places_in(region, *grid.whole, whose)
    # what an inner place stands for
    found = torch.nn.functional.interpolate(all_of_them[None, None].float(), size=sides, mode="nearest-exact")[0, 0] > 0
    if not bool(found.any()):
        down, across = (
            int((axis.float().mean() + 0.5) * n / m)
            for axis, n, m in zip(all_of_them.nonzero().T, sides, grid.whole, strict=True)
        )
        found[down, across] = True
    return found
