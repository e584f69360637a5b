"""Soft injection: the official code's numbers, rows and caches on whole models, and alphas learned through a frozen model."""

from __future__ import annotations

import functools
import json

import pytest
import reattend
import torch
import transformers
from golden_files import golden_file
from reattend.hooks import Capture, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import (
    Call,
    Clock,
    HeadMix,
    ReattendError,
    Site,
    TokenMap,
    UnsupportedError,
    fused,
    reference_with_weights,
)
from reattend.interventions.families.heads import last_prompt_outputs
from reattend.recipes import Profile, recipe, recipe_class
from reattend.recipes.kit.profile import fingerprint
from reattend.recipes.profiling.material.word_pairs import TABLES, parted, word_pairs
from reattend.recipes.profiling.soft_injection import answer_text, task_prompt
from tiny_language import language_model, tokenizer

PAIRS = [(c, c.upper()) for c in "abcdefghijklmnopqrst"]


golden = functools.partial(golden_file, "soft-injection")


def call_with_outputs(outputs: torch.Tensor, lengths: list[int], layer: int, phase="prefill") -> Call:
    """A call whose head outputs [B, T, H, D] are given: every row sees itself alone."""
    value = outputs.transpose(1, 2).contiguous()
    batch, _, width, _ = value.shape
    padding = torch.arange(width)[None] >= torch.tensor(lengths)[:, None]
    prompt = width if phase == "prefill" else 0
    tokens = TokenMap(batch, prompt, width, {"padding": padding})
    site = Site(f"layer.{layer}", layer, "decoder", "self", value.shape[1], value.shape[1], value.shape[3], True)
    eye = torch.eye(width, dtype=torch.bool)[None, None]
    return Call(torch.zeros_like(value), torch.zeros_like(value), value, eye, site=site, clock=Clock(phase), tokens=tokens)


def profile_of(model, tmp_path, tasks=("t",), seed=0, alpha=None) -> str:
    """A profile of random embeddings."""
    torch.manual_seed(seed)
    shape = fingerprint(model)
    layers, heads = shape["layers"], shape["heads"]
    embedding = torch.randn(len(tasks), layers, heads, 8)
    alpha = torch.rand(layers, heads) if alpha is None else alpha
    made = Profile("soft-injection", shape, {"task_embedding": embedding, "alpha": alpha}, {"tasks": list(tasks)})
    return str(made.save(tmp_path / f"{'-'.join(tasks)}-{seed}.safetensors"))


def last_inputs(model, inputs) -> dict[int, torch.Tensor]:
    """What enters each layer's output projection [B, T, H*D]."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].detach()))
        for i, layer in enumerate(model.model.layers)
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


# -- the official numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", [fused, lambda call, edits: reference_with_weights(call, edits)[0]])
@pytest.mark.parametrize("name", ["inject", "inject_batch"])
def test_official_numbers(name, executor):
    data, facts = golden(name)
    heads, dim, lengths = int(facts["num_heads"]), int(facts["head_dim"]), json.loads(facts["lengths"])
    chosen = recipe("soft-injection")
    known = data["task_embedding"], data["alpha"]
    for layer in range(int(facts["layers"])):
        outputs = data["head_out"][layer].unflatten(-1, (heads, dim))
        call = call_with_outputs(outputs, lengths, layer)
        for edits, wanted in (([], "module_out_plain"), ([chosen.inject(lambda device: known, call)], "module_out")):
            found = executor(call, edits).transpose(1, 2).flatten(2) @ data["wo"][layer].T
            torch.testing.assert_close(found, data[wanted][layer], atol=1e-5, rtol=0)
    assert (data["module_out"] - data["module_out_plain"]).abs().max() > 0.1
    if "module_out_single_token_call" in data:
        single = call_with_outputs(data["head_out"][0, :, :1].unflatten(-1, (heads, dim)), [1], 0, "decode")
        assert chosen.inject(lambda device: known, single) is None


# -- which rows -----------------------------------------------------------------------------------------------------------


def batch(side: str):
    """(inputs, index of each row's last real token) of prompts of three lengths."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, 400, (n,), generator=generator) for n in (9, 5, 7)]
    pads = [(9 - len(r), 0) if side == "left" else (0, 9 - len(r)) for r in rows]
    ids = torch.stack([torch.nn.functional.pad(r, p) for r, p in zip(rows, pads)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads)])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return inputs, [8] * 3 if side == "left" else [8, 4, 6], rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_last_prompt_row_is_mixed_and_padding_changes_nothing(side, tmp_path):
    model = language_model(num_key_value_heads=2)
    path = profile_of(model, tmp_path)
    inputs, last, rows = batch(side)
    plain = last_inputs(model, inputs)
    logits = model(**inputs).logits
    with reattend.apply(model, "soft-injection", profile_path=path) as session:
        mixed = last_inputs(model, inputs)
        found = model(**inputs).logits
        assert session.applied == 2 * 4
        alone = [model(r[None]).logits[0, -1] for r in rows]
    learned = Profile.load(path).tensors
    target, alpha = learned["task_embedding"][0, 0], learned["alpha"][0]
    for row, place in enumerate(last):
        own = plain[0][row, place].unflatten(0, (4, 8))
        wanted = (1 - alpha)[:, None] * own + alpha[:, None] * target
        torch.testing.assert_close(mixed[0][row, place], wanted.flatten(), atol=1e-6, rtol=1e-5)
        real = inputs["attention_mask"][row].bool().clone()
        real[place] = False
        # earlier tokens keep their states in all layers
        for layer in range(4):
            assert torch.equal(mixed[layer][row, real], plain[layer][row, real])
        assert (found[row, place] - logits[row, place]).abs().max() > 1e-3
        torch.testing.assert_close(found[row, place], alone[row], atol=2e-5, rtol=1e-4)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_share_of_one_gives_the_embedding_and_a_share_is_an_interpolation(tmp_path):
    model = language_model()
    path, ids = profile_of(model, tmp_path), torch.randint(5, 400, (1, 6))
    target = Profile.load(path).tensors["task_embedding"][0]
    entering = {}
    for alpha in (0.25, 1.0):
        with reattend.apply(model, "soft-injection", profile_path=path, alpha=alpha, heads={2: range(4)}) as session:
            entering[alpha] = last_inputs(model, {"input_ids": ids})[2][0, -1]
            assert set(session.stats["soft-injection"].values()) == {1} and session.applied == 1
    assert torch.equal(entering[1.0], target[2].flatten())
    plain = last_inputs(model, {"input_ids": ids})[2][0, -1]
    torch.testing.assert_close(entering[0.25], 0.75 * plain + 0.25 * target[2].flatten(), atol=1e-6, rtol=1e-5)


def test_nothing_to_mix_is_the_identity(tmp_path):
    model, ids = language_model(), torch.randint(5, 400, (2, 6))
    path, plain = profile_of(model, tmp_path), model(ids).logits
    for options in ({"scale": 0.0}, {"alpha": 0.0}):
        with reattend.apply(model, "soft-injection", profile_path=path, **options) as session:
            assert torch.equal(model(ids).logits, plain) and session.applied == 0


def test_turns_have_a_last_token_each_and_a_prompt_in_pieces_is_refused(tmp_path):
    model, ids = language_model(), torch.randint(5, 400, (1, 12), generator=torch.Generator().manual_seed(4))
    path = profile_of(model, tmp_path)
    with reattend.apply(model, "soft-injection", profile_path=path) as session:
        cache = cache_of(model(ids[:, :5], use_cache=True))
        model(ids[:, 5:6], **{cache_name(model): cache})  # an answer of one token
        second = model(ids[:, 6:], **{cache_name(model): cache})
        assert set(session.stats["soft-injection"].values()) == {2}
        assert second.logits.isfinite().all()
        pieces = cache_of(model(ids[:, :5], use_cache=True))
        with pytest.raises(ReattendError, match="comes in pieces"):
            model(ids[:, 5:], **{cache_name(model): pieces})
        with pytest.raises(ReattendError, match="comes in pieces"):
            model.generate(ids, max_new_tokens=2, prefill_chunk_size=6)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Mistral"])
def test_other_families_and_eager_attention(kind, tmp_path):
    model = language_model(kind)
    model.set_attn_implementation("eager")
    path, ids = profile_of(model, tmp_path), torch.randint(5, 400, (1, 6))
    plain = last_inputs(model, {"input_ids": ids})
    with reattend.apply(model, "soft-injection", profile_path=path) as session:
        mixed = last_inputs(model, {"input_ids": ids})
        assert session.applied == 4
    for layer in range(4):
        assert torch.equal(mixed[layer][0, :-1], plain[layer][0, :-1])
        assert (mixed[layer][0, -1] - plain[layer][0, -1]).abs().max() > 1e-2


def test_top_k_and_heads_name_what_is_mixed(tmp_path):
    model = language_model()
    alpha = torch.arange(16).view(4, 4) / 20
    table = sites(model)
    path = profile_of(model, tmp_path, alpha=alpha)

    def used(**options):
        return recipe("soft-injection", profile_path=path, **options).learned(table)[1]

    assert torch.equal(used(), alpha)
    assert used(top_k=3).nonzero().tolist() == [[3, 1], [3, 2], [3, 3]]
    torch.testing.assert_close(used(top_k=3, scale=0.5)[3, 1:], alpha[3, 1:] / 2)
    assert used(heads=[[1, 2], [0, 1]]).nonzero().tolist() == [[0, 1], [1, 2]]
    assert used(heads=[[1, 2], [0, 1]], top_k=1, alpha=1.0).nonzero().tolist() == [[1, 2]]
    with reattend.apply(model, "soft-injection", profile_path=path, heads=[[1, 2]]) as session:
        model(torch.randint(5, 400, (1, 6)))
        assert [name.split(".")[2] for name in session.stats["soft-injection"]] == ["1"]


def test_several_tasks_and_what_is_refused(tmp_path):
    model, ids = language_model(), torch.randint(5, 400, (1, 6))
    both = profile_of(model, tmp_path, tasks=("one", "two"))
    logits = {}
    for task in ("one", "two"):
        with reattend.apply(model, "soft-injection", profile_path=both, task=task):
            logits[task] = model(ids).logits
    assert not torch.equal(logits["one"], logits["two"])
    for options, message in (
        ({}, "several tasks.*one, two"),
        ({"task": "three"}, "no task 'three'"),
        ({"task": "one", "heads": [[9, 0]]}, "layer 9"),
        ({"task": "one", "heads": []}, "at least one head"),
        ({"scale": 1.5}, "scale"),
        ({"top_k": 0}, "top_k"),
    ):
        with pytest.raises(ReattendError, match=message):
            reattend.apply(model, "soft-injection", profile_path=both, **options)
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(language_model(num_hidden_layers=2), "soft-injection", profile_path=both, task="one")
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder"):
        reattend.apply(transformers.T5ForConditionalGeneration(config), "soft-injection", profile_path=both)


# -- profiling ------------------------------------------------------------------------------------------------------------


def test_prompts_have_the_official_form():
    assert task_prompt("hot") == "Q: hot\nA:"
    assert task_prompt("hot", [("big", "small"), ("two", "2")]) == "Q: big\nA: small\n\nQ: two\nA:2\n\nQ: hot\nA:"
    assert [answer_text(y) for y in ("-3", "2.5", "3a", ".")] == ["-3", "2.5", " 3a", " ."]
    assert recipe_class("soft-injection").prompt("x", template="{x} ->") == "x ->"
    for task in TABLES:
        pairs = word_pairs(task)
        one, two = parted(task)
        assert sorted(one + two) == sorted(pairs) and len(dict(pairs)) == len(pairs) and len(one) > len(two) > 10


def test_embeddings_are_the_mean_over_prompts_whatever_their_batches():
    import random

    model, text = language_model(), tokenizer()
    made = recipe_class("soft-injection").profile(model, text, data=PAIRS, prompts=11, shots=3, how="even", seed=5)
    assert made.tensors["task_embedding"].shape == (1, 4, 4, 8) and torch.equal(made.tensors["alpha"], torch.full((4, 4), 0.5))
    assert made.facts["tasks"] == ["user data"] and made.facts["pairs"] == {"user data": 20}
    # the same prompts, one by one
    rng = random.Random(5)
    train = rng.sample(PAIRS, 20)[5:]
    sums = torch.zeros(4, 4, 8)

    def read(call, edits):
        sums[call.site.layer] += last_prompt_outputs(call)[0]

    with attach(model, [Plan("reader", [Capture(sites(model).stack("decoder"), read)])]), torch.no_grad():
        for _ in range(11):
            *shown, (asked, _) = rng.sample(train, 4)
            model(**text(task_prompt(asked, shown), return_tensors="pt"))
    torch.testing.assert_close(made.tensors["task_embedding"][0], sums / 11, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["gradient", "single"])
def test_learned_shares_lower_the_loss_and_leave_the_model_alone(how, tmp_path):
    model, text = language_model(), tokenizer()
    ids = torch.randint(5, 400, (1, 6))
    before, weights = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    data = [(c, "ab"[i % 2]) for i, c in enumerate("abcdefghijklmnopqrstuvwx")]
    options = dict(data={"letters": data}, prompts=6, shots=3, how=how, iterations=24, check_every=8, batch_size=4)
    made = recipe_class("soft-injection").profile(model, text, **options)
    alpha, facts = made.tensors["alpha"], made.facts
    assert facts["loss"] < facts["plain_loss"] - 1e-3
    assert bool(((alpha >= 0) & (alpha <= 1)).all()) and facts["tasks"] == ["letters"]
    if how == "gradient":
        assert list(facts["losses"]) == ["8", "16", "24"] and facts["loss"] == pytest.approx(min(facts["losses"].values()))
        assert (alpha - 0.5).abs().max() > 0.2
        last = recipe_class("soft-injection").profile(model, text, **options, official_last=True)
        assert last.facts["loss"] == pytest.approx(facts["losses"]["24"], abs=1e-5)
    else:
        assert set(alpha.unique().tolist()) == {0.0, 1.0}
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(model(ids).logits, before)
    # what was measured while learning is what the recipe does
    path = str(made.save(tmp_path / "p.safetensors"))
    with reattend.apply(model, "soft-injection", profile_path=path) as session:
        model(ids)
        assert session.applied == int(alpha.any(dim=1).sum())
    again = recipe_class("soft-injection").profile(model, text, **options)
    torch.testing.assert_close(again.tensors["alpha"], alpha)


def test_the_edit_lets_gradients_of_its_share_pass():
    model = language_model()
    share = torch.full((4,), 0.3, requires_grad=True)

    def mix(call):
        rows = torch.zeros(call.num_queries, dtype=torch.bool)
        rows[-1] = True
        return HeadMix(target=torch.ones(4, 8), strength=share, rows=rows)

    from reattend.hooks import Edits

    ids = torch.randint(5, 400, (1, 6))
    with attach(model, [Plan("mix", [Edits(sites(model).stack("decoder").layers(1, 1), mix)])]):
        (slope,) = torch.autograd.grad(model(ids).logits[0, -1, 7], [share])
        step = 1e-2
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                share[2] += sign * step
                values.append(float(model(ids).logits[0, -1, 7]))
                share[2] -= sign * step
    assert float(slope[2]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-4)


def test_several_tasks_share_one_alpha_and_files_are_read(tmp_path):
    file = tmp_path / "tasks.json"
    items = [{"input": x, "output": y} for x, y in PAIRS]
    file.write_text(json.dumps({"upper": items, "same": [[x, x] for x, _ in PAIRS]}))
    made = recipe_class("soft-injection").profile(
        language_model(), tokenizer(), data=str(file), prompts=3, shots=2, iterations=4, check_every=2
    )
    assert made.facts["tasks"] == ["upper", "same"] and made.tensors["task_embedding"].shape == (2, 4, 4, 8)
    assert made.tensors["alpha"].shape == (4, 4) and not torch.equal(*made.tensors["task_embedding"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(task="rhymes"), "task must be one of opposite"),
        (dict(data=PAIRS[:5]), "has 5 pairs"),
        (dict(data=["ab"]), "pairs of texts"),
        (dict(data=[("a", 1)]), "pairs of texts"),
        (dict(data="nowhere.json"), "no (data|samples) file"),
        (dict(data=PAIRS, how="best"), "how must be"),
        (dict(data=PAIRS, shots=0), "shots"),
        (dict(data=PAIRS, lr=0), "lr above 0"),
        (dict(data=PAIRS, template="Q:"), "template"),
    ],
)
def test_bad_options_are_named(options, problem):
    with pytest.raises(ReattendError, match=problem):
        recipe_class("soft-injection").profile(language_model(), tokenizer(), **options)
