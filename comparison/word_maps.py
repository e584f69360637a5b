"""Where a picture looks for the words of its prompt, without and with recipes: maps and a picture of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hooks import Plan, Words, attach, sites
from ..interventions import ReattendError
from ..recipes import Recipe, apply
from ..recipes.kit.denoisers import text_sites
from ..recipes.kit.heat import Heat
from ..recipes.kit.words import content_words
from .images import ImageJob

SIDES = ("before", "after")
# {"before", "after"}: {word: [rows, columns]}
Maps = dict[str, dict[str, Tensor]]


class WordMaps:
    """Draws the pictures of a comparison once more, with the same seed, and reads where they look for words. It keeps no model alive."""

    def __init__(self, job: ImageJob, chosen: Sequence[Recipe]) -> None:
        self.model, self.options, self.seed, self.chosen = weakref.ref(job.model), job.options, job.seed, list(chosen)
        self.one_noise = job.one_noise

    def read(self, words: str | Sequence[str] | None, picture: int) -> Maps:
        """The maps of one picture, [height, width] each: the weight of all steps, layers and heads on a word's columns, mean over heads.

        words: default the content words of its prompt, up to where its text encoders stop reading. Raises ReattendError where the
        model is gone, or a word or the picture is not there.
        """
        model = self.model()
        if model is None:
            raise ReattendError(
                "the pipeline of this report is gone, and maps of words need it once more: keep it, and compare again"
            )
        prompts, each = self._prompts()
        if not isinstance(picture, int) or not 0 <= picture < len(prompts) * each:
            raise ReattendError(f"picture must be 0 to {len(prompts) * each - 1}, got {picture!r:.80}")
        prompt = prompts[picture // each]
        wanted = _wanted(words, prompt)
        named = [wanted if place == picture // each else [] for place in range(len(prompts))]
        table = text_sites(sites(model)).where(lambda s: s.supported)
        found: Maps = {}
        for side in SIDES:
            heat = Heat(table, Words("word maps", named, occurrence="all", needed=words is not None))
            session = apply(model, *self.chosen) if side == "after" else None
            try:
                with attach(model, [Plan("word maps", heat.steps)]):
                    ImageJob(model, self.options, self.seed, self.one_noise).run(lambda: None)
            finally:
                if session is not None:
                    session.remove()
            found[side] = {word: heat.map(f"word maps.{place}")[picture].cpu() for place, word in enumerate(wanted)}
        # of a word that was not read there is no weight, of any other there is
        read = [word for word in wanted if bool(found["before"][word].any())]
        if not read:
            raise ReattendError("words must be given for this prompt: of those with content its text encoders read none")
        return {side: {word: maps[word] for word in read} for side, maps in found.items()}

    def _prompts(self) -> tuple[list[str], int]:
        """(the prompts, pictures of each)."""
        given = self.options.get("prompt")
        prompts = [given] if isinstance(given, str) else given
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise ReattendError(
                "maps of words need the prompt as a text: this comparison was given none, or one that was encoded before"
            )
        return list(prompts), int(self.options.get("num_images_per_prompt") or 1)


def _wanted(words: str | Sequence[str] | None, prompt: str) -> list[str]:
    chosen = [words] if isinstance(words, str) else words
    if chosen is None:
        chosen = list(dict.fromkeys(prompt[start:stop] for start, stop in content_words(prompt)))
        if not chosen:
            raise ReattendError("words must be given for this prompt, which has no words with content")
    if (
        not isinstance(chosen, (list, tuple))
        or not chosen
        or not all(isinstance(word, str) and word.strip() for word in chosen)
    ):
        raise ReattendError(f"words must be a word or passage of the prompt, or a list of them, got {words!r:.80}")
    return list(dict.fromkeys(chosen))


def sheet(maps: Maps, pictures: dict[str, Any]) -> Any:
    """A PIL picture: a row for before and one for after, with the picture and the maps of its words over it.

    The two maps of a word have one scale. Under the second one: how many times as much weight the word has after.
    """
    from PIL import Image, ImageDraw

    from .pictures import INK, PAPER, SOFT, _font, heat_picture, level, seen_part

    shown = {side: seen_part(pictures[side], False) for side in SIDES}
    width, height = shown["before"].size
    words, left, gap, head, line = list(maps["before"]), 64, 12, 32, 24
    canvas = Image.new("RGB", (left + (len(words) + 1) * (width + gap), head + 2 * (height + gap) + line), PAPER)
    draw, font, small = ImageDraw.Draw(canvas), _font(15), _font(12)
    for column, title in enumerate(("picture", *words)):
        draw.text((left + column * (width + gap), 8), title, INK, font)
    for row, side in enumerate(SIDES):
        top = head + row * (height + gap)
        draw.text((10, top + 2), side, INK, font)
        canvas.paste(shown[side], (left, top))
        for column, word in enumerate(words, start=1):
            largest = float(torch.stack([maps[each][word] for each in SIDES]).max())
            canvas.paste(heat_picture(shown[side], level(maps[side][word], largest)), (left + column * (width + gap), top))
    for column, word in enumerate(words, start=1):
        before, after = (float(maps[side][word].mean()) for side in SIDES)
        told = f"{after / before:.2f} times the weight" if before > 0 else "no weight before"
        draw.text((left + column * (width + gap), canvas.height - line), told, SOFT, small)
    return canvas
