"""`analyse`: one forward pass per text, and everything that the measures need is read on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.demo_texts import STORY
from ..hooks import Plan, SiteTable, running, sites
from ..hooks.session import Session
from ..hooks.sites.discovery import original_of, pretrained_root, unwrapped_model
from ..hooks.tokens.spans import tokenizer_of
from ..interventions import ReattendError
from ..recipes.kit import checks
from .reading import Reader, Sample, Settings
from .result import Analysis

# Plain prose that no model has seen: the paragraphs of the demo's story.
TEXTS = tuple(" ".join(part.split()) for part in STORY.split("\n\n") if "{" not in part)
Text = str | tuple[str, str]


def analyse(
    model: Any,
    texts: Text | Sequence[Text] | None = None,
    *,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    epsilon: float = 0.3,
    skip_last: int = 8,
    stack: str = "decoder",
    absolute: float = 100.0,
    ratio: float = 1000.0,
) -> Analysis:
    """Looks for attention sinks, massive activations and the rhythm of attention in a model, and changes nothing.

    model: a transformers pipeline or model. texts: plain texts (no chat template is used), or (prompt, answer) pairs whose rhythm is read
    in the answer; by default six paragraphs of prose. inputs: instead of texts, what the model is called with (tensors by name; a batch
    is one sample per row): pictures, sound, anything. tokenizer: of a bare model, needed for texts. length: texts are cut to so many
    tokens; default 64, as in the paper, and no cut for pairs. epsilon: mean weight from which a position is a sink. skip_last: positions
    at the end that are not called sinks. stack: which layers ("decoder", "encoder", "vision", "audio"; `reattend.sites` lists them).
    absolute, ratio: an activation is massive from this value on, if it is also so many times the median.

    What recipes do is seen: `with reattend.apply(model, "act"): reattend.analyse(model)` measures the model under them. The n x n
    matrix is never held. Raises ReattendError for bad input before any forward runs.
    """
    for name, value in (("epsilon", epsilon), ("absolute", absolute), ("ratio", ratio)):
        checks.number(value, name)
    checks.whole_number(skip_last, "skip_last")
    checks.text(stack, "stack")
    checks.tokenizer(tokenizer)
    if length is not None:
        checks.whole_number(length, "length")
    if texts is not None and not isinstance(texts, (str, list, tuple)):
        raise ReattendError(f"texts must be a text or a list of texts or (prompt, answer) pairs, got {checks.shown(texts)}")
    for part in [texts] if isinstance(texts, str) else texts or ():
        for piece in part if isinstance(part, (list, tuple)) else (part,):
            checks.text(piece, "a text")
    if inputs is not None and not isinstance(inputs, (Mapping, list, tuple)):
        raise ReattendError(f"inputs must be a mapping of tensors, or a list of those, got {checks.shown(inputs)}")
    if not 0 < epsilon < 1:
        raise ReattendError(f"epsilon must lie between 0 and 1, got {epsilon}")
    if skip_last < 0 or absolute < 0 or ratio < 0:
        raise ReattendError(f"skip_last, absolute and ratio must be 0 or more, got {skip_last}, {absolute} and {ratio}")
    if length is not None and length < 2:
        raise ReattendError(f"length must be at least 2 tokens, got {length}")
    model = original_of(model)
    module = unwrapped_model(model)
    if not isinstance(module, nn.Module):
        raise ReattendError(f"expected a transformers model or pipeline, got {type(model).__name__}")
    table = _table(model, stack)
    tokenizer = tokenizer or getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    calls = _given(inputs, texts) if inputs is not None else _of_texts(texts, tokenizer, length)
    settings = Settings(absolute=absolute, ratio=ratio)
    recipes = [plan.recipe for session in running(model) for plan in session.plans]
    samples = [sample for call, answers in calls for sample in _read(model, module, table, settings, call, answers, tokenizer)]
    config = getattr(pretrained_root(module), "config", None)
    facts = {
        "class": table.model_name,
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "layers": table.num_layers,
        "heads": sorted({s.num_heads for s in table if s.num_heads}),
    }
    found = Analysis(facts, stack, samples, sorted({s.layer for s in table}), epsilon, skip_last, settings, recipes)
    found.notes += _notes(found, tokenizer, inputs is None)
    return found


def _table(model: Any, stack: str) -> SiteTable:
    every = sites(model)
    table = every.stack(stack).kind("self")
    if not len(table):
        known = sorted({s.stack for s in every if s.kind == "self"})
        raise ReattendError(
            f"{every.model_name} has no self-attention in the stack {stack!r}; it has: {', '.join(known) or 'none at all'}"
        )
    return table


def _of_texts(texts: Any, tokenizer: Any, length: int | None) -> list[tuple[dict[str, Any], list[int]]]:
    """One call per text: texts are never padded."""
    inner = tokenizer_of(tokenizer)
    if inner is None:
        raise ReattendError("texts need a tokenizer: pass tokenizer= (the model's tokenizer or processor), or inputs=")
    given = TEXTS if texts is None else [texts] if isinstance(texts, (str, tuple)) else list(texts)
    if not given:
        raise ReattendError("texts is empty: give at least one text")
    calls = []
    for number, text in enumerate(given):
        pair = text if isinstance(text, tuple) else (text, "")
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair) or not "".join(pair).strip():
            raise ReattendError(f"texts[{number}] must be a text or a pair (prompt, answer), not empty; got {text!r}")
        ids = list(inner(pair[0])["input_ids"])
        answer = 0
        if isinstance(text, tuple):
            answer = len(ids)
            ids += list(inner(pair[1], add_special_tokens=False)["input_ids"])
            if answer in (0, len(ids)):
                raise ReattendError(f"texts[{number}]: prompt and answer must both hold at least one token")
        limit = length or (len(ids) if answer else 64)
        if answer >= limit:
            raise ReattendError(f"texts[{number}]: its prompt alone has {answer} tokens, and length is {limit}")
        ids = ids[:limit]
        if len(ids) < 2:
            raise ReattendError(f"texts[{number}] has {len(ids)} token: attention needs at least 2")
        calls.append(({"input_ids": torch.tensor([ids])}, [answer]))
    return calls


def _given(inputs: Any, texts: Any) -> list[tuple[dict[str, Any], list[int]]]:
    if texts is not None:
        raise ReattendError("texts and inputs both name what to read: give one of them")
    every = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    calls = []
    for item in every:
        tensors = [v for v in item.values() if isinstance(v, Tensor) and v.dim()] if isinstance(item, Mapping) else []
        if not tensors:
            raise ReattendError(f"inputs must be a dict of tensors as the model takes them, got {type(item).__name__}")
        named = [item[k] for k in ("input_ids", "input_features", "decoder_input_ids", "inputs_embeds") if k in item]
        calls.append((dict(item), [0] * len((named or tensors)[0])))
    if not calls:
        raise ReattendError("inputs is empty: give at least one call's tensors")
    return calls


def _read(
    model: Any,
    module: nn.Module,
    table: SiteTable,
    settings: Settings,
    call: dict[str, Any],
    answers: list[int],
    tokenizer: Any,
) -> list[Sample]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    reader = Reader(table, settings, answers)
    options = {} if getattr(getattr(module, "config", None), "use_cache", None) is None else {"use_cache": False}
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    with torch.no_grad(), Session(model, [Plan("analyse", list(reader.steps()))]):
        module(**{**options, **arguments})
    missing = [s.name for s in table if s.layer not in reader.samples[0].importance]
    if missing or reader.real is None:
        raise ReattendError(f"the model ran, but {', '.join(missing[:3])} did not: these inputs do not reach that stack")
    ids = call.get("decoder_input_ids" if getattr(module.config, "is_encoder_decoder", False) else "input_ids")
    for row, (sample, real) in enumerate(zip(reader.samples, reader.real, strict=True)):
        places = real.nonzero()[:, 0].tolist()
        fits = isinstance(ids, Tensor) and ids.shape[1] == real.numel() and table[0].stack == "decoder"
        sample.tokens = [_piece(tokenizer, int(ids[row, k])) if fits else str(k) for k in places]  # type: ignore[index]
    return reader.samples


def _piece(tokenizer: Any, token: int) -> str:
    inner = tokenizer_of(tokenizer)
    return str(token) if inner is None else inner.decode([token])


def _notes(found: Analysis, tokenizer: Any, of_texts: bool) -> list[str]:
    notes = []
    inner = tokenizer_of(tokenizer)
    bos = getattr(inner, "bos_token", None)
    if of_texts and (bos is None or found.samples[0].tokens[0] != bos):
        notes.append("The tokenizer puts no special token in front, so the first token is the text's own first one.")
    lost = [1 - float(torch.stack([_given_away(s, n) for s in found.samples]).mean()) for n in found.layers]
    if max(lost) > 0.01:
        notes.append(
            f"Up to {100 * max(lost):.0f} % of a layer's weight goes to learned sink logits instead of tokens: a model of this kind "
            "may show no sink tokens."
        )
    return notes


def _given_away(sample: Sample, layer: int) -> Tensor:
    """Weight that all tokens together got per row, mean over heads."""
    importance = sample.importance[layer]
    n = importance.shape[1]
    seen = torch.arange(n, 0, -1) if sample.near else torch.full((n,), n)
    return (importance * seen).sum(dim=1).mean() / n
