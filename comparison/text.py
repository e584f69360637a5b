"""Generated text before and after: first difference, and how far the next-token distributions lie apart on the shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import SiteTable
from ..interventions import ReattendError
from ..recipes.kit import checks
from .job import Job, Tick
from .outcome import Outcome, Side

DEFAULT_NEW_TOKENS = 64
GLANCE_TOKENS = 16
# Options of generate under which one sequence is written, a token at a time.
ONE_BY_ONE = {"num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "assistant_early_exit": None}
# A token is decoded together with this many before it, which decide on blanks and on characters of several tokens.
CONTEXT = 8


@dataclass
class Generated:
    """ids [T] of the new tokens; logits: one [V] per new token before any processor, or None (beams, assisted decoding)."""

    ids: list[int]
    logits: list[Tensor] | None


class TextJob(Job):
    """generate() on prepared inputs. options: keyword arguments of generate."""

    kind = "text"

    def __init__(
        self, model: Any, module: nn.Module, tokenizer: Any, inputs: dict[str, Any], options: dict[str, Any], seed: int
    ) -> None:
        super().__init__(model, tokenizer, seed)
        self._module = module
        self.inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        ids = self.inputs.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape[0] != 1:
            raise ReattendError(f"compare takes one prompt at a time, got a batch of {ids.shape[0]}: call it once per prompt")
        self.options = dict(options)
        config = self.options.get("generation_config") or getattr(module, "generation_config", None)
        most, *limits = (self.options.get(k, getattr(config, k, None)) for k in ("max_new_tokens", "max_time", "stop_strings"))
        if most is not None and (not isinstance(most, Integral) or isinstance(most, bool) or most < 1):
            raise ReattendError(f"max_new_tokens must be a whole number, 1 or more, got {checks.shown(most)}")
        if self.options.get("num_return_sequences", getattr(config, "num_return_sequences", None)) not in (None, 1):
            raise ReattendError("num_return_sequences: a comparison shows one text per run; leave it out or set it to 1")
        if "max_length" not in self.options and all(limit in (None, "", []) for limit in (most, *limits)):
            self.options["max_new_tokens"] = most = DEFAULT_NEW_TOKENS
        self.limit = most or getattr(config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
        self.pictures: list[Any] = []

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def ticks(self) -> int:
        return int(self.limit)

    def watched(self, table: SiteTable) -> SiteTable:
        return super().watched(table).stack("decoder").kind("self")

    @property
    def glance_ticks(self) -> int:
        return min(GLANCE_TOKENS, self.ticks)

    def warm(self) -> None:
        self._generate(1, None)

    def glance(self, tick: Tick, untouched: Generated) -> None:
        """Writes the untouched model's answer once more, so that every row that is read has the same text before it in both variants."""
        self.read(untouched.ids[:GLANCE_TOKENS], tick)

    def read(self, ids: list[int], tick: Tick) -> list[Tensor] | None:
        """Logits [V] before any processor at each of these tokens, which are written after the prompt whatever the model would write.

        None where the run ended before the last of them.
        """
        logits = getattr(self._generate(None, tick, ids), "logits", None) or ()
        return [step[0].reshape(-1, step.shape[-1])[-1] for step in logits] if len(logits) == len(ids) else None

    def run(self, tick: Tick) -> Generated:
        output = self._generate(None, tick)
        new = output.sequences[0, self._start(output) :].tolist()
        logits = getattr(output, "logits", None)
        usable = logits is not None and getattr(output, "beam_indices", None) is None and len(logits) >= len(new)
        return Generated(new, [step[0].reshape(-1, step.shape[-1])[-1] for step in logits or ()] if usable else None)

    def steps(self, result: Generated) -> int:
        return len(result.ids)

    def _start(self, output: Any) -> int:
        if getattr(self._module.config, "is_encoder_decoder", False):
            return 1
        ids = self.inputs.get("input_ids")
        with_prompt = isinstance(ids, Tensor) and output.sequences.shape[1] >= ids.shape[1]
        return ids.shape[1] if isinstance(ids, Tensor) and with_prompt else 0

    def _generate(self, new_tokens: int | None, tick: Tick | None, forced: list[int] | None = None) -> Any:
        """forced: the new tokens to write, whatever the model would."""
        options = dict(self.options)
        if forced is not None:
            new_tokens = len(forced)
            config = options.get("generation_config") or getattr(self._module, "generation_config", None)
            # one sequence, token by token: beams and drafts would read others
            options.pop("assistant_model", None)
            for name, plain in ONE_BY_ONE.items():
                if options.get(name, getattr(config, name, None)) not in (None, plain):
                    options[name] = plain
            options["logits_processor"] = [*(options.get("logits_processor") or ()), _Forced(forced)]
        if new_tokens is not None:
            options.pop("max_length", None)
            options.update(max_new_tokens=new_tokens, min_new_tokens=None)
        if tick is not None:
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), _Ticker(tick)]
        self.reseed()
        with torch.no_grad():
            return self._module.generate(  # type: ignore[operator]
                **self.inputs, **options, return_dict_in_generate=True, output_logits=new_tokens is None or forced is not None
            )

    def pieces(self) -> list[str]:
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or getattr(self._module.config, "is_encoder_decoder", False):
            return []
        return prompt_pieces(ids[0].tolist(), self.tokenizer)

    @property
    def sees_centre(self) -> bool:
        return bool(getattr(getattr(self.tokenizer, "image_processor", None), "do_center_crop", False))

    def request(self) -> dict[str, Any]:
        hidden = ("generation_config", "stopping_criteria", "streamer", "assistant_model")
        config = self.options.get("generation_config")
        settings = config.to_diff_dict() if config is not None else {}
        settings = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
        settings.update({k: v for k, v in self.options.items() if k not in hidden})
        ids = self.inputs.get("input_ids")
        count = ids.shape[1] if isinstance(ids, Tensor) else None
        prompt = self._decode(ids[0].tolist()) if isinstance(ids, Tensor) else None
        return {"prompt": prompt, "prompt_tokens": count, "settings": settings}

    # -- results -----------------------------------------------------------------------------------------------------

    def fill(self, report: Outcome, before: Generated, after: Generated) -> None:
        for side, result in ((report.before, before), (report.after, after)):
            side.text = self.show(result)
            side.tokens = self._pieces(result.ids)
        report.inputs = list(self.pictures)
        place = first_difference(before.ids, after.ids)
        report.first_difference = place
        report.metrics["identical"] = place is None
        report.metrics["first_difference_token"] = place
        report.metrics["first_difference_character"] = _character(report.before, report.after)
        if before.logits is None or after.logits is None:
            report.notes.append("KL is not reported: beam search and assisted decoding give no logits per token.")
            return
        report.kl = shared_kl(before.logits, after.logits, place)
        report.metrics["kl_mean"] = sum(report.kl) / len(report.kl) if report.kl else None
        report.metrics["kl_max"] = max(report.kl, default=None)
        report.metrics["kl_at_first_difference"] = report.kl[place] if place is not None and place < len(report.kl) else None

    def show(self, result: Generated) -> str:
        return self._decode(result.ids, skip_special=True)

    def _decode(self, ids: list[int], skip_special: bool = False) -> str:
        if self.tokenizer is None:
            return " ".join(str(i) for i in ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def _pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds, special tokens shown."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        pieces, done = [], ""
        for stop in range(1, len(ids) + 1):
            text = self._decode(ids[:stop])
            pieces.append(text[len(done) :] if text.startswith(done) else self._decode(ids[stop - 1 : stop]))
            done = text
        return pieces


def prompt_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token; numbers where there is no tokenizer. Time grows with the number of tokens only."""
    if tokenizer is None:
        return [str(i) for i in ids]
    pieces = []
    for place in range(len(ids)):
        start = max(0, place - CONTEXT)
        before, text = (tokenizer.decode(list(ids[start:stop])) for stop in (place, place + 1))
        pieces.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[place]]))
    return pieces


class _Ticker:
    """A stopping criterion that never stops, and tells how far generation is."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Forced:
    """A processor of logits that leaves one token to choose: the next one of a given text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.start = ids, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start < 0:
            self.start = input_ids.shape[1]
        place = min(input_ids.shape[1] - self.start, len(self.ids) - 1)
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([self.ids[place]], device=scores.device), 0.0)


def first_difference(before: Sequence[int], after: Sequence[int]) -> int | None:
    """Index of the first token at which two sequences differ, the end of one of them included; None if they are equal."""
    for place, (a, b) in enumerate(zip(before, after)):
        if a != b:
            return place
    return None if len(before) == len(after) else min(len(before), len(after))


def shared_kl(before: Sequence[Tensor], after: Sequence[Tensor], place: int | None) -> list[float]:
    """KL(before || after) in nats of the next-token distributions, for every token up to and including the first difference.

    before, after: logits [V] per token. Beyond the first difference the prefixes differ, so the numbers would mean nothing.
    """
    count = min(len(before), len(after)) if place is None else min(place + 1, len(before), len(after))
    return [kl_divergence(before[i], after[i]) for i in range(count)]


def kl_divergence(before: Tensor, after: Tensor) -> float:
    """KL(p || q) in nats of two distributions given as logits [V]."""
    p, q = before.double().log_softmax(dim=-1), after.double().log_softmax(dim=-1)
    terms = torch.where(p > float("-inf"), p.exp() * (p - q), 0.0)
    return max(0.0, float(terms.sum()))


def _character(before: Side, after: Side) -> int | None:
    if before.text == after.text:
        return None
    return len(commonprefix([before.text or "", after.text or ""]))
