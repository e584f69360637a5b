"""ACT: the official code's numbers, its invariants, and that it holds on batches, chunks, decode steps and shared key heads."""

from __future__ import annotations

import functools
import json

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import Call, Clock, ReattendError, Site, TokenMap, UnsupportedError, fused, reference_with_weights
from reattend.interventions.families.calibration import column_statistics, hidden_sinks, learn_sinks
from reattend.recipes import Profile, recipe, recipe_class
from reattend.recipes.kit.profile import cached_path, fingerprint
from reattend.recipes.profiling.material.labelled_examples import built_in
from reattend.recipes.profiling.material.labelled_tasks import labelled_task
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SITE = Site("layer", 2, "decoder", "self", None, None, None, True)


golden = functools.partial(golden_file, "act")


def call_with_weights(weights: torch.Tensor) -> Call:
    """A causal call whose softmax weights are the given ones: queries hold their logarithms, keys and values unit vectors."""
    eye = torch.eye(weights.shape[-1]).expand_as(weights).contiguous()
    return Call(weights.clamp_min(1e-37).log(), eye, eye, is_causal=True, scale=1.0, site=SITE, clock=Clock("prefill"))


def random_call(heads=4, kv=2, n=40, batch=1, pads=(0,), sharp=3.0, seed=0) -> Call:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(batch, h, n, 8) for h in (heads, kv, kv))
    padding = torch.arange(n)[None] < torch.tensor(pads)[:, None]
    mask = None
    if any(pads):
        mask = (torch.ones(n, n, dtype=torch.bool).tril()[None] & ~padding[:, None])[:, None]
    real = ~padding
    bos = real & (real.cumsum(1) == 1)
    tokens = TokenMap(batch, n, n, {"padding": padding, "bos": bos})
    return Call(query * sharp, key, value, mask, mask is None, site=SITE, clock=Clock("prefill"), tokens=tokens)


def tiny(kv=2, layers=5) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 15
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("name", ["prefill_sinks", "first_not_sink", "no_sink", "beta_one", "beta_zero"])
@pytest.mark.parametrize("executor", [fused, lambda call, edits: reference_with_weights(call, edits)[0]])
def test_official_numbers(name, executor):
    data, facts = golden(name)
    heads = data["heads"].tolist()
    call = call_with_weights(data["attn_in"])
    act = recipe(
        "act",
        heads=[(2, h) for h in heads],
        beta=float(facts["beta"]),
        threshold=float(facts["threshold"]),
        official_exempt=True,
    )
    edit = act.calibrate({2: heads}, call)
    output = executor(call, [] if edit is None else [edit])
    torch.testing.assert_close(output, data["attn_out"], atol=1e-6, rtol=1e-5)
    statistics = column_statistics(call, range(call.num_heads))
    assert torch.equal((statistics.means[0] > float(facts["threshold"])).to(torch.uint8), data["over_threshold"])
    if name in ("prefill_sinks", "first_not_sink", "beta_zero"):
        assert edit is not None and (data["attn_out"] - data["attn_in"]).abs().max() > 0.01


def test_our_exemption_spares_the_first_token_only():
    data, facts = golden("first_not_sink")
    call = call_with_weights(data["attn_in"])
    statistics = column_statistics(call, range(call.num_heads))
    ours = hidden_sinks(statistics, float(facts["threshold"]))
    official = hidden_sinks(statistics, float(facts["threshold"]), exempt_first_over=True)
    over = data["over_threshold"].bool()
    assert torch.equal(ours[0], over & (torch.arange(over.shape[1]) > 0))
    spared = (ours & ~official)[0]
    assert spared.any() and torch.equal(spared.sum(1) <= 1, torch.ones(len(spared), dtype=torch.bool))


def test_a_mean_equal_to_the_threshold_is_no_sink():
    call = call_with_weights(torch.full((1, 1, 8, 8), 0.125).tril() + torch.diag(torch.linspace(0.875, 0, 8)))
    statistics = column_statistics(call, [0])
    column = float(statistics.means[0, 0, 5])
    assert not hidden_sinks(statistics, column)[0, 0, 5]
    assert hidden_sinks(statistics, column * 0.999)[0, 0, 5]


@pytest.mark.parametrize("heads", [[0], [1, 3], [0, 1, 2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("pads", [(0, 0), (5, 0)])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_column_statistics_are_those_of_the_matrix(monkeypatch, heads, pads, chunk):
    monkeypatch.setattr("reattend.interventions.engine.statistics.CHUNK_WEIGHTS", chunk)
    call = random_call(batch=2, pads=pads)
    weights = reference_with_weights(call, [])[1][:, heads]
    real = call.query_rows("prompt").float()
    sums = (weights * real[:, None, :, None]).sum(2) * real[:, None]
    found = column_statistics(call, heads)
    torch.testing.assert_close(found.sums, sums, atol=1e-5, rtol=1e-5)
    counts = (torch.arange(40, 0, -1)[None] * real).expand(2, -1)
    torch.testing.assert_close(found.counts[:, 0], counts, atol=0, rtol=0)
    with pytest.raises(ReattendError, match="heads 0 to 3"):
        column_statistics(call, [4])
    with pytest.raises(ReattendError, match="ascending"):
        column_statistics(call, [2, 1])


def test_the_executor_reuses_what_the_statistics_computed(monkeypatch):
    from reattend.interventions.engine import biases, kernels, tasks

    asked = []
    original = kernels.attend

    def counted(query, *arguments):
        asked.append((query.shape[1], arguments[-1] is True))
        return original(query, *arguments)

    for module in (biases, tasks):
        monkeypatch.setattr(module, "attend", counted)
    call = random_call(n=300)
    edit = recipe("act", heads=[(2, 1), (2, 2)], threshold=0.02).calibrate({2: [1, 2]}, call)
    shared = fused(call, [edit])
    assert [need for _, need in asked].count(True) == 1
    call.attended.clear()
    # without it the executor may go around the sinks instead of correcting for them: the same to rounding
    torch.testing.assert_close(fused(call, [edit]), shared, atol=5e-5, rtol=1e-3)
    assert [need for _, need in asked].count(True) == 2


def test_invariants_on_random_inputs():
    call = random_call()
    act = recipe("act", heads=[(2, 1), (2, 2)], threshold=0.08)
    edit = act.calibrate({2: [1, 2]}, call)
    before, (output, after) = reference_with_weights(call, [])[1], reference_with_weights(call, [edit])
    torch.testing.assert_close(fused(call, [edit]), output, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
    assert (after >= 0).all() and torch.equal(after[:, [0, 3]], before[:, [0, 3]])
    for position, head in enumerate(edit.heads):
        sinks = edit.source[0, position]
        assert sinks.any()
        torch.testing.assert_close(after[0, head][:, sinks], 0.4 * before[0, head][:, sinks], atol=1e-7, rtol=1e-5)
        rest, old = after[0, head][:, ~sinks], before[0, head][:, ~sinks]
        torch.testing.assert_close(rest / rest.sum(-1, keepdim=True), old / old.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_identity_without_sinks_and_with_beta_one():
    call = random_call()
    assert recipe("act", heads=[(2, 1)], threshold=0.99).calibrate({2: [1]}, call) is None
    assert recipe("act", heads=[(2, 1)], beta=1.0).calibrate({2: [1]}, call) is None


def test_rows_that_see_only_sinks_keep_their_weights():
    weights = torch.full((1, 1, 6, 6), 0.0)
    weights[..., 0, 0] = 1
    weights[..., 1:, 1] = 1  # all the weight of every later row lies on column 1
    call = call_with_weights(weights)
    edit = recipe("act", heads=[(2, 0)]).calibrate({2: [0]}, call)
    assert edit is not None and edit.source[0, 0].tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(fused(call, [edit]), weights, atol=1e-6, rtol=0)


def test_the_alpha_rule_is_a_threshold_of_alpha_over_n():
    call = random_call(n=40)
    by_alpha = recipe("act", heads=[(2, 1)], threshold_alpha=4.0).calibrate({2: [1]}, call)
    call.memory.clear()
    fixed = recipe("act", heads=[(2, 1)], threshold=0.1).calibrate({2: [1]}, call)
    assert torch.equal(by_alpha.source, fixed.source)


def test_min_rows_spares_the_last_columns():
    call = random_call()
    edit = recipe("act", heads=[(2, h) for h in range(4)], min_rows=6, threshold=0.05).calibrate({2: [0, 1, 2, 3]}, call)
    call.memory.clear()
    every = recipe("act", heads=[(2, h) for h in range(4)], threshold=0.05).calibrate({2: [0, 1, 2, 3]}, call)
    assert every.source[..., -5:].any() and not edit.source[..., -5:].any()


def test_sinks_stay_those_of_the_prompt_while_generating(monkeypatch):
    model, ids = tiny(), torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(4))
    seen = []
    act = recipe("act", heads="all", beta=0.2)
    original = type(act).calibrate

    def watched(self, heads, call):
        edit = original(self, heads, call)
        if call.site.layer == 2 and edit is not None:
            seen.append((call.clock.phase, edit.source))
        return edit

    monkeypatch.setattr(type(act), "calibrate", watched)
    with reattend.apply(model, act):
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert [phase for phase, _ in seen] == ["prefill"] + ["decode"] * 5
    for step, (_, columns) in enumerate(seen):
        assert torch.equal(columns[..., :20], seen[0][1]) and columns.shape[2] == 20 + step and not columns[..., 20:].any()


def test_parts_of_a_conversation_add_up():
    torch.manual_seed(5)
    query, key = (3 * torch.randn(1, 4, 24, 8) for _ in range(2))
    learned = {}
    for name, cuts in {"whole": [24], "parts": [10, 18, 24]}.items():
        known = None
        for start, stop in zip([0, *cuts], cuts):
            hidden = torch.ones(stop - start, stop, dtype=torch.bool).tril(start).logical_not()
            mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[None, None]
            call = Call(query[:, :, start:stop], key[:, :, :stop], key[:, :, :stop], mask)
            known = learn_sinks(call, [0, 1, 2, 3], known, threshold=0.1)
        learned[name] = known
    whole, parts = learned["whole"].statistics, learned["parts"].statistics
    torch.testing.assert_close(whole.sums, parts.sums, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole.counts, parts.counts) and whole.rows == parts.rows == 24
    assert torch.equal(learned["whole"].sinks, learned["parts"].sinks)


@torch.no_grad()
def test_a_prompt_in_pieces_is_refused():
    """Its first rows would follow the sinks of a part of it. After an answer the next turn goes on."""
    model, ids = tiny(), torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(5))
    heads = [(2, 0), (2, 1), (2, 2), (2, 3)]
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with reattend.apply(model, "act", heads=heads, beta=0.2) as session:
        with pytest.raises(ReattendError, match="prefill_chunk_size=None"):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, prefill_chunk_size=10)
        assert len(ran) == 1, "refused before the second piece runs"
        cache = DynamicCache(config=model.config)
        for start, stop in ((0, 10), (10, 11), (11, 24)):
            logits = model(ids[:, start:stop], **{cache_name(model): cache}).logits
        assert logits.isfinite().all() and session.applied
    handle.remove()


def test_which_heads_and_what_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(UnsupportedError, match="profile_path"):
        reattend.apply(model, "act")
    with pytest.raises(UnsupportedError, match="layer 7"):
        reattend.apply(model, "act", heads=[[7, 0]])
    with pytest.raises(UnsupportedError, match="head 4 of layer 2"):
        reattend.apply(model, "act", heads={2: [4]})
    with pytest.raises(ReattendError, match="no published list 'llama'.*llama-2-7b-chat/classification"):
        reattend.apply(model, "act", heads="llama")
    with reattend.apply(model, "act", heads="all", threshold=0.05) as session:
        model(torch.randint(3, 64, (1, 30)))
        assert {int(name.split(".")[2]) for name in session.stats["act"]} == {2, 3}
    lists = recipe_class("act").published()
    assert {name: len(heads) for name, heads in lists.items()} == {
        "llama-2-7b-chat/classification": 184,
        "llama-2-7b-chat/multiple-choice": 74,
        "mistral-7b-instruct-v0.2/classification": 16,
        "mistral-7b-instruct-v0.2/multiple-choice": 104,
        "llama-2-7b-chat/mt-bench": 25,
    }
    with pytest.raises(ReattendError, match="no profile file"):
        reattend.apply(model, "act", profile_path=str(tmp_path / "none.safetensors"))


def test_profiles_load_and_other_models_are_refused(tmp_path):
    model = tiny()
    profile = Profile("act", fingerprint(model), {"selected": torch.tensor([[2, 1], [3, 0]])})
    path = profile.save(tmp_path / "heads.safetensors")
    ids = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(6))
    with reattend.apply(model, "act", profile_path=str(path), threshold=0.03):
        by_profile = model(ids).logits
    with reattend.apply(model, "act", heads=[(2, 1), (3, 0)], threshold=0.03) as session:
        assert torch.equal(model(ids).logits, by_profile) and session.applied == 2
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(tiny(layers=6), "act", profile_path=str(path))
    with pytest.raises(UnsupportedError, match="one of them"):
        reattend.apply(model, "act", profile_path=str(path), heads="all")


def test_the_profile_kept_for_the_model_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    model, ids = tiny(), torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(6))
    with pytest.raises(ReattendError, match="no profile of 'act' is kept"):
        reattend.apply(model, "act", profile_path="cached")
    place = cached_path("act", reattend.sites(model))
    Profile("act", fingerprint(model), {"selected": torch.tensor([[2, 1]])}).save(place)
    logits = []
    for options in ({}, {"profile_path": "cached"}, {"heads": [(2, 1)]}):
        with reattend.apply(model, "act", threshold=0.03, **options) as session:
            logits.append(model(ids).logits)
            assert session.applied == 1
    assert all(torch.equal(x, logits[0]) for x in logits) and not torch.equal(logits[0], model(ids).logits)
    Profile("act", fingerprint(model), {"selected": torch.zeros(0, 2, dtype=torch.long)}).save(place)
    with pytest.raises(UnsupportedError, match="the profile is empty"):
        reattend.apply(model, "act")


# -- profiling ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + ord(c) % 60 for c in text]}

    def decode(self, ids):
        return "".join(chr(60 + (i - 3)) if i - 3 < 60 and 60 + i - 3 < 120 else chr(i - 3) for i in ids)


DATA = [(f"{'ab' * (5 + i)} {c}:", label) for i in range(4) for c, label in (("x", "p"), ("y", "q"))]


def test_the_search_tries_heads_with_sinks_and_keeps_the_better_ones(tmp_path):
    from reattend.recipes.profiling.act import accuracy

    model = tiny()
    before = model(torch.tensor([[5, 6, 7]])).logits
    profile = recipe_class("act").profile(model, Letters(), data=DATA, batch_size=3, beta=0.1, task="letters")
    facts, score, count = profile.facts, profile.tensors["score"], profile.tensors["count"]
    assert score.shape == count.shape == (5, 4) and facts["task"] == "letters" and facts["samples"] == 8
    assert facts["beta"] == 0.1
    assert facts["baseline"] == pytest.approx(accuracy(model, Letters(), DATA)) == pytest.approx(score[0, 0].item())
    assert not count[[0, 1, 4]].any() and facts["tried"] == int((count == 8).sum()) > 0
    assert torch.equal(count[2:4] > 0, profile.tensors["sinks"][2:4] > 0)
    better = (score > facts["baseline"] + facts["standard_error"]).nonzero()
    assert torch.equal(better, profile.tensors["selected"])
    # what it says about a head is what the recipe does with that head
    layer, head = (int(i) for i in (count > 0).nonzero()[-1])
    with reattend.apply(model, "act", heads=[(layer, head)], beta=0.1):
        assert accuracy(model, Letters(), DATA, batch_size=3) == pytest.approx(score[layer, head].item())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    again = Profile.load(profile.save(tmp_path / "act.safetensors"))
    assert torch.equal(again.tensors["score"], score) and again.facts == facts


def test_the_search_can_be_limited_and_reads_files(tmp_path):
    model = tiny()
    file = tmp_path / "data.json"
    file.write_text(json.dumps(DATA))
    options = dict(data=str(file), heads={2: [0, 1], 3: [2]}, max_heads=2, max_samples=4)
    profile = recipe_class("act").profile(model, Letters(), **options)
    assert profile.facts["samples"] == 4 and profile.facts["tried"] <= 2
    tried = {tuple(head) for head in (profile.tensors["count"] > 0).nonzero().tolist()}
    assert tried <= {(2, 0), (2, 1), (3, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "at least one"),
        ({"data": "nowhere.json"}, "no (data|samples) file"),
        ({"data": [("a", "b", ["c", "d"])]}, "must be one of"),
        ({"data": [("a", "b")]}, "at least two choices"),
        ({"data": [("a", "bc"), ("a", "bd")]}, "different tokens"),
        ({"heads": [(9, 0)]}, "layer 9"),
        ({"heads": []}, "empty"),
        ({"heads": "most"}, "heads"),
        ({"beta": 3.0}, "beta"),
        ({"kind": "essay"}, "kind must be"),
        ({"judge": min}, "go with kind"),
        ({"kind": "multiple_choice"}, "at least two different options"),
        ({"kind": "multiple_choice", "data": [("a", "b", ["b", "b"])]}, "at least two different options"),
        ({"kind": "multiple_choice", "data": [("", "b", ["b", "c"])]}, "not empty"),
        ({"kind": "generation", "data": [("a", 3)]}, "as texts"),
        ({"kind": "generation", "data": []}, "at least one"),
        ({"kind": "generation", "judge": lambda reference, answer: 2.0}, "judge must return"),
    ],
)
def test_what_the_search_refuses(options, message):
    with pytest.raises(ReattendError, match=message):
        recipe_class("act").profile(tiny(), Letters(), **{"data": DATA, **options})


def test_the_built_in_examples_come_in_two_halves_with_the_same_labels():
    from collections import Counter

    from reattend.recipes.profiling.material.labelled_examples import labelled_examples

    examples = labelled_examples()
    assert len(examples) == 62 and len({e[0] for e in examples}) == 62
    assert Counter(e[1] for e in examples[::2]) == Counter(e[1] for e in examples[1::2])


# -- kinds of labelled tasks --------------------------------------------------------------------------------------------

CHOICES = [
    ("abab x:", "pq", ["pq", "pr", "s"]),
    ("ab y:", "r", ["q", "r"]),
    ("abababab z:", "tuv", ["wxy", "tuv", "tu", "t"]),
    ("cd x:", "s", ["pq", "pr", "s"]),
]


@torch.no_grad()
def test_options_are_scored_by_all_their_tokens_whatever_the_batch():
    model, letters = tiny(), Letters()
    wanted = [float(max(options, key=lambda o: _logprob(model, p, o)) == answer) for p, answer, options in CHOICES]
    for size in (1, 3, 16):
        assert labelled_task("multiple_choice", letters, CHOICES, size).scores(model) == wanted
    # the options that it finds likeliest are all right, and any others are not
    given = [(p, max(o, key=lambda x: _logprob(model, p, x)), o) for p, _, o in CHOICES]
    assert labelled_task("multiple_choice", letters, given).scores(model) == [1.0] * 4
    others = [(p, next(x for x in o if x != a), o) for p, a, o in given]
    assert labelled_task("multiple_choice", letters, others).scores(model) == [0.0] * 4


def _logprob(model, prompt, option):
    start, rest = (Letters()(t)["input_ids"] for t in (prompt, option))
    logits = model(torch.tensor([start + rest])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return float(logits[range(len(rest)), rest].sum())


def test_written_answers_are_judged():
    model, letters = tiny(), Letters()
    prompts = ["abab x:", "ab y:", "abababab z:"]
    made = []
    for prompt in prompts:
        ids = torch.tensor([letters(prompt)["input_ids"]])
        made.append(letters.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()))
    data = [(p, m) for p, m in zip(prompts, made)]
    seen = {}

    def judge(reference, answer):
        seen[reference] = answer
        return float(reference[0] == answer[0])

    for size in (1, 3):
        task = labelled_task("generation", letters, data, size, judge=judge, max_new_tokens=6)
        assert task.scores(model) == [1.0] * 3
        assert all(answer == reference for reference, answer in seen.items())
    assert labelled_task("generation", letters, [(p, "@!") for p in prompts], judge=judge).scores(model) == [0.0] * 3


@pytest.mark.parametrize("kind", ["multiple_choice", "generation"])
def test_the_search_measures_every_kind(kind):
    from reattend.recipes.profiling.act import accuracy

    model = tiny()
    data, options = (CHOICES, {}) if kind == "multiple_choice" else ([(p, a) for p, a, _ in CHOICES], {})
    if kind == "generation":
        # a graded score, so that heads differ
        options = {"judge": lambda reference, answer: sum(ord(c) for c in answer) % 101 / 100, "max_new_tokens": 4}
    search = dict(data=data, kind=kind, heads={2: [0, 1, 2, 3]}, beta=0.0, threshold=0.05, batch_size=3)
    profile = recipe_class("act").profile(model, Letters(), **search, **options)
    facts, score, count = profile.facts, profile.tensors["score"], profile.tensors["count"]
    assert facts["kind"] == kind and facts["samples"] == 4 and facts["tried"] > 0
    assert facts["baseline"] == pytest.approx(accuracy(model, Letters(), data, kind=kind, **options))
    assert bool((profile.tensors["sinks"] <= 1).all()) and profile.tensors["sinks"].max() > 0
    better = (score > facts["baseline"] + facts["standard_error"]).nonzero()
    assert torch.equal(better, profile.tensors["selected"])
    layer, head = (int(i) for i in (count > 0).nonzero()[-1])
    with reattend.apply(model, "act", heads=[(layer, head)], beta=0.0, threshold=0.05) as session:
        assert accuracy(model, Letters(), data, 3, kind, **options) == pytest.approx(score[layer, head].item())
        assert session.applied > 0


def test_built_in_questions_have_one_right_option_of_four():
    choices, open_ = built_in("multiple_choice"), built_in("generation")
    assert len(choices) == len(open_) == 60 and len({c[0] for c in choices}) == 60
    for (prompt, right, options), (asked, reference) in zip(choices, open_):
        assert prompt == asked and right == reference and right in options and len(set(options)) == 4
    assert built_in("classification")[0][0].startswith("Remark")


def test_a_search_that_finds_no_head_says_so_when_its_profile_is_used(tmp_path):
    model = tiny()
    # so weak a calibration makes no head better than the untouched model by more than a standard error
    profile = recipe_class("act").profile(model, Letters(), data=DATA, batch_size=3, beta=0.9999)
    assert profile.tensors["selected"].shape == (0, 2) and not profile.tensors["selected"].is_floating_point()
    profile.save(tmp_path / "none.safetensors")
    with pytest.raises(UnsupportedError, match="no head is left to calibrate .the profile is empty"):
        reattend.apply(model, "act", profile_path=str(tmp_path / "none.safetensors"))
