"""Prompts that come in pieces (chunked prefill, or a beginning that was cached): the same numbers as at once, or it is said or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import reattend
import tiny_models
import torch
from asked_images import tokenizer
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import ReattendError, ReattendWarning
from transformers import DynamicCache

FEW = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
ONE = [[1, 50, 12, 13, "image", 5, 6, 7, 8, 9, 51, 30, 31, 32, 33]]
TWO = [[1, 50, 12, 13, "image", 8, 9, 51, 30, 50, "image", 12, 13, 14, 15, 51]]
GIFT = {"enhance_layers": [1, 2, 3], "words": "all", "alpha": 3.0}
METHODS = {
    "pai": {"first_layer": 1, "alpha": 0.5, "gamma": 1.0},
    "pai, branch": {"alpha": 0, "gamma": 1.3},
    "opera": {"candidates": 3},
    "spa": {"ranges": [(2, 5)]},
    "var": {"tau": 1.5, "sink_dims": list(range(8)), "first_layer": 1, "rho": 1.0, "summ": 0.0},
    "cmai": {"first_layer": 1},
    "selective-emphasis": {"first_layer": 1, "local_share": 0.5},
    "vhr": {"layers": (1, 2)},
    "gift": {"saliency_layers": [0], **GIFT},
    "gift, probe": {"saliency_layers": [2], **GIFT},
    "gift, last layer": {"saliency_layers": [1], **GIFT, "enhance_layers": [3]},
    "visual-token-exit": {"exit_layer": 1},
    "visual-token-exit, leaving": {"exit_layer": 1, "mode": "leave"},
}
REFUSED = ("pai, branch", "spa", "vhr")
pytestmark = pytest.mark.filterwarnings("ignore:var. no first token is a sink")


def logits(model, inputs, **more):
    return torch.stack(model.generate(**copy.copy(inputs), **{**FEW, **more}).logits)


def steer(model, method):
    return reattend.apply(model, method.split(",")[0], tokenizer=tokenizer(), **METHODS[method])


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_never_other_numbers_without_a_word(method, family):
    tiny = tiny_models.build(family)
    for prompts in (ONE, TWO):
        inputs = tiny.inputs(prompts)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with steer(tiny.model, method):
                whole = logits(tiny.model, inputs)
                for size in (7, 12):
                    said.clear()
                    try:
                        found = logits(tiny.model, inputs, prefill_chunk_size=size)
                    except ReattendError as error:
                        assert "prefill_chunk_size=None" in str(error)
                        continue
                    assert method not in REFUSED
                    if not any("prefill_chunk_size=None" in str(w.message) for w in said):
                        torch.testing.assert_close(found[0], whole[0], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "prompts", "told"),
    [
        ("pai", ONE, True),
        ("pai", [[1, 50, 5, 6, 7, 8, 9, 12, 13, 51]], False),
        ("var", ONE, False),
        ("var", TWO, True),
        ("cmai", TWO, False),
    ],
)
def test_it_is_said_where_it_is_so(method, prompts, told):
    tiny = tiny_models.build("llava")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with steer(tiny.model, method):
            logits(tiny.model, tiny.inputs(prompts), prefill_chunk_size=7)
    messages = [str(w.message) for w in said if issubclass(w.category, ReattendWarning) and "in pieces" in str(w.message)]
    assert len(messages) == told, "once a prompt"


@pytest.mark.filterwarnings("ignore:gift. this prompt comes in pieces")
@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("method", ["var", "gift, last layer", "visual-token-exit"])
def test_pieces_add_up(method, size):
    """The first piece holds no image, but its first token is a sink from which var moves weight; a question is cut in two."""
    tiny = tiny_models.build("llava")
    inputs = tiny.inputs([[1, 50, 12, 13, 5, 6, 7, "image", 8, 9, 51]])
    with steer(tiny.model, method):
        whole, parts = logits(tiny.model, inputs), logits(tiny.model, inputs, prefill_chunk_size=size)
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
