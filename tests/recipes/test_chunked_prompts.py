"""Prompts that come in pieces (chunked prefill, or a beginning that was cached): the same numbers as at once, or it is said or refused."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import reattend
import tiny_models
import torch
from asked_images import ONE, TWO
from matrix_models import Case, cases
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError, ReattendWarning
from transformers import DynamicCache

FEW = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
pytestmark = [
    pytest.mark.filterwarnings("ignore:var. no first token is a sink", "ignore:the borders of the segments"),
    pytest.mark.filterwarnings("ignore:recipe .* never acted"),
]


def parametrize(**models):
    return pytest.mark.parametrize(("name", "model", "kind"), cases("in pieces", **models))


def in_pieces(case, run):
    """run(), or None where the method refuses it, in the words of its example, or tells that numbers may differ."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = run()
        except ReattendError as error:
            words = case.example.refusal("in pieces") or "prefill_chunk_size=None"
            assert re.search(words, str(error)), error
            return None
    return None if any("prefill_chunk_size=None" in str(w.message) for w in said) else found


@parametrize(llm=["Llama"], lvlm=["llava", "llava_next", "qwen2_5_vl"])
def test_never_other_numbers_without_a_word(name, model, kind):
    case = Case(name, model, kind)
    for row in (0, 1):
        with case.apply([row]):
            whole = case.generate([row])[1]
        length = case.inputs([row])["input_ids"].shape[1]
        for size in (size for size in (7, 12) if size < length):
            with case.apply([row]):
                found = in_pieces(case, lambda: case.generate([row], prefill_chunk_size=size)[1])  # noqa: B023
            if found is not None:
                torch.testing.assert_close(found, whole, atol=5e-5, rtol=1e-4)


@torch.no_grad()
@parametrize(llm=["Llama"])
def test_a_turn_after_a_cached_beginning(name, model, kind):
    """What the beginning marked stays marked, and each row is what it is in one pass."""
    case = Case(name, model, kind)
    ids = case.inputs([0])["input_ids"]
    with case.apply([0]):
        whole = case.model(ids).logits
    with case.apply([0]):
        cache = cache_of(case.model(ids[:, :-5], use_cache=True))
        rest = in_pieces(case, lambda: case.model(ids[:, -5:], **{cache_name(case.model): cache}).logits)
    if rest is not None:
        torch.testing.assert_close(rest, whole[:, -5:], atol=2e-5, rtol=1e-4)


def logits(model, inputs, **more):
    return torch.stack(model.generate(**copy.copy(inputs), **{**FEW, **more}).logits)


@pytest.mark.parametrize(
    ("name", "prompt", "told"),
    [
        ("pai, attention part", ONE, True),
        ("pai, attention part", [1, 50, 5, 6, 7, 8, 9, 12, 13, 51], False),
        ("var", ONE, False),
        ("var", TWO, True),
        ("cmai", TWO, False),
    ],
)
def test_it_is_said_where_it_is_so(name, prompt, told):
    case = Case(name, "llava", "lvlm")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with case.apply():
            logits(case.model, tiny_models.build("llava").inputs([prompt]), prefill_chunk_size=7)
    messages = [str(w.message) for w in said if issubclass(w.category, ReattendWarning) and "in pieces" in str(w.message)]
    assert len(messages) == told, "once a prompt"


@pytest.mark.parametrize("size", [4, 7])
def test_sinks_before_an_image_that_comes_later_count(size):
    """The first piece holds no image, but its first token is a sink from which var moves weight."""
    case, inputs = (
        Case("var", "llava", "lvlm"),
        tiny_models.build("llava").inputs([[1, 50, 12, 13, 5, 6, 7, "image", 8, 9, 51]]),
    )
    with case.apply():
        whole, parts = logits(case.model, inputs), logits(case.model, inputs, prefill_chunk_size=size)
    torch.testing.assert_close(parts, whole, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_pai_asks_for_its_branch_when_a_later_turn_brings_the_image():
    tiny = tiny_models.build("llava")
    model = tiny.model
    first, second, text = (tiny.inputs([p]) for p in ([1, 50, 5, 6, 7, 51], [30, 50, "image", 8, 9, 51], [30, 50, 8, 9, 51]))
    with reattend.apply(model, "pai", alpha=0, gamma=3.0) as session:
        for turn in (text, second):
            cache = {cache_name(model): DynamicCache(config=model.config.get_text_config())}
            model(**first, **cache, use_cache=True)
            inputs = {**turn, "attention_mask": torch.cat([first["attention_mask"], turn["attention_mask"]], 1)}
            if turn is text:
                model(**inputs, **cache, use_cache=True)
                continue
            with pytest.raises(ReattendError, match="prefill_chunk_size=None.*without the cache of an earlier turn"):
                model(**inputs, **cache, use_cache=True)
        assert session.applied == 0
        session.counts.clear()
