"""Training-free composite scene generation (CSG; Liu et al., ECCV 2024, arXiv 2407.13609): a box for each word of the prompt.

Fixes: things of a prompt that land anywhere, or melt into each other. In the first steps each word's attention is concentrated in its
box, by a gradient on the latents (a) and by redistributing the weights themselves (b).
Acts on: (a) the latents, before each of the first `steps` steps, `tries` times: the mean cross-attention C [n, K] and self-attention P
[n, n] of a UNet's up blocks at one resolution are read in a further pass of the prompt's rows, and x' = x - a_s d(L_cross + L_self)/dx,
a_s = scale sqrt(linspace(1, 0.5, steps)[s]). (b) all cross-attention at that resolution, one step longer: with T the weight that a place
gives to all words of the layout, A'[q, i] = T(q) in the box of word i and 0 outside, rows then summing to 1 again.
Losses, for token i with the places M_i: of the k = topk |M_i| largest C[:, i] in the box a random r = dropout k are taken, and the r
largest outside. L1 = (1 - in / (in + out))^2; L2 = (min(m - margin, o) - o)^2, m the mean of those taken, o the largest mean of another
word's token at the same places; L_cross = 5 (sum L1 + 50 sum L2). L_self = 5 sum L3, as L1 of what places give to the box in P. A
background word has its box without the boxes of all others.
Cost: `tries` further passes a step, of the prompt's rows alone and only up to the last layer that is read (with Stable Diffusion
without the two largest of four up blocks), with their backward pass. (b) alone (scale 0) costs next to nothing.
Conventions: corners of boxes are rounded to places. (b) changes the negative prompt's rows too, at the columns of the prompt's words, as
the official code does; `conditional_only` leaves them alone.
Ours: masks; boxes in shares of the picture; pictures that are not square, and at least 8 places along the shorter side; every picture by
its own layout, with the same random numbers alone and in a batch; the scheduler's scaling of the input; `strength`; rows that (b) would
leave without weight keep theirs. All tokens of a word have its box, as the paper leaves open, and do not compete with each other in L2; a
token of two words counts for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..hooks import AtStep, Capture, Edits, Latents, SiteTable, Words
from ..hooks.plan import Step
from ..interventions import Call, Edit, ReattendError, column_weights, weighted
from ..interventions.families.layout import Draw, Redistribute, selected, share_outside
from .kit.base import Info
from .kit.denoisers import reads_prompt
from .kit.descent import Descent, Looked
from .kit.layout import Regions, of_picture, per_prompt, pictures_of, places_in

LOSS, AGAINST_OTHERS = 5, 50
MOST_TRIES, KEPT = 100, 16
T = TypeVar("T")


class Layout(NamedTuple):
    """Of one picture. words: bool [words, n], the places of each; tokens: (column of the text, number of its word)."""

    words: Tensor
    tokens: list[tuple[int, int]]


class CSG(Descent):
    slug = "csg"
    info = Info(
        does="Draws each word of the prompt in the box that it was given.",
        paper="Training-free Composite Scene Generation for Layout-to-Image Synthesis",
        year=2024,
        arxiv="2407.13609",
        families=("guidance", "reweighting"),
        kinds=("diffusion",),
        cost="forward",
        problems=("things are in the wrong place of the picture", "the picture ignores a word"),
        try_first={"steps": 10, "tries": 2},
        sweep={"scale": (0.1, 0.5, 2.0), "strength": (0.5, 1.0), "steps": (10, 25), "tries": (1, 2, 5)},
        code="Papple-F/csg",
    )
    placed = {"boxes": "boxes"}

    boxes: Regions = Field(
        description='the box of each word of the prompt, [left, top, right, bottom] in shares of the picture, or its mask: {"red circle": '
        "[0.1, 0.2, 0.5, 0.6]}; several prompts may have one such mapping each",
    )
    background: Regions = Field(
        None, description="the same for words of what is behind the others: they get what the boxes of these leave of their own"
    )
    columns: dict[str, list[int]] | list[dict[str, list[int]]] | None = Field(
        None,
        description="where each of these words stands in the text that the denoiser gets, as columns from 0, for prompts that were encoded "
        "elsewhere; default: they are looked for in the prompt",
    )
    occurrence: int | Literal["all"] = Field(
        "all", description='which occurrence of a word that occurs more than once, from 0, -1 = the last, or "all" of them'
    )
    scale: float = Field(0.5, ge=0, le=50, description="how far the latents go down the gradient at the first step; 0 = not")
    tries: int = Field(5, ge=1, le=MOST_TRIES, description="how many moves there are before each of these steps")
    strength: float = Field(1.0, ge=0, le=1, description="how far weights are redistributed to the boxes; 0 = not")
    conditional_only: bool = Field(
        False, description="redistribute the weights of the prompt's rows alone, not of the negative prompt's"
    )
    topk: float = Field(
        0.8, gt=0, le=1, description="share of a box's places that the loss looks at, those with most attention"
    )
    dropout: float = Field(0.5, gt=0, le=1, description="share of these that are taken, at random")
    margin: float = Field(
        0.1, ge=0, le=1, description="how much more attention a word must have in its box than any other word there"
    )
    seed: int = Field(0, ge=0, description="of the random places")

    @model_validator(mode="after")
    def _consistent(self) -> CSG:
        if not self.boxes or not all(per_prompt(self.boxes)):
            raise ValueError("boxes must name a word and its box for every prompt")
        layouts = self.layouts
        if self.columns is not None:
            known = per_prompt(self.columns)
            if len(known) not in (1, len(layouts)):
                raise ValueError(
                    f"columns must hold one mapping for each of the {len(layouts)} prompts of boxes, or one for all"
                )
            for number, layout in enumerate(layouts):
                missing = [word for word in layout if not known[number % len(known)].get(word)]
                if missing:
                    raise ValueError(f"columns must say where {missing[0]!r} stands")
            strange = sorted({word for words in known for word in words}.difference(*layouts))
            if strange:
                raise ValueError(f"columns say where {strange[0]!r} stands, which has no box")
            if any(column < 0 for words in known for found in words.values() for column in found):
                raise ValueError("columns count from 0")
        return self

    @cached_property
    def layouts(self) -> list[dict[str, tuple[Any, bool]]]:
        """For every prompt, or once for all, {word: (region, whether it is background)}."""
        boxes, behind = per_prompt(self.boxes), per_prompt(self.background) or [{}]
        if 1 not in (len(boxes), len(behind)) and len(boxes) != len(behind):
            raise ValueError(f"boxes are for {len(boxes)} prompts, background for {len(behind)}")
        found = []
        for number in range(max(len(boxes), len(behind))):
            own, after = boxes[number % len(boxes)], behind[number % len(behind)]
            both = sorted(own.keys() & after.keys())
            if both:
                raise ValueError(f"{both[0]!r} is in boxes and in background: leave it out of one of them")
            found.append(
                {**{word: (box, False) for word, box in own.items()}, **{word: (box, True) for word, box in after.items()}}
            )
        return found

    def misfit(self, sites: SiteTable) -> str:
        return super().misfit(sites) or super().read_at(sites).refusal

    def read_at(self, sites: SiteTable) -> SiteTable:
        """The up blocks, whose self-attention is read too."""
        return sites.kind("cross", "self").where(lambda s: s.stack == "denoiser.up")

    def plan(self, sites: SiteTable) -> list[Step]:
        layouts, known = self.layouts, per_prompt(self.columns)
        name = f"{self.slug}-{self.serial}"
        if known:
            columns = [[known[number % len(known)][word] for word in layout] for number, layout in enumerate(layouts)]
            words = Words(name, columns=columns, called="mappings of boxes")
        else:
            words = Words(name, [[*layout] for layout in layouts], occurrence=self.occurrence, called="mappings of boxes")
        steps: list[Step] = [words]
        if self.scale and self.steps:
            table = self.read_at(sites)
            reader = Capture(table, lambda call, edits: self.read(name, call), grad=True)
            steps.append(Latents(partial(self.before, table), steps=[words, reader]))
        if self.strength:
            steps.append(Edits(super().read_at(sites), partial(self.redistribute, name)))
        return steps

    # -- (a) the latents ------------------------------------------------------------------------------------------------

    def before(self, table: SiteTable, at: AtStep) -> Tensor | None:
        """Before a step's ordinary pass: the latents x [B, ...], moved; None where they stay."""
        step = at.clock.step
        if step >= self.steps:
            return None
        size, x = self.size(at.clock), at.latents
        for turn in range(self.tries):
            slope = self.evaluate(table, at, x, MOST_TRIES * step + turn)[1]
            if not bool(slope.any()):
                break
            x = x - size * slope
        return None if torch.equal(x, at.latents) else x

    def read(self, name: str, call: Call) -> None:
        """Keeps C [B, n, K], and P [B, n, words] summed over the places of each word, at the resolution that is read."""
        grid = self.grid(call) if reads_prompt(call) else None
        if grid is None:
            return
        assert call.site is not None
        looked: Looked = call.memory["looked"]
        index = grid.flatten()
        if call.site.kind == "cross":
            looked.keep(call, column_weights(call, [], torch.arange(call.num_keys), index).mean(dim=1))
            looked.text = self.of_call(name, call, grid)
            return
        words = [self.words(call, number, call.batch, grid) for number in range(call.batch)]
        sums = call.query.new_zeros(call.batch, 1, call.num_keys, max(map(len, words)))
        for row, places in enumerate(words):
            sums[row, 0, index, : len(places)] = places.T.to(sums)
        looked.keep(call, weighted(call, [], sums, index).mean(dim=1))

    def loss(self, looked: Looked, number: int) -> Tensor:
        """number: of the random places, which are the same for a picture alone and in a batch."""
        cross = looked.mean("cross")
        own = looked.mean("self") if "self" in looked.maps else [None] * len(cross)
        losses = []
        for picture, layout in enumerate(looked.text):
            numbers = torch.Generator().manual_seed((self.seed << 24) + number)
            draw = partial(torch.randperm, generator=numbers)
            losses.append(sum(self.losses(cross[picture], own[picture], layout, draw)))
        return torch.stack(losses)  # type: ignore[arg-type]

    def losses(self, cross: Tensor, own: Tensor | None, layout: Layout, draw: Draw) -> tuple[Tensor, Tensor]:
        """(L_cross, L_self) of one picture. cross: C [n, K]; own [n, words]: what places give to each word's box in P."""
        words = layout.words.to(cross.device)
        intra = inter = among = cross.new_zeros(())
        for column, word in layout.tokens:
            inside, outside, taken = selected(cross[:, column], words[word], self.topk, self.dropout, draw)
            intra = intra + share_outside(inside, outside) ** 2
            others = [other for other, its in layout.tokens if its != word and other != column]
            if others:
                most = (cross[taken][:, others] * words[word][taken, None]).mean(dim=0).amax()
                inter = inter + (torch.minimum(inside.mean() - self.margin, most) - most) ** 2
        for _, word in layout.tokens if own is not None else ():
            assert own is not None
            inside, outside, _ = selected(own[:, word], words[word], self.topk, self.dropout, draw)
            among = among + share_outside(inside, outside) ** 2
        return LOSS * (intra + AGAINST_OTHERS * inter), LOSS * among

    # -- (b) the weights ------------------------------------------------------------------------------------------------

    def redistribute(self, name: str, call: Call) -> Edit | None:
        """A'[q, i] = T(q) where place q belongs to token i, 0 elsewhere; rows then have their old sum."""
        if call.clock.step > self.steps or (self.conditional_only and call.clock.rows("conditional", call.batch) is None):
            return None
        grid = self.grid(call) if reads_prompt(call) else None
        return None if grid is None else kept(call, "edits", grid, lambda: self.edit(name, call, grid))

    def edit(self, name: str, call: Call, grid: Tensor) -> Edit | None:
        layouts = self.of_call(name, call, grid)
        if layouts is None:
            return None
        columns = torch.zeros(len(layouts), call.num_keys, dtype=torch.bool)
        belongs = torch.zeros(len(layouts), call.num_queries, call.num_keys, dtype=torch.bool)
        index = grid.flatten().cpu()
        for number, layout in enumerate(layouts):
            for column, word in layout.tokens:
                columns[number, column] = True
                belongs[number, index, column] |= layout.words[word]
        whose, device = torch.tensor(pictures_of(call).numbers), call.query.device
        rows = call.columns(name).any(dim=1)
        unconditional = None if self.conditional_only else call.clock.rows("unconditional", call.batch)
        if unconditional is not None:
            rows = rows | unconditional.to(device)
        columns, belongs = columns[whose].to(device), belongs[whose].to(device)
        return Redistribute(columns=columns, belongs=belongs, strength=self.strength, rows=rows[:, None])

    # -- the layout of a call -------------------------------------------------------------------------------------------

    def of_call(self, name: str, call: Call, grid: Tensor) -> list[Layout] | None:
        """Every picture's layout; None where the call holds no prompt, and none came before it."""
        _, first, pictures = pictures_of(call)
        if None not in first:
            # the unconditional half in a call of its own has the columns of the call before it
            call.memory["columns"] = kept(call, "known columns", grid, lambda: self.columns_of(name, call, first))
        columns = call.memory.get("columns")
        return columns and [Layout(self.words(call, number, pictures, grid), columns[number]) for number in range(pictures)]

    def columns_of(self, name: str, call: Call, rows: Sequence[int | None]) -> list[list[tuple[int, int]]]:
        """Of these rows, (column, number of its word) of all tokens of the layout, the words in their order."""
        marked = [call.columns(f"{name}.{word}").cpu() for word in range(max(map(len, self.layouts)))]
        return [[(c, w) for w, mine in enumerate(marked) for c in mine[row].nonzero()[:, 0].tolist()] for row in rows]

    def words(self, call: Call, number: int, pictures: int, grid: Tensor) -> Tensor:
        """Bool [words, n]: the places of each word of a picture's layout. Raises ReattendError for a word that has none."""
        height, width = grid.shape
        known = call.memory.setdefault("places", {})
        key = (number, pictures, height, width)
        if key not in known:
            layout = of_picture(self.layouts, number, pictures)
            held = {w: places_in(region, height, width, f"{self.slug}: {w!r}") for w, (region, _) in layout.items()}
            taken = torch.stack([held[word] for word, (_, behind) in layout.items() if not behind]).any(dim=0)
            for word, (_, behind) in layout.items():
                held[word] = held[word] & ~taken if behind else held[word]
                if not bool(held[word].any()):
                    raise ReattendError(
                        f"{self.slug}: the boxes of other words leave {word!r} none of {width} x {height} places"
                    )
            known[key] = torch.stack([*held.values()]).flatten(1)
        return known[key]


def kept(call: Call, what: str, grid: Tensor, make: Callable[[], T]) -> T:
    """make(), once for the calls of a run that have the same tokens; None is asked for again."""
    store = call.memory.setdefault(what, {})
    key = (id(call.tokens), *grid.shape)
    if store.get(key, (None, None))[1] is None:
        # what each pass has its own tokens for must not pile up
        if len(store) >= KEPT:
            store.clear()
        store[key] = call.tokens, make()
    return store[key][1]
