"""Gaze-shift-guided fusion enhancement (GIFT, arXiv 2510.22067, ICML 2026).

Fixes: while a vision-language model writes, it looks less and less at what was asked about. While it reads the question, its attention
rises on the right places of the image, and meaningless sink tokens hardly move. GIFT sums these rises to one saliency map.
Acts on: the weights of the last prompt row and of every generated row, in the enhancement layers. In the half of the heads that look at
the image most, image weights are multiplied by exp(alpha * saliency); in the half that read the question most, the question's weights
grow by the same overall ratio r; rows are renormalised. The map comes from the saliency layers of the prompt's own pass where all
enhancement layers come after them (LLaVA-1.5), else from a probe pass that stops there (Qwen2-VL).
The question is the user's last turn (or `question`, or `ranges`), without template, image and wrapper tokens. The official code takes
fixed offsets from the image instead.
Conventions: layers count from 0. `beta` is our reading of the paper's weight of r: the question's factor is 1 + beta (r - 1), so 1 is the
official code (which has no beta) and 0 changes the image only.
Ours: one map per batch row, over all of its images; newline features between image rows take no part; every occurrence of a repeated
word counts (the code keeps the last); a question without any such word is read whole; a constant map changes nothing. Parts of speech
need spaCy with en_core_web_sm, as the official code does; without them, words="auto" keeps every word that is not in our list of English
function words. A later turn of a conversation, or a chunked prefill, has no probe: there the map is learned in passing, and layers
before it follow from the next step on; a chunked prefill also changes the last row of each chunk after the question's beginning
(which is said).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ..hooks import Capture, Edits, Probe, Question, SiteTable
from ..hooks.plan import Step
from ..interventions import Call, Edit, ReattendWarning, require_whole
from ..interventions.families.gaze import (
    Focus,
    Shift,
    focused_rows,
    image_columns,
    positive_shift,
    refocus_columns,
    saliency_map,
)
from ..interventions.families.sinks import SoundMap
from .kit.base import Info, Recipe
from .kit.contents import Contents, Numbers
from .kit.images import image_before, image_misfit, image_now, images_told
from .kit.language import pieces_told
from .kit.profile import CACHED, KnownModel, Profile, cached_path, find_profile
from .kit.words import chooser


class Layers(NamedTuple):
    saliency: tuple[int, ...]
    enhance: tuple[int, ...]
    alpha: float


# Layers that the official code uses.
KNOWN = {
    KnownModel("LLaVA-1.5-7B", ("llama",), 4096, 32, 11008, kind="llava"): Layers((11,), tuple(range(12, 23)), 5.0),
    KnownModel("LLaVA-1.5-13B", ("llama",), 5120, 40, 13824, kind="llava"): Layers((10,), tuple(range(14, 21)), 5.0),
    KnownModel("Qwen2-VL-7B", ("qwen2_vl", "qwen2_vl_text"), 3584, 28, 18944, kind="qwen2_vl"): Layers(
        (14,), tuple(range(5, 19)), 4.0
    ),
}
ALPHA = 5.0
REMEDY = (
    "run recipe_class('gift').profile(model, processor, samples=[(image, question), ...]).save(path) and pass profile_path=..., or "
    "pass saliency_layers=[...] and enhance_layers=[...]"
)
# a role of its own for every session: two sessions on one model may look for different questions


class GIFT(Recipe):
    slug = "gift"
    weighs = frozenset({"image"})
    info = Info(
        does="Strengthens the places of an image that drew attention while the question was read, and the question with them.",
        paper="Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
        year=2026,
        arxiv="2510.22067",
        families=("reweighting", "calibration"),
        kinds=("lvlm",),
        cost="decode",
        problems=("the model describes what is not there",),
        try_first={"alpha": 5.0},
        sweep={"alpha": (2.5, 5.0, 10.0)},
        code="amazon-science/GIFT",
        licence="CC-BY-NC-4.0",
        profiling="the layers to read and to change, from image-question pairs; known for LLaVA-1.5 and Qwen2-VL-7B",
    )

    contents = Contents({f"{name}_layers": Numbers((name,), whole=True, least=0) for name in ("saliency", "enhance")})

    alpha: float | None = Field(
        None,
        ge=0,
        le=20,
        description="strength: image weights grow by up to exp(alpha); 0 changes nothing, None = the model's published value, else 5",
    )
    saliency_layers: tuple[int, ...] | None = Field(None, description="layers in which the question's gaze is read, from 0")
    enhance_layers: tuple[int, ...] | None = Field(None, description="layers whose weights are changed, from 0")
    words: Literal["auto", "spacy", "content", "all"] = Field(
        "auto",
        description='words of the question that are read: "spacy" nouns, names, verbs, adjectives, adverbs and numbers; "content" all '
        'but English function words; "auto" the first where spaCy and en_core_web_sm are installed, else the second; "all" every token',
    )
    question: str | list[str] | None = Field(
        None, description="the question as it stands in the prompt (or one per prompt); None = the user's last turn"
    )
    ranges: list[tuple[int, int]] | None = Field(
        None,
        description="token range [start, stop) of the question instead, from the first real token: one for all, or one per prompt",
    )
    beta: float = Field(1.0, ge=0, le=10, description="weight of the question's growth; 0 changes the image only")
    head_share: float = Field(0.5, gt=0, le=1, description="share of heads that are read, and that are changed")
    clip: float = Field(3.0, gt=0, description="standard deviations from the mean at which the saliency map is clipped")
    profile_path: str | None = Field(
        None, description=f'file with the layers that a profiling run chose; "{CACHED}": the profile kept for this model'
    )

    @model_validator(mode="after")
    def _consistent(self) -> GIFT:
        if (self.saliency_layers is None) != (self.enhance_layers is None):
            raise ValueError("saliency_layers and enhance_layers go together: give both or neither")
        if self.saliency_layers is not None and not (self.saliency_layers and self.enhance_layers):
            raise ValueError("saliency_layers and enhance_layers must name at least one layer each")
        if self.saliency_layers is not None and self.profile_path is not None:
            raise ValueError("profile_path and explicit layers both name layers: give one of them")
        if self.question is not None and self.ranges is not None:
            raise ValueError("give question or ranges, not both")
        return self

    # -- what it fits ------------------------------------------------------------------------------------------------

    def misfit(self, sites: SiteTable) -> str:
        reason = image_misfit(sites, self.slug)
        if reason:
            return reason
        layers = self.layers(sites)
        if layers is None:
            return f"the layers to read and to change are not known for {sites.model_name}: {REMEDY}"
        decoder = sites.stack("decoder").kind("self")
        there = {s.layer for s in decoder}
        for name, chosen in (("saliency_layers", layers.saliency), ("enhance_layers", layers.enhance)):
            missing = [n for n in chosen if n not in there]
            if missing:
                return f"{name}: there is no layer {missing[0]}; {sites.model_name} has {min(there)} to {max(there)}"
        chosen = decoder.only([*layers.saliency, *layers.enhance])
        if chosen.refusal:
            return chosen.refusal
        few = [s for s in chosen if s.num_heads is not None and int(self.head_share * s.num_heads) < 1]
        if few:
            return f"head_share={self.head_share:g} of the {few[0].num_heads} heads of {few[0].name} is less than one head"
        return ""

    def layers(self, table: SiteTable) -> Layers | None:
        """Layers and alpha: given, from the profile, published for a model of this shape, or from a kept profile; None where there are none."""
        alpha = ALPHA if self.alpha is None else self.alpha
        if self.saliency_layers is not None and self.enhance_layers is not None:
            return Layers(self.saliency_layers, self.enhance_layers, alpha)
        if self.profile_path is None:
            for model, known in KNOWN.items():
                if model.matches(table):
                    return known if self.alpha is None else known._replace(alpha=self.alpha)
            if not cached_path(self.slug, table).is_file():
                return None
        profile = find_profile(self, self.profile_path, table)
        read, change = (tuple(profile.tensors[f"{kind}_layers"].tolist()) for kind in ("saliency", "enhance"))
        return Layers(read, change, alpha)

    # -- what it does ------------------------------------------------------------------------------------------------

    def plan(self, sites: SiteTable) -> list[Step]:
        layers = self.layers(sites)
        assert layers is not None
        if layers.alpha == 0:
            return []
        decoder = sites.stack("decoder").kind("self")
        read, change = decoder.only(layers.saliency), decoder.only(layers.enhance)
        question = self._question()
        learn = partial(self.learn, question.name)
        enhance = partial(self.enhance, question.name, layers.alpha, tuple(s.name for s in read))
        told = pieces_told(
            self.slug,
            "the map is learned in passing, so that layers before it, and the last row of each piece, do not get that of the whole",
            lambda prompt: image_before(prompt) or image_now(prompt),
        )
        steps: list[Step] = [images_told(sites, told), question]
        if max(layers.saliency) > min(layers.enhance):
            steps.append(Probe([Capture(read, lambda call, edits: learn(call))], weighed=True))
        return [*steps, Edits(read, learn), Edits(change, enhance)]

    def _question(self) -> Question:
        texts: list[list[str]] | None = None
        if self.question is not None:
            texts = [[text] for text in ([self.question] if isinstance(self.question, str) else self.question)]
        ranges = None if self.ranges is None else [[pair] for pair in self.ranges]
        must_read = self.words in ("spacy", "content")
        return Question(f"question-{self.serial}", texts, ranges, -1, words=chooser(self.words), must_read=must_read)

    def learn(self, question: str, call: Call) -> None:
        """Steps 1 to 3 of the map: the positive changes D of the question's rows on the image's columns."""
        tokens = call.tokens
        if call.clock.phase == "decode" or (tokens is not None and "image" not in tokens and not tokens.blind):
            return
        call.columns("image")  # says what is missing: a token map, or ids
        assert tokens is not None and call.site is not None
        shifts: dict[str, Shift] = call.memory.setdefault("shifts", {})
        known = shifts.get(call.site.name)
        if known is not None and known.rows == call.total:
            return  # the probe has read these rows
        start = call.total - call.num_queries
        if known is None and start:
            require_whole(call.memory, self.slug)
        if known is not None and not bool(tokens.positions(question, 0, start).any()):
            known = known.emptied()  # the next turn of a conversation, with a question of its own
        rows = tokens.positions(f"{question}-words", start, call.total)
        shifts[call.site.name] = positive_shift(call, rows, image_columns(tokens), known)

    def enhance(self, question: str, alpha: float, read: Sequence[str], call: Call) -> Edit | None:
        """Step 5 on the last row of the prompt and on the rows of generated tokens."""
        focus = self._focus(question, alpha, read, call)
        if focus is None or call.key_start >= focus.end:
            return None  # not known yet, or the image has left the window
        # a row of the batch without a map of its own keeps its bits
        rows = None if focus.rows is None else focus.rows.to(call.query.device)
        if call.num_queries > 1:
            key = (call.total, call.num_queries)
            if call.memory.get("pass") != key:
                call.memory.update({"pass": key, "rows": focused_rows(call) & focus.acting[:, None]})
            rows = call.memory["rows"].to(call.query.device)
            if not bool(call.memory["rows"].any()):
                return None
        change = partial(refocus_columns, focus, call.key_start, self.head_share, self.beta)
        return SoundMap(function=change, rows=rows, reads="heads")

    def _focus(self, question: str, alpha: float, read: Sequence[str], call: Call) -> Focus | None:
        """The factors of this prompt, made once; None where no row of the batch has any, or the map is not known yet."""
        tokens, shifts = call.tokens, call.memory.get("shifts", {})
        if not shifts and tokens is not None and ("image" in tokens or tokens.blind) and call.clock.phase == "decode":
            require_whole(call.memory, self.slug)
        if tokens is None or any(name not in shifts or shifts[name].rows < tokens.prompt_length for name in read):
            return None
        key = (tokens.prompt_length, *(shifts[name].rows for name in read))
        if call.memory.get("focus", (None,))[0] != key:
            asked = tokens.positions(question, 0, tokens.prompt_length)
            image = image_columns(tokens)
            device = shifts[read[0]].sums.device
            saliency = saliency_map([shifts[name] for name in read], image.to(device), self.head_share, self.clip)
            focus = Focus.of(saliency, image.to(device), asked.to(device), alpha)
            still = image.any(dim=1) & asked.any(dim=1) & ~focus.acting
            if bool(still.any()):
                warnings.warn(
                    f"gift: attention on the image does not rise while question {int(still.nonzero()[0])} is read, so it is left "
                    "alone: a question sees only an image that stands before it, inside the window of the saliency layer",
                    ReattendWarning,
                    stacklevel=2,
                )
            call.memory["focus"] = (key, focus if bool(focus.acting.any()) else None)
        return call.memory["focus"][1]

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Finds the layers from image-question pairs; see `profiling.gift.gaze_layers` for the options."""
        from .profiling.gift import gaze_layers

        return gaze_layers(cls, model, processor, **options)
