"""Predictions before and after: the distribution over labels, or over words at a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import ReattendError
from .job import Job, Tick
from .outcome import Outcome
from .text import kl_divergence

TOP = 5


class PredictionJob(Job):
    """One forward pass on prepared inputs; the prediction is a row of the logits: the mask's, the class's, or the next token's."""

    kind = "prediction"

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        tokenizer: Any,
        inputs: dict[str, Any],
        options: dict[str, Any],
        seed: int,
        asked: str,
    ) -> None:
        super().__init__(model, tokenizer, seed)
        self._module, self.options, self.asked = module, options, asked
        self.inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        self.pictures: list[Any] = []

    @property
    def module(self) -> nn.Module:
        return self._module

    def warm(self) -> None:
        self._logits()

    def glance(self, tick: Tick, untouched: Tensor) -> None:
        self._logits()
        tick()

    def run(self, tick: Tick) -> Tensor:
        logits = self._logits()
        tick()
        return logits

    def _logits(self) -> Tensor:
        """[V] of the one prediction that is compared."""
        self.reseed()
        with torch.no_grad():
            output = self._module(**self.inputs, **self.options)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ReattendError(
                f"{type(self._module).__name__} returns no logits to compare: use it inside a pipeline, or a model with a head"
            )
        if logits.shape[0] != 1:
            raise ReattendError(f"compare takes one input at a time, got a batch of {logits.shape[0]}")
        return logits[0] if logits.dim() == 2 else logits[0, self._position(logits.shape[1])]

    def _position(self, length: int) -> int:
        ids, mask = self.inputs.get("input_ids"), getattr(self.tokenizer, "mask_token_id", None)
        if mask is None or not isinstance(ids, Tensor):
            return length - 1
        places = (ids[0] == mask).nonzero()[:, 0].tolist()
        return places[0] if places else length - 1

    def request(self) -> dict[str, Any]:
        ids = self.inputs.get("input_ids")
        prompt = None
        if isinstance(ids, Tensor) and self.tokenizer is not None:
            prompt = self.tokenizer.decode(ids[0].tolist())
        return {"prompt": prompt, "prompt_tokens": ids.shape[1] if isinstance(ids, Tensor) else None, "settings": {}}

    def fill(self, report: Outcome, before: Tensor, after: Tensor) -> None:
        p, q = before.double().softmax(dim=-1), after.double().softmax(dim=-1)
        for side, chances in ((report.before, p), (report.after, q)):
            side.predictions = self._best(chances)
        report.inputs = list(self.pictures)
        first, second = int(p.argmax()), int(q.argmax())
        report.kl = [kl_divergence(before, after)]
        report.metrics.update(
            identical=bool(torch.equal(before, after)),
            same_top_prediction=first == second,
            kl=report.kl[0],
            total_variation=float((p - q).abs().sum() / 2),
            probability_of_first_before=float(p[first]),
            probability_of_first_after=float(q[first]),
        )

    def show(self, result: Tensor) -> list[tuple[str, float]]:
        return self._best(result.double().softmax(dim=-1))

    def _best(self, chances: Tensor) -> list[tuple[str, float]]:
        best = chances.topk(min(TOP, chances.numel()))
        return [(self._label(i, chances.numel()), float(v)) for v, i in zip(best.values, best.indices.tolist())]

    def _label(self, index: int, size: int) -> str:
        names = getattr(self._module.config, "id2label", None) or {}
        if self.asked != "fill-mask" and len(names) == size:
            return str(names[index])
        return str(index) if self.tokenizer is None else self.tokenizer.decode([index])
