"""The exit layer of image tokens: the smallest one with which a model still gives its own answers.

The rule that labels the training data of DyVTE's routers, used to choose one layer: at least 99 % of the answer tokens stay the most
likely ones, and their loss grows by less than 3 %. Answers are the plain model's own, since no others are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hooks import Plan, attach, running, sites
from ...hooks.sites.discovery import unwrapped_model
from ...interventions import ReattendError
from ..kit.base import Recipe
from ..kit.profile import Profile, table_fingerprint
from ..kit.profiling import checked, track
from .material.image_questions import inputs_of, read_samples


@checked
def find_exit_layer(
    recipe: type[Recipe],
    model: Any,
    processor: Any,
    *,
    samples: Iterable[Any] | str | None = None,
    layers: Sequence[int] | None = None,
    answer_tokens: int = 8,
    agreement: float = 0.99,
    loss_ratio: float = 1.03,
    **options: Any,
) -> Profile:
    """Tries exit layers on image-question pairs; 64 to 256 of them are good. Cost: one short answer per pair and layer.

    samples: (image, question) pairs, ready inputs of the model (mappings of tensors), or a JSON-lines file of {"image": path,
    "question": text}. layers: which to try (None: all but the last). answer_tokens: how many tokens of the plain model's greedy answer
    are asked for again, each after the plain model's own ones. agreement, loss_ratio: what the layer must reach at least, and stay
    below. Tensors of the profile: exit_layer []; layers [n], agreement [n] and loss_ratio [n], what each of them reached.
    Raises ReattendError for a model that does not fit, samples without an image, or where no layer that was tried is good enough.
    """
    if options:
        raise ReattendError(
            f"profile of {recipe.slug!r} takes samples, layers, answer_tokens, agreement and loss_ratio, not {', '.join(options)}"
        )
    if answer_tokens < 1 or not 0 <= agreement <= 1 or loss_ratio <= 0:
        raise ReattendError("answer_tokens must be 1 or more, agreement between 0 and 1, and loss_ratio above 0")
    table = sites(model)
    last = max((s.layer for s in table.stack("decoder").kind("self")), default=0)
    tried = list(range(last)) if layers is None else sorted(set(layers))
    settings = [recipe(exit_layer=layer) for layer in tried]
    reasons = {layer: each.misfit(table) for layer, each in zip(tried, settings, strict=True)}
    if layers is None:
        fitting = [layer for layer in tried if not reasons[layer]]
        tried, reasons = (fitting, {}) if fitting else (tried, reasons)
    wrong = next((reason for reason in reasons.values() if reason), "")
    if wrong or not tried or tried[-1] >= last:
        raise ReattendError(f"cannot profile this model: {wrong or f'layers must name some of 0 to {last - 1}, got {tried}'}")
    if running(model):
        raise ReattendError("a profile must show the plain model: end the session that is active on it first")
    prompts, inner = read_samples(samples), unwrapped_model(model)
    plans = {layer: Plan(recipe.slug, recipe(exit_layer=layer).plan(table)) for layer in tried}
    same, loss = ({layer: 0.0 for layer in tried} for _ in range(2))
    count = plain_loss = 0.0
    for sample in track(prompts, "image-question pairs", len(prompts)):
        inputs = inputs_of(sample, processor, inner.device)
        answer, plain = _answer(inner, inputs, answer_tokens)
        count += answer.numel()
        plain_loss += _loss(plain, answer)
        for layer, plan in plans.items():
            with attach(model, [plan]) as session:
                _, logits = _answer(inner, inputs, answer_tokens, answer)
                if not session.applied:
                    raise ReattendError("every sample needs an image: one of them has no image tokens")
            same[layer] += float((logits.argmax(dim=-1) == answer).sum())
            loss[layer] += _loss(logits, answer)
    shares = {layer: same[layer] / count for layer in tried}
    ratios = {layer: loss[layer] / max(plain_loss, 1e-9) for layer in tried}
    good = [layer for layer in tried if shares[layer] >= agreement and ratios[layer] < loss_ratio]
    if not good:
        best = max(tried, key=lambda layer: (shares[layer], -ratios[layer]))
        raise ReattendError(
            f"no exit layer of {tried} keeps {agreement:.0%} of the answer tokens with a loss below {loss_ratio:g} times the plain one; "
            f"the best, {best}, keeps {shares[best]:.1%} at {ratios[best]:.3g} times: relax agreement or loss_ratio, or use no exit"
        )
    facts = {
        "exit_layer": good[0],
        "samples": len(prompts),
        "answer_tokens": answer_tokens,
        "required": {"agreement": agreement, "loss_ratio": loss_ratio},
        "agreement": {str(layer): round(share, 4) for layer, share in shares.items()},
        "loss_ratio": {str(layer): round(ratio, 4) for layer, ratio in ratios.items()},
    }
    tensors = {
        "exit_layer": torch.tensor(good[0]),
        "layers": torch.tensor(tried),
        "agreement": torch.tensor([shares[layer] for layer in tried]),
        "loss_ratio": torch.tensor([ratios[layer] for layer in tried]),
    }
    return Profile(recipe.slug, table_fingerprint(table), tensors, facts)


def _answer(model: Any, inputs: dict[str, Any], steps: int, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(new tokens [B, n], their logits [B, n, V]): greedy, or with the tokens `forced` [B, n] whatever the logits say."""
    start = inputs["input_ids"].shape[1]
    more: dict[str, Any] = {}
    if forced is not None:
        steps = forced.shape[1]
        more["prefix_allowed_tokens_fn"] = lambda row, ids: [int(forced[row, len(ids) - start])]
    with torch.no_grad():
        made = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    return made.sequences[:, start:], torch.stack(made.logits, dim=1).float()


def _loss(logits: Tensor, answer: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="sum"))
