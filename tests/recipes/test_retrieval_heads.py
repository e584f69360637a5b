"""Retrieval heads: the official detection, span and masking numbers, every mode's meaning, and profiles from detection to use."""

from __future__ import annotations

import functools
import json
import re

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import (
    Call,
    Clock,
    ReattendError,
    Site,
    TokenMap,
    UnsupportedError,
    fused,
    reference_with_weights,
)
from reattend.interventions.families.heads import copy_score, find_phrase, glance
from reattend.recipes import Profile, cached_profile, recipe, recipe_class
from reattend.recipes.kit.heads import random_control, ranked
from reattend.recipes.kit.profile import fingerprint
from reattend.recipes.profiling.material.needles import NEEDLES, make_samples, recall
from transformers import LlamaConfig, LlamaForCausalLM

SITE = Site("layer", 0, "decoder", "self", 4, 2, 8, True)


golden = functools.partial(golden_file, "retrieval-heads")


def tiny(layers=3, **changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 15
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def decode_call(keys=12, pads=(0, 3), seed=0) -> Call:
    torch.manual_seed(seed)
    query, key, value = torch.randn(2, 4, 1, 8) * 3, torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    padding = torch.arange(keys - 1)[None] < torch.tensor(pads)[:, None]
    mask = ~torch.nn.functional.pad(padding, (0, 1))[:, None, None] if any(pads) else None
    real = ~padding
    roles = {"padding": padding, "bos": real & (real.cumsum(1) == 1)}
    tokens = TokenMap(2, keys - 1, keys, roles)
    return Call(query, key, value, mask, site=SITE, clock=Clock("decode"), tokens=tokens)


def edit_of(chosen, call: Call):
    """The edit of a recipe with explicit heads of layer 0 on a call."""
    weights = {head: 1.0 for head in chosen.heads}
    layers = {0: sorted(h for _, h in chosen.heads)}
    return chosen.intervene(lambda layer, device: chosen.edit(weights, layers, layer, device), call)


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detect", "detect_repeat"])
def test_official_detection_scores(name):
    data, facts = golden(name)
    samples, steps = data["generated"].shape
    scores = []
    for i in range(samples):
        strongest = data["attn"][i].argmax(dim=-1)
        span = int(data["needle_start"][i]), int(data["needle_end"][i])
        scores.append(copy_score(strongest, data["generated"][i], data["prompt_ids"][i], span))
    torch.testing.assert_close(torch.stack(scores), data["score_per_sample"], atol=1e-9, rtol=0)
    mean = torch.stack(scores).mean(dim=0)
    torch.testing.assert_close(mean, data["score_mean"].double(), atol=1e-9, rtol=0)
    assert [list(head) for head, _ in ranked(mean)] == data["ranking"].tolist()


def test_repeats_count_once_as_a_set():
    data, _ = golden("detect_repeat")
    strongest, span = data["attn"][0].argmax(dim=-1), (int(data["needle_start"][0]), int(data["needle_end"][0]))
    total = copy_score(strongest, data["generated"][0], data["prompt_ids"][0], span)
    once = copy_score(strongest, data["generated"][0], data["prompt_ids"][0], span, once=True)
    assert once.max() <= 1 and (once <= total).all() and (once < total).any()
    assert torch.equal(once > 0, total > 0)
    with pytest.raises(ReattendError, match="span"):
        copy_score(strongest, data["generated"][0], data["prompt_ids"][0], (20, 99))


def test_a_copy_head_scores_one_and_a_head_that_is_one_off_scores_zero():
    prompt = torch.arange(10, 30)
    generated = prompt[5:9]
    strongest = torch.stack([torch.arange(5, 9), torch.arange(6, 10)], dim=1)[:, None]
    assert copy_score(strongest, generated, prompt, (5, 9)).tolist() == [[1.0, 0.0]]


def test_official_spans_and_our_exact_search():
    data, _ = golden("find_span")
    for i in range(4):
        official = tuple(data[f"span_{i}"].tolist())
        found = find_phrase(data[f"prompt_{i}"].tolist(), data[f"needle_{i}"].tolist(), exact_first=False)
        assert (found or (-1, -1)) == official
    # a window that begins one token early shares enough tokens for the official search; an exact match is preferred by ours
    phrase = list(range(20))
    prompt = [99, *phrase, 98]
    assert find_phrase(prompt, phrase, exact_first=False) == (0, 20)
    assert find_phrase(prompt, phrase) == (1, 21)
    assert find_phrase([1, 2, 3], [7, 8]) is None and find_phrase([1], [1, 2]) is None


@pytest.mark.parametrize("pads", [(0, 0), (0, 3)])
def test_a_glance_is_the_largest_weight_of_the_last_row(pads):
    call = decode_call(pads=pads)
    weights = reference_with_weights(call, [])[1]
    seen = glance(call)
    assert torch.equal(seen.strongest, weights[:, :, -1].argmax(-1))
    assert seen.first.tolist() == list(pads)
    torch.manual_seed(3)
    prefill = Call(torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), is_causal=True)
    assert torch.equal(glance(prefill).strongest, reference_with_weights(prefill, [])[1][:, :, -1].argmax(-1))


# -- masking -----------------------------------------------------------------------------------------------------------


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)[None]
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@pytest.mark.parametrize("name", ["mask_decode", "mask_decode_gqa"])
def test_official_masking(name):
    data, facts = golden(name)
    heads, kv, dim = (int(facts[k]) for k in ("num_heads", "num_kv_heads", "head_dim"))
    hidden = data["hidden"]
    n = hidden.shape[1]
    q, k, v = ((hidden @ data[w].T).view(1, n, h, dim).transpose(1, 2) for w, h in (("wq", heads), ("wk", kv), ("wv", kv)))
    places, theta = torch.arange(n, dtype=torch.float32), float(facts["rope_theta"])
    q, k = rotate(q, places, theta), rotate(k, places, theta)
    call = Call(q[:, :, -1:], k, v, site=SITE, clock=Clock("decode"))
    masked = recipe("retrieval-heads", mode="mask", heads=[(0, h) for h in data["masked_heads"].tolist()])
    edit = edit_of(masked, call)
    for edits, kind in (([], "plain"), ([edit], "masked")):
        output, weights = reference_with_weights(call, edits)
        torch.testing.assert_close(weights, data[f"weights_{kind}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output, data[f"head_out_{kind}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused(call, edits), data[f"head_out_{kind}"], atol=1e-5, rtol=1e-5)
        layer = fused(call, edits).transpose(1, 2).flatten(2) @ data["wo"].T
        torch.testing.assert_close(layer, data[f"output_{kind}"], atol=1e-5, rtol=1e-5)


def test_masked_weights_are_even_over_visible_keys_and_other_heads_stay():
    call = decode_call()
    edit = edit_of(recipe("retrieval-heads", mode="mask", heads=[(0, 1), (0, 2)]), call)
    before, (_, after) = reference_with_weights(call, [])[1], reference_with_weights(call, [edit])
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]])
    torch.testing.assert_close(after[0, 1], torch.full((1, 12), 1 / 12), atol=1e-7, rtol=0)
    expected = torch.cat([torch.zeros(1, 3), torch.full((1, 9), 1 / 9)], dim=1)
    torch.testing.assert_close(after[1, 2], expected, atol=1e-7, rtol=0)
    plain = fused(call, [])
    masked = fused(call, [edit])
    assert torch.equal(masked[:, [0, 3]], plain[:, [0, 3]]) and not torch.equal(masked[:, 1], plain[:, 1])


def test_every_mode_does_what_it_says():
    call = decode_call()
    before = reference_with_weights(call, [])[1]
    plain = fused(call, [])

    def run(mode, strength):
        edit = edit_of(recipe("retrieval-heads", mode=mode, strength=strength, heads=[(0, 2)]), call)
        output, weights = reference_with_weights(call, [edit])
        torch.testing.assert_close(fused(call, [edit]), output, atol=2e-6, rtol=1e-5)
        return output, weights

    torch.testing.assert_close(run("zero", 1.0)[0][:, 2], torch.zeros(2, 1, 8))
    torch.testing.assert_close(run("gain", 0.5)[0][:, 2], 1.5 * plain[:, 2])
    sharpened = run("sharpen", 0.5)[1][:, 2]
    torch.testing.assert_close(sharpened, before[:, 2].pow(1.5) / before[:, 2].pow(1.5).sum(-1, keepdim=True))
    lowered = run("sink_down", 0.7)[1][:, 2]
    first = call.columns("bos")
    expected = torch.where(first[:, None], 0.3 * before[:, 2], before[:, 2])
    torch.testing.assert_close(lowered, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(run("sink_down", 1.0)[1].sum(-1), torch.ones(2, 4, 1))
    half = run("mask", 0.5)[1][0, 2]
    torch.testing.assert_close(half, 0.5 * before[0, 2] + 0.5 / 12)


@pytest.mark.parametrize("mode", ["mask", "zero", "sharpen", "sink_down", "gain"])
def test_strength_zero_and_no_heads_are_the_identity(mode):
    model, ids = tiny(), torch.randint(3, 64, (1, 12))
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for options in ({"heads": [(0, 1), (2, 3)], "strength": 0.0}, {"heads": []}):
        session = reattend.apply(model, "retrieval-heads", mode=mode, where="all", **options)
        again = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits)) and session.applied == 0
        if options["heads"]:
            with pytest.warns(reattend.ReattendWarning, match="never acted"):
                session.remove()
        session.remove()


# -- on a model --------------------------------------------------------------------------------------------------------


def test_masking_leaves_the_prefill_alone_and_acts_at_every_step():
    model, ids = tiny(), torch.randint(3, 64, (2, 12))
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(ids, **options)
    with reattend.apply(model, "retrieval-heads", mode="mask", heads=[(0, 0), (0, 1), (2, 2)]) as session:
        masked = model.generate(ids, **options)
        assert set(session.stats["retrieval-heads"].values()) == {4}
    assert torch.equal(plain.logits[0], masked.logits[0]) and not torch.allclose(plain.logits[1], masked.logits[1])
    with reattend.apply(model, "retrieval-heads", mode="mask", where="last_row", heads=[(0, 0), (0, 1), (2, 2)]) as session:
        earlier = model.generate(ids, **options)
        assert set(session.stats["retrieval-heads"].values()) == {5}
    # the same as feeding the prompt's last token as a decode step, as the official script does
    with reattend.apply(model, "retrieval-heads", mode="mask", heads=[(0, 0), (0, 1), (2, 2)]):
        cache = cache_of(model(ids[:, :-1], use_cache=True))
        step = model(ids[:, -1:], **{cache_name(model): cache}).logits[:, -1]
    torch.testing.assert_close(earlier.logits[0], step, atol=1e-4, rtol=1e-4)


def make_profile(model, tmp_path, scores):
    profile = Profile("retrieval-heads", fingerprint(model), {"score": scores, "count": torch.full_like(scores, 9)})
    return str(profile.save(tmp_path / "profile.safetensors"))


def test_profiles_say_which_heads_and_how_strongly(tmp_path):
    model = tiny()
    scores = torch.zeros(3, 4)
    scores[1, 2], scores[2, 0], scores[0, 3] = 0.8, 0.4, 0.2
    path = make_profile(model, tmp_path, scores)
    table = reattend.sites(model)
    chosen = recipe("retrieval-heads", profile_path=path, top=2)
    found = chosen.weighted_heads(table)
    assert [head for head, _ in found] == [(1, 2), (2, 0)]
    assert [weight for _, weight in found] == pytest.approx([1, 0.5])
    control = recipe("retrieval-heads", profile_path=path, top=2, random_heads=True, seed=3).weighted_heads(table)
    assert len(control) == 2 and not {h for h, _ in control} & {(1, 2), (2, 0), (0, 3)}
    assert [w for _, w in control] == [w for _, w in found]
    assert control == recipe("retrieval-heads", profile_path=path, top=2, random_heads=True, seed=3).weighted_heads(table)
    ids = torch.randint(3, 64, (1, 12))
    with reattend.apply(model, chosen) as session:
        model(ids)
        assert len(session.stats["retrieval-heads"]) == 2
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(tiny(layers=4), "retrieval-heads", profile_path=path)
    with pytest.raises(ReattendError, match="made by recipe 'retrieval-heads'"):
        reattend.apply(model, "act", profile_path=path)


def test_only_heads_with_the_least_score_count(tmp_path):
    model = tiny()
    scores = torch.zeros(3, 4)
    scores[1, 2], scores[2, 0], scores[0, 3] = 0.8, 0.1, 0.05
    path, table = make_profile(model, tmp_path, scores), reattend.sites(model)

    def heads(**options):
        return [head for head, _ in recipe("retrieval-heads", profile_path=path, **options).weighted_heads(table)]

    assert heads() == [(1, 2), (2, 0)] and heads(min_score=0.5) == [(1, 2)]
    assert heads(min_score=0.0, top=3) == [(1, 2), (2, 0), (0, 3)] and len(heads(random_heads=True)) == 2
    with pytest.raises(UnsupportedError, match="score of 0.9 or more"):
        reattend.apply(model, "retrieval-heads", profile_path=path, min_score=0.9)


def test_the_profile_kept_for_the_model_is_used_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    model, ids = tiny(), torch.randint(3, 64, (1, 12))
    for options, message in (({}, "must be told"), ({"profile_path": "cached"}, "no profile of 'retrieval-heads' is kept")):
        with pytest.raises(ReattendError, match=message):
            reattend.apply(model, "retrieval-heads", **options)
    made = []

    def detect(slug, model, tokenizer, **options):
        made.append(options)
        return Profile(slug, fingerprint(model), {"score": torch.eye(3, 4) * 0.5}, {})

    monkeypatch.setattr("reattend.recipes.profiling.retrieval_heads.detect", detect)
    for _ in range(2):
        cached_profile("retrieval-heads", model, None, needles=2)
    assert made == [{"needles": 2}]
    by_name = {}
    for options in ({}, {"profile_path": "cached"}, {"heads": [(0, 0), (1, 1), (2, 2)]}):
        with reattend.apply(model, "retrieval-heads", **options) as session:
            by_name[str(options)] = model(ids).logits
            assert session.applied == 3
    first, *others = by_name.values()
    assert all(torch.equal(first, other) for other in others) and not torch.equal(first, model(ids).logits)
    with pytest.raises(UnsupportedError, match="must be told"):
        reattend.apply(tiny(layers=4), "retrieval-heads")


def test_published_scores_are_read(tmp_path):
    table = reattend.sites(tiny())
    file = tmp_path / "scores.json"
    file.write_text('{"0-1": [0.2, 0.4], "2-3": 0.9, "1-0": [0.0]}')
    found = recipe("retrieval-heads", profile_path=str(file)).weighted_heads(table)
    assert found == [((2, 3), 1.0), ((0, 1), pytest.approx(1 / 3))]
    scores = torch.rand(3, 4)
    file.write_text(json.dumps({f"{i // 4}-{i % 4}": score for i, score in enumerate(scores.flatten().tolist())}))
    again = recipe("retrieval-heads", profile_path=str(file)).scored_heads(table)
    assert [head for head, _ in again] == [head for head, _ in ranked(scores)]
    file.write_text('{"30-1": 0.5}')
    with pytest.raises(UnsupportedError, match="layer 30"):
        reattend.apply(tiny(), "retrieval-heads", profile_path=str(file))
    for text in ("[1]", "{}", '{"a": 1}', '{"0-1": []}', '{"0-1": "x"}', "no"):
        file.write_text(text)
        with pytest.raises(ReattendError, match="holds no head scores|is not valid JSON"):
            reattend.apply(tiny(), "retrieval-heads", profile_path=str(file))


def test_random_controls_avoid_the_best_heads():
    ranking = [(i // 32, i % 32) for i in range(1024)]
    assert not set(random_control(ranking, 30, 0)) & set(ranking[:100])
    assert len(set(random_control(ranking, 30, 0))) == 30 and random_control(ranking, 30, 0) != random_control(ranking, 30, 1)
    with pytest.raises(ReattendError, match="random control"):
        random_control(ranking[:12], 8, 0)


# -- profiling ---------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words and signs, which learns them as they come."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def __init__(self):
        self.known = ["<pad>", "<eos>"]

    def __call__(self, text, add_special_tokens=True):
        ids = []
        for word in re.findall(r"[\w']+|[^\w\s]", text):
            if word not in self.known:
                self.known.append(word)
            ids.append(self.known.index(word))
        return {"input_ids": ids}

    def decode(self, ids):
        return " ".join(self.known[i] if i < len(self.known) else "?" for i in ids)


def test_needles_lie_where_they_should():
    words = Words()
    samples = make_samples(words, [150, 300], [0.0, 0.5, 1.0], NEEDLES[:2])
    assert len(samples) == 12
    for sample in samples:
        span = sample.ids[slice(*sample.span)]
        assert words.decode(span) == sample.needle.answer
        assert words.decode(sample.ids).count(words.decode(words(sample.needle.sentence)["input_ids"])) == 1
        assert abs(sample.span[1] / sample.length - sample.depth) < 0.2
    assert [s.ids for s in make_samples(words, [150], [0.5], NEEDLES[:1])] == [samples[2].ids]
    with pytest.raises(ReattendError, match="no room"):
        make_samples(words, [30], [0.5], NEEDLES[:1])


def test_recall_counts_words():
    assert recall("seven yellow lanterns", "It is: Seven, yellow.") == pytest.approx(2 / 3)
    assert recall("a a b", "a") == pytest.approx(1 / 3) and recall("a", "") == 0


def test_profiling_refuses_a_model_that_finds_nothing_and_leaves_it_untouched():
    model = tiny(layers=2)
    model.resize_token_embeddings(400)
    before = model(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(ReattendError, match="only 0 of 2 hidden sentences"):
        recipe_class("retrieval-heads").profile(model, Words(), lengths=[80], depths=[0.2, 0.8], needles=1)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    with reattend.apply(model, "streaming", window=4), pytest.raises(ReattendError, match="end the session"):
        recipe_class("retrieval-heads").profile(model, Words(), needles=1)
    for options, message in (
        ({"needles": 9}, "needles must be 1 to 5"),
        ({"depths": [2.0]}, "depths"),
        ({"count": "mean"}, "count"),
        ({"lengths": []}, "must not be empty"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ReattendError, match=message):
            recipe_class("retrieval-heads").profile(model, Words(), **options)
