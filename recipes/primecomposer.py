"""PrimeComposer (Wang et al., ACM MM 2024): a thing from one picture put into another one, and drawn to fit there.

Fixes: a thing that is pasted into a picture keeps the light and the style of the picture that it comes from, and a model that redraws it
loses what it looks like. At the first steps the picture attends to the thing as the thing's own picture does.
Acts on: the scores of a UNet's self-attention, all layers and heads, conditional rows alone. Beside each of the first steps a further pass
of the reference runs, whose self-attention sees the thing's tokens R alone; with its queries q' and keys k', Z = q' k'_R^T / sqrt(d). In the
picture S[:, L] = Z, then S[L, :] = Z^T, with L the tokens where the thing goes. With `words`, the cross-attention of all steps: S = -inf at
the columns of the thing's words outside L. And the latents: both pictures are turned back to noise first (one pass of the denoiser for each
step of either); the run begins with them and with the run's own noise in the part of the box that the thing leaves free, and gets what is
outside the box (and, for the very first steps, the thing) from them.
Conventions: DPM-Solver++ of order 2 with 20 steps, guidance_scale 2 (photographs) to 3 (cartoons), a prompt that says what is drawn. The
whole places of a box are cut off, not rounded. The thing is in the middle of its own picture. The official code runs four rows in the further
pass; three of them change nothing. It does not reach its restriction of words, which is as its attention computes it.
Ours: the thing is cut out of `reference` and scaled into `box` here. Inversion is DDIM's under the negative prompt (the conditional one
without guidance), where the authors use a prompt of meaningless tokens; it serves every scheduler whose levels are known. The parts of the
schedule are shares of its steps, where the official code counts one step less for a solver of order 2. The reference is shown with the thing
as it is drawn once that is no longer replaced. Every picture of a batch by its own pictures, and pictures that are not square. Models that
are no UNets are refused: nothing is published for them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from ..hooks import AtStep, Capture, Edits, Latents, SiteTable, Words
from ..hooks.plan import Step
from ..hooks.trackers.part_of_schedule import lies_in
from ..interventions import Call, Edit, Keep
from ..interventions.families.composition import Correlate
from .kit.base import Info, Recipe
from .kit.denoisers import NamedWords, hidden, image_grid, reads_prompt
from .kit.descent import UNET
from .kit.layout import Box, Mask, of_picture, pictures_of, read_box
from .kit.pasting import Placed, extent, pasted, reduced
from .kit.pictures import Masks, Pictures, listed, mask_of, opened
from .kit.samplers import encoded, inverted, levels, place, reached


def _boxes(value: Any) -> Any:
    value = value.tolist() if getattr(value, "ndim", 0) else value
    several = isinstance(value, (list, tuple)) and bool(value) and all(hasattr(one, "__len__") for one in value)
    return [read_box(one) for one in value] if several else read_box(value)


class PrimeComposer(Recipe):
    slug = "primecomposer"
    info = Info(
        does="Puts a thing from one picture into another one and draws it so that it fits there.",
        paper="PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering",
        year=2024,
        arxiv="2403.05053",
        families=("reweighting", "sparsity"),
        kinds=("diffusion",),
        cost="forward",
        problems=("a thing should be put into a picture",),
        try_first={},
        sweep={"scores_until": (0.2, 0.4, 0.6)},
        code="CodeGoat24/PrimeComposer",
        licence="2-clause BSD, non-commercial",
    )

    beside = {"background": "background", "reference": "reference", "mask": "mask", "box": "box"}

    background: Pictures = Field(
        description="the picture that the thing is put into, a path or a PIL picture, or a list of one for each prompt"
    )
    reference: Pictures = Field(description="a picture that shows the thing, likewise")
    mask: Masks | None = Field(
        None,
        description="where the thing is in `reference`: the path of a picture that is not black there (a tenth of its brightest pixel and less "
        "counts as black), a PIL picture, or rows of numbers, or a list of one for each prompt; default: the whole picture is the thing",
    )
    box: Annotated[Box | list[Box], BeforeValidator(_boxes)] = Field(
        description="where it goes: [left, top, right, bottom] in shares of the background's sides, or a list of one for each prompt; it is "
        "scaled to fill the box as far as its proportions allow",
    )
    words: NamedWords = Field(
        None,
        description="the words of the prompt that mean the thing, of every prompt or a list of them per prompt: only the thing attends to them",
    )
    columns: list[list[int]] | None = Field(
        None,
        description="instead of words: columns of the text that the denoiser gets (0 is the start token), a list per prompt or one for all; "
        "for prompts that were encoded elsewhere",
    )
    occurrence: int | Literal["all"] = Field(
        "all", description="which occurrence of a word that occurs more than once, from 0, -1 = the last"
    )
    same_domain: bool = Field(
        True,
        description="both pictures are of one kind, as two photographs are: the run begins with the thing pasted into the background. False "
        "for a thing that is to be drawn in another style, as in a painting or a sketch",
    )
    scores_until: float = Field(
        0.4, ge=0, le=1, description="the fraction of the steps from which on the picture attends by itself"
    )
    background_until: float = Field(
        0.8, ge=0, le=1, description="the fraction of the steps up to which the background is kept as it is; 1 = to the end"
    )
    object_until: float = Field(0.2, ge=0, le=1, description="the fraction of the steps up to which the thing is kept as it is")
    centred: bool = Field(
        True, description="the thing is in the middle of its own picture, as published; False: there where it goes"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PrimeComposer:
        if self.words is not None and self.columns is not None:
            raise ValueError("give words of the thing or columns, not both")
        for name, given in (("words", self.words), ("columns", self.columns)):
            if given is not None and (not given or not all(given)):
                raise ValueError(f"{name} must hold at least one entry per prompt; leave it out to restrict none")
        return self

    @cached_property
    def masks(self) -> list[Mask | None]:
        """The masks of the things, for each prompt or once for all. Raises ReattendError for a file that is no mask."""
        return [None] if self.mask is None else [mask_of(one, "mask") for one in listed(self.mask)]

    def misfit(self, sites: SiteTable) -> str:
        chosen = self.sites_of(sites, "self")
        if not len(chosen):
            stacks = ", ".join(sorted({s.stack for s in sites})) or "none"
            return f"{self.slug} changes a UNet's self-attention; {sites.model_name} has attention in: {stacks}"
        if any(s.stack.endswith(".motion") for s in sites):
            return f"{self.slug} composes pictures; {sites.model_name} denoises videos, of which nothing is published"
        return chosen.refusal or (self.sites_of(sites, "cross").refusal if self.restricts else "")

    def sites_of(self, sites: SiteTable, kind: str) -> SiteTable:
        return sites.kind(kind).where(lambda s: s.stack in UNET)

    @property
    def restricts(self) -> bool:
        return self.words is not None or self.columns is not None

    def plan(self, sites: SiteTable) -> list[Step]:
        # pictures and masks that cannot be read are an error now
        for number in range(max(map(len, (self.masks, listed(self.reference))))):
            mask, references = self.masks[number % len(self.masks)], listed(self.reference)
            reference = opened(references[number % len(references)], "reference")
            if mask is not None:
                extent(mask, reference.size)
        for one in listed(self.background):
            opened(one, "background")
        own = self.sites_of(sites, "self")
        beside: list[Step] = [Edits(own, self.alone), Capture(own, self.note)]
        steps: list[Step] = [Latents(self.before, self.after, steps=beside), Edits(own, self.correlate, self.slug)]
        if self.restricts:
            columns = None if self.columns is None else [[list(row)] for row in self.columns]
            words: Any = [self.words] if self.words and isinstance(self.words[0], str) else self.words
            steps += [
                Words("composed", words, columns, self.occurrence),
                Edits(self.sites_of(sites, "cross"), self.restrict, self.slug),
            ]
        return steps

    # -- latents -------------------------------------------------------------------------------------------------------

    def before(self, at: AtStep) -> Tensor | None:
        """Before every step: the pass of the reference, for the scores of this step; before the first one also what the run begins with."""
        memory, x = at.memory, at.latents
        if at.clock.step == 0:
            x = self.begin(at)
        memory["seen"] = {}
        if self.scores_until and lies_in(at.clock, 0, self.scores_until, self.slug):
            reference = memory["reference"][place(at.scheduler, at.clock)]
            if not self._held(at):
                reference = self.moved(memory["placed"], x, reference, back=True)
            memory["looking"] = True
            at.look(reference, text="conditional")
            del memory["looking"]
        return x if at.clock.step == 0 else None

    def begin(self, at: AtStep) -> Tensor:
        """Turns both pictures back to noise, and gives what the run begins with."""
        count, (height, width) = len(at.latents), at.latents.shape[-2:]
        pictures, references, placed = [], [], []
        for number in range(count):
            background = opened(of_picture(listed(self.background), number, count, "background"), "background")
            reference = opened(of_picture(listed(self.reference), number, count, "reference"), "reference")
            mask = of_picture(self.masks, number, count, "mask") or ("1" * reference.width,) * reference.height
            box: Any = of_picture(self.box if isinstance(self.box, list) else [self.box], number, count, "box")
            composite, own, where = pasted(background, reference, mask, box, self.centred)
            pictures.append(composite if self.same_domain else background)
            references.append(own)
            placed.append(reduced(where, height, width))
        text = "unconditional" if "unconditional" in at.clock.branches else "conditional"
        clean = encoded(at.pipeline, pictures, at.latents, "background")
        theirs = encoded(at.pipeline, references, at.latents, "reference")
        memory, here = at.memory, place(at.scheduler, at.clock)
        memory["placed"], memory["background"] = placed, inverted(at, clean, text)
        memory["reference"] = inverted(at, theirs, text)
        last = len(levels(at.scheduler)) - 1
        memory["background"][last], memory["reference"][last] = clean, theirs
        start = memory["background"][here]
        if not self.same_domain:
            start = self.moved(placed, memory["reference"][here], start)
        return torch.where(self.free(placed, start), at.latents, start)

    def after(self, at: AtStep) -> Tensor:
        """After every step: the background outside the box, and the thing at the first of them, as they are at the level reached."""
        x, memory, now = at.latents, at.memory, reached(at.scheduler, at.clock)
        if self.background_until and lies_in(at.clock, 0, self.background_until, self.slug):
            inside = torch.stack([one.box(*x.shape[-2:]) for one in memory["placed"]])[:, None].to(x.device)
            x = torch.where(inside, x, memory["background"][now])
        return self.moved(memory["placed"], memory["reference"][now], x) if self._held(at) else x

    def _held(self, at: AtStep) -> bool:
        """Whether the thing is kept as it is at this step."""
        return bool(self.object_until) and lies_in(at.clock, 0, self.object_until, self.slug)

    def moved(self, placed: list[Placed], source: Tensor, into: Tensor, back: bool = False) -> Tensor:
        """Latents [B, C, h, w] `into`, with the thing from `source`: from the reference to the picture, or `back`."""
        new = into.clone()
        for number, one in enumerate(placed):
            theirs, ours = (places.to(into.device) for places in one.places(*into.shape[-2:]))
            come, go = (ours, theirs) if back else (theirs, ours)
            new[number].flatten(1)[:, go] = source[number].flatten(1)[:, come]
        return new

    def free(self, placed: list[Placed], like: Tensor) -> Tensor:
        """Bool [B, 1, h, w]: what the thing leaves free of its box."""
        found = torch.stack([one.box(*like.shape[-2:]) for one in placed])
        for number, one in enumerate(placed):
            found[number].view(-1)[one.places(*like.shape[-2:])[1]] = False
        return found[:, None].to(like.device)

    # -- attention -----------------------------------------------------------------------------------------------------

    def alone(self, call: Call) -> list[Edit]:
        """In the pass of the reference: every token sees the thing's alone."""
        if "looking" not in call.memory:
            return []
        unseen = torch.ones(call.batch, call.num_keys, dtype=torch.bool)
        for row, (theirs, _) in enumerate(self.tokens(call)):
            # a layer that sees too few places to hold the thing is left alone
            unseen[row, theirs if len(theirs) else slice(None)] = False
        return [hidden(unseen.to(call.query.device))] if bool(unseen.any()) else []

    def note(self, call: Call, edits: Any) -> None:
        """In the pass of the reference: keeps its queries, and its keys of the thing."""
        if "looking" in call.memory and call.site is not None:
            keys = [call.key[row, :, theirs.to(call.key.device)] for row, (theirs, _) in enumerate(self.tokens(call))]
            call.memory["seen"][call.site.name] = call.query.detach(), [key.detach() for key in keys]

    def tokens(self, call: Call) -> list[tuple[Tensor, Tensor]]:
        """For every picture of the run, the tokens R of the thing in its own picture, and those L of where it goes, at a call's raster."""
        grid = image_grid(call, self.slug)
        flat = grid.flatten().cpu()
        return [(flat[theirs], flat[ours]) for theirs, ours in (one.places(*grid.shape) for one in call.memory["placed"])]

    def correlate(self, call: Call) -> list[Edit]:
        """S[:, L] = Z, S[L, :] = Z^T in the conditional rows of every picture."""
        seen = call.memory.get("seen", {}).get(call.site.name if call.site else "")
        rows = call.clock.rows("conditional", call.batch)
        if seen is None or rows is None:
            return []
        numbers, tokens = torch.tensor(pictures_of(call).numbers), self.tokens(call)
        edits: list[Edit] = []
        for number in numbers[rows.cpu()].unique().tolist():
            own, columns = rows.cpu() & (numbers == number), tokens[number][1].to(call.query.device)
            query, key = seen[0][number : number + 1], seen[1][number][None]
            edits.append(Correlate(query=query, key=key, columns=columns, rows=own[:, None].to(call.query.device)))
        return [edit for edit in edits if not edit.is_identity]

    def restrict(self, call: Call) -> Edit | None:
        """S = -inf at the thing's words outside L, in the conditional rows."""
        rows = call.clock.rows("conditional", call.batch)
        if rows is None or not reads_prompt(call) or "placed" not in call.memory:
            return None
        numbers = pictures_of(call).numbers
        grid = image_grid(call, self.slug)
        inside = torch.ones(call.batch, call.num_queries, dtype=torch.bool)
        for row in rows.nonzero()[:, 0].tolist():
            places = call.memory["placed"][numbers[row]].places(*grid.shape)[1]
            if len(places):
                inside[row] = False
                inside[row, grid.flatten().cpu()[places]] = True
        if bool(inside.all()):
            return None
        named = call.columns("composed")
        return Keep(pattern=(inside.to(named.device)[:, :, None] | ~named[:, None])[:, None], rows=rows[:, None])
