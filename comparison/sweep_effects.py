"""What is measured of every variant on its one input, beside the untouched run: how far it moves, and how much it looks where it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..hooks import Recording, Session, capture, sites
from .job import Job
from .outcome import Outcome
from .sweep_outcome import Column, Measure
from .text import GLANCE_TOKENS, Generated, TextJob, kl_divergence


@dataclass
class Look:
    """What one run saw. logits: one [V] per token of the untouched text, kept of the untouched run alone; kl and likelier: how far those of
    a variant lie from them, means in nats. spread [n]: attention on the prompt's tokens, mean over layers.

    marked, image, counted [n] bool: the passages that the variant's recipes mark, an image's tokens, all but the first token and padding.
    text: the share of a joint attention that lies on the prompt's text.
    """

    logits: list[Tensor] | None = None
    kl: float | None = None
    likelier: float | None = None
    spread: Tensor | None = None
    marked: Tensor | None = None
    image: Tensor | None = None
    counted: Tensor | None = None
    text: float | None = None


@dataclass
class Effects:
    """Measures every variant of one job. attention: also look at the attention, in short runs of their own."""

    job: Job
    attention: bool
    untouched: Look = field(default_factory=Look)
    looks: list[Look] = field(default_factory=list)
    read: list[int] = field(default_factory=list)

    def begin(self, result: Any) -> None:
        """After the untouched run, whose result this is."""
        if isinstance(result, Generated):
            self.read = result.ids[:GLANCE_TOKENS]
        self.untouched = self._look(None)

    def look(self, session: Session) -> None:
        """Inside a variant's session."""
        found = self._look(session)
        before, after = self.untouched.logits, found.logits
        if before is not None and after is not None:
            kl = [kl_divergence(a, b) for a, b in zip(before, after, strict=True)]
            found.kl, found.likelier = sum(kl) / len(kl), _likelier(before, after, self.read)
        found.logits = None
        self.looks.append(found)

    def _look(self, session: Session | None) -> Look:
        watched = self.job.watched(sites(self.job.model))
        if not self.attention or not len(watched) or not self._tells(watched):
            return Look(self._run() if self.read else None)
        with capture(self.job.model, where=watched, tokenizer=self.job.tokenizer, spread=self.job.kind == "text") as seen:
            logits = self._run()
        if self.job.kind == "image":
            return Look(text=seen.mass_by_role().get("text"))
        return _placed(seen, logits, [span.name for span in session.spans] if session is not None else [])

    def _tells(self, watched: Any) -> bool:
        return self.job.kind == "text" or (self.job.kind == "image" and self.job.roles_tell(watched))

    def _run(self) -> list[Tensor] | None:
        """A short run: of a text's job, one that is made to read the untouched text, as far as its tokens have logits."""
        if isinstance(self.job, TextJob) and self.read:
            return self.job.read(self.read, lambda: None)
        self.job.warm()
        return None

    # -- what comes of it --------------------------------------------------------------------------------------------

    def finish(self, pairs: Sequence[Outcome], columns: Sequence[Column]) -> list[Measure]:
        """The measures, after all runs; their values go into the columns. pairs: untouched and variant, as the job compares them."""
        found = {"text": self._text, "prediction": _prediction, "image": self._image}[self.job.kind](pairs, columns)
        return [m for m in found if any(column.effect.get(m.key) is not None for column in columns)]

    def _text(self, pairs: Sequence[Outcome], columns: Sequence[Column]) -> list[Measure]:
        for column, look in zip(columns, self.looks, strict=True):
            column.effect["kl"], column.effect["log_probability"] = look.kl, look.likelier
        many = "token" if len(self.read) == 1 else f"{len(self.read)} tokens"
        first = f"the first {many} of the untouched text, which every variant was made to read"
        return [
            Measure(
                "kl", "KL", "Next-token distributions moved, nats", f"KL divergence of the untouched run from each variant, mean over {first}"
            ),
            Measure(
                "log_probability", "log-probability", "Log-probability of the untouched text, change in nats",
                f"how much likelier each variant finds the same tokens, mean over {first}; below 0: it turns away from this text",
            ),
            *self._share(columns),
        ]  # fmt: skip

    def _share(self, columns: Sequence[Column]) -> list[Measure]:
        """The share of the prompt's attention, its first token left out, on the marked passages, or on the image where none is marked."""
        plain = self.untouched
        if plain.spread is None:
            return []
        given = [look.marked for look in self.looks]
        common = next((mark for mark in given if mark is not None), plain.image)
        if common is None:
            return []
        passages = any(mark is not None for mark in given)
        marks = [common if mark is None else mark for mark in given]
        one = all(torch.equal(mark, common) for mark in marks)
        for column, look, mark in zip(columns, self.looks, marks, strict=True):
            column.effect["share"] = _part(look, mark)
            if not one:
                column.effect["share_untouched"] = _part(plain, mark)
        what = "marked passage" if passages else "image"
        each = "" if one else "; variants mark different passages, and each is measured on its own"
        explains = (
            f"share of the attention on the prompt that goes to the {what}, mean over layers, heads and the rows that read the untouched text; "
            f"the first token, on which models park attention, is left out{each}"
        )
        return [Measure("share", what, f"Attention on the {what}", explains, _part(plain, common) if one else None, "percent")]

    def _image(self, pairs: Sequence[Outcome], columns: Sequence[Column]) -> list[Measure]:
        for column, pair, look in zip(columns, pairs, self.looks, strict=True):
            column.effect["pixels"] = pair.metrics["mean_absolute_difference"]
            column.effect["structure"] = 1 - pair.metrics["ssim"]
            column.effect["text_share"] = look.text
        return [
            Measure(
                "pixels", "pixel change", "Pixel change from the untouched picture",
                "mean absolute difference of the pixels' colours, as a share of the full range", form="percent",
            ),
            Measure(
                "structure", "1 - SSIM", "Structure lost against the untouched picture, 1 - SSIM",
                "1 minus the structural similarity (SSIM): 0 for the same picture, near 1 for one that shares no structure with it",
            ),
            Measure(
                "text_share", "text", "Attention on the prompt's text",
                "share of the joint attention on the text tokens, mean over layers, heads and rows of a first denoising step",
                self.untouched.text, "percent",
            ),
        ]  # fmt: skip


def _placed(seen: Recording, logits: list[Tensor] | None, spans: Sequence[str]) -> Look:
    """What a recording of a text's run saw, by the prompt's tokens."""
    tokens = seen.tokens
    layers = {} if tokens is None else seen.spread_by_layer(tokens.prompt_length)
    if tokens is None or not layers:
        return Look(logits)

    def where(role: str) -> Tensor:
        return tokens.positions(role, 0, tokens.prompt_length)[0].cpu()

    spread = torch.stack(list(layers.values())).mean(dim=0).double()
    counted = torch.ones_like(spread, dtype=torch.bool)
    for role in ("bos", "padding"):
        if role in tokens:
            counted &= ~where(role)
    named = [where(name) for name in spans if name in tokens]
    marked = torch.stack(named).any(dim=0) if named else None
    image = where("image") if "image" in tokens else None
    return Look(logits, spread=spread, marked=marked, image=image, counted=counted)


def _part(look: Look, marked: Tensor) -> float | None:
    if look.spread is None or look.counted is None or look.spread.shape != marked.shape:
        return None
    whole = float(look.spread[look.counted].sum())
    return float(look.spread[look.counted & marked].sum()) / whole if whole > 0 else None


def _likelier(before: Sequence[Tensor], after: Sequence[Tensor], ids: Sequence[int]) -> float:
    """Mean change in nats of the log-probability of these tokens."""
    changes = [
        float(b.double().log_softmax(-1)[token] - a.double().log_softmax(-1)[token]) for a, b, token in zip(before, after, ids)
    ]
    return sum(changes) / len(changes)


def _prediction(pairs: Sequence[Outcome], columns: Sequence[Column]) -> list[Measure]:
    for column, pair in zip(columns, pairs, strict=True):
        column.effect["kl"] = pair.metrics["kl"]
        column.effect["probability"] = pair.metrics["probability_of_first_after"]
    first = pairs[0].before.predictions[0][0].strip()
    return [
        Measure("kl", "KL", "Prediction moved, nats", "KL divergence of the untouched prediction from each variant's"),
        Measure(
            "probability", repr(first), f"Probability of {first!r}", "the untouched run's first prediction",
            pairs[0].metrics["probability_of_first_before"], "percent",
        ),
    ]  # fmt: skip
