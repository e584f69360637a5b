"""seka: whole models against hooks written by hand, the method's invariants, its profile and cache, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import reattend
import torch
import transformers
from reattend.hooks import Plan, Projected, Projection, attach, sites
from reattend.hooks.trackers.caches import cache_in
from reattend.interventions import ReattendError, UnsupportedError
from reattend.interventions.families.subspaces import Subspaces, expert_weights, group_query, mixed_projection
from reattend.recipes import Profile, cached_profile, recipe, recipe_class
from reattend.recipes.kit.profile import cached_path
from reattend.recipes.profiling.material.question_pairs import FORMS, KINDS, conflicts, triplets
from reattend.recipes.profiling.seka import read_triplet
from tiny_language import language_model, tokenizer

PROMPTS = [
    "The capital of France is Paris. Answer in French. What is the capital?",
    "Anna has a red house. Answer in one word.",
]
PASSAGES = [["Answer in French."], ["red house", "one word"]]
KINDS_OF_MODELS = {
    "Llama": {},
    "Qwen3": {},
    "Olmo2": {},
    "Gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """{kind of model: (model, path of its profile)}, learned from eight triplets."""
    folder, made = tmp_path_factory.mktemp("seka"), {}

    def of(kind="Llama"):
        if kind not in made:
            model = language_model(kind, **KINDS_OF_MODELS[kind])
            profile = recipe_class("seka").profile(model, tokenizer(), pairs=4, min_rise=0.0)
            made[kind] = model, str(profile.save(folder / f"{kind}.safetensors"))
        return made[kind]

    return of


def batch(prompts=PROMPTS, passages=PASSAGES):
    """Inputs with left padding, and the marked tokens found by hand from the offsets of the padded encoding."""
    x = tokenizer()(prompts, return_tensors="pt", padding=True, return_offsets_mapping=True)
    offsets = x.pop("offset_mapping")
    marked = torch.zeros_like(x["attention_mask"], dtype=torch.bool)
    for row, texts in enumerate(passages):
        for text in texts:
            c0 = prompts[row].index(text)
            marked[row] |= (offsets[row, :, 0] < c0 + len(text)) & (offsets[row, :, 1] > c0)
    return x, marked


def key_module(layer):
    return getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)


def heads_first(model, key, width):
    """[B, Hkv, T, D] of what a key module returns, and the way back; width: tokens of the pass."""
    if key.dim() == 3:
        return key.unflatten(2, (-1, 8)).transpose(1, 2), lambda k: k.transpose(1, 2).flatten(2)
    if model.config.model_type == "gemma3_text":
        return key, lambda k: k
    return key.transpose(1, 2), lambda k: k.transpose(1, 2)


@contextlib.contextmanager
def edited_keys(model, marked, changes):
    """k += change k on the marked positions of a layer, by hooks on its key module. changes: {layer: [Hkv, D, D]}."""
    start, width = [0], [0]

    def begin(module, args, kwargs):
        cache, ids = cache_in(kwargs), kwargs["input_ids"]
        start[0], width[0] = (cache.get_seq_length() if cache is not None else 0), ids.shape[1]

    def hook(layer):
        def edit(module, args, output):
            key, back = heads_first(model, output, width[0])
            rows = torch.zeros(key.shape[0], start[0] + width[0], dtype=torch.bool)
            repeated = marked.repeat_interleave(key.shape[0] // marked.shape[0], dim=0)[:, : rows.shape[1]]
            rows[:, : repeated.shape[1]] = repeated
            rows = rows[:, start[0] :]
            new = key + torch.einsum("hij,bhtj->bhti", changes[layer], key) * rows[:, None, :, None]
            return back(new)

        return edit

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [key_module(model.model.layers[layer]).register_forward_hook(hook(layer)) for layer in changes]
    yield
    for handle in handles:
        handle.remove()


def changes_of(path, layers, gain=0.8, negative=0.2, share=0.9):
    held = Profile.load(path).tensors
    result = {}
    for layer in layers:
        change = gain * Subspaces(held[f"{layer}.relevant.vectors"], held[f"{layer}.relevant.values"]).onto(share)
        if negative is not None:
            other = Subspaces(held[f"{layer}.irrelevant.vectors"], held[f"{layer}.irrelevant.values"])
            change = (change + negative * (torch.eye(8) - other.onto(share))) / 2
        result[layer] = change
    return result


def generate(model, x, **way):
    out = model.generate(**x, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **way)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(("kind", "chunk"), [("Llama", 24), *[(kind, None) for kind in KINDS_OF_MODELS]])
def test_generation_equals_hooks_on_the_keys(kind, chunk, learned):
    """Left padding, other passages in each row, GQA; norms on heads of either layout and on all heads at once."""
    model, path = learned(kind)
    x, marked = batch()
    gains, way = dict(gain=2.0, negative_gain=1.0), {"prefill_chunk_size": chunk}
    plain = generate(model, x, **way)
    layers = [1, 3]
    with reattend.apply(
        model, "seka", text=PASSAGES, layers=layers, profile_path=path, tokenizer=tokenizer(), **gains
    ) as session:
        found = generate(model, x, **way)
    with edited_keys(model, marked, changes_of(path, layers, 2.0, 1.0)):
        wanted = generate(model, x, **way)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=2e-5, rtol=1e-4)
    assert (plain[1][0] - found[1][0]).abs().amax(dim=1).min() > 1e-3, "every row must be steered"
    # once for the prompt, or for each of its chunks that holds a passage
    width = x["input_ids"].shape[1]
    chunks = sum(bool(marked[:, i : i + 24].any()) for i in range(0, width, 24))
    times = chunks if chunk else 1
    assert session.stats["seka"] == {f"model.layers.{i}.self_attn": times for i in layers}
    assert all(torch.equal(a, b) for a, b in zip(generate(model, x, **way), plain))


def read_keys(model, x, query=False):
    """{layer: (key, query)} as they go into RoPE."""
    seen = {}

    def reader(p: Projected):
        if p.which == "key":
            seen[p.site.layer] = (p.key.clone(), p.query.clone() if query else None)

    of = ("query", "key") if query else ("key",)
    with attach(model, [Plan("reader", [Projection(sites(model), reader=reader, of=of)])]):
        model(**x)
    return seen


def test_only_marked_keys_of_the_chosen_layer_change_and_in_proportion(learned):
    model, path = learned("Qwen3")
    x, marked = batch()
    before = read_keys(model, x)
    parts = {}
    for gain in (0.5, 1.0):
        options = dict(text=PASSAGES, layers=[1], profile_path=path, negative_gain=None, tokenizer=tokenizer())
        with reattend.apply(model, "seka", gain=gain, **options) as session:
            after = read_keys(model, x)
        assert session.applied == 1
        assert torch.equal(after[0][0], before[0][0])
        change = (after[1][0] - before[1][0]).transpose(1, 2)
        assert not change[~marked].any()
        parts[gain] = change[marked]
    assert parts[1.0].abs().max() > 0.1
    torch.testing.assert_close(parts[1.0], 2 * parts[0.5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3"])
def test_as_many_tokens_as_key_heads(kind, learned):
    """[B, 2 tokens, 2 heads, D] can be read in two ways: the second token alone must change."""
    model, path = learned(kind)
    x = {"input_ids": torch.tensor([[11, 12]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    before = read_keys(model, x)[1][0]
    with reattend.apply(model, "seka", ranges=[(1, 2)], layers=[1], profile_path=path):
        after = read_keys(model, x)[1][0]
    assert torch.equal(after[:, :, 0], before[:, :, 0])
    assert (after[:, :, 1] - before[:, :, 1]).abs().amax(dim=-1).min() > 1e-3
    change = changes_of(path, [1])[1]
    torch.testing.assert_close(after[0, :, 1], before[0, :, 1] + (change @ before[0, :, 1, :, None])[..., 0])


def test_a_negative_file_without_gain_halves_the_positive_one(learned):
    model, path = learned()
    x, _ = batch()
    logits = {}
    for name, gains in {"halved": dict(gain=1.0, negative_gain=0), "half": dict(gain=0.5, negative_gain=None)}.items():
        with reattend.apply(model, "seka", text=PASSAGES, profile_path=path, tokenizer=tokenizer(), **gains):
            logits[name] = model(**x).logits
    torch.testing.assert_close(logits["halved"], logits["half"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", ["weighted_top_k", "all_weighted", "top_k_uniform"])
def test_the_adaptive_mixture_follows_the_last_query(rule, learned):
    model, path = learned("Qwen3")
    x, marked = batch()
    before = read_keys(model, x, query=True)
    layer, held = 1, Profile.load(path).tensors
    options = dict(text=PASSAGES, layers=[layer], profile_path=path, adaptive=True, rule=rule, top_k=2, gain=1.5)
    with reattend.apply(model, "seka", **options, tokenizer=tokenizer()) as session:
        after = read_keys(model, x)
    assert session.applied == 1
    key, query = before[layer]
    last = group_query(query[:, :, -1], 2)  # padding is on the left
    torch.testing.assert_close(last.norm(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(last[0, 0], torch.nn.functional.normalize(query[0, :2, -1].mean(dim=0), dim=0))
    experts = Subspaces(held[f"{layer}.experts.vectors"], held[f"{layer}.experts.values"])
    top, weights = (8 if rule == "all_weighted" else 2), []
    for row in range(2):
        weights.append(expert_weights(last[row], experts, top, rule))
        mixed = mixed_projection(weights[-1], experts, top)
        wanted = key[row] + 1.5 * torch.einsum("hij,htj->hti", mixed, key[row]) * marked[row][None, :, None]
        torch.testing.assert_close(after[layer][0][row], wanted, atol=1e-4, rtol=1e-4)
    assert (weights[0] - weights[1]).abs().max() > 0.05


@pytest.mark.parametrize("feature", ["tanh", "elu"])
def test_features_stay_finite_and_spare_unmarked_tokens(feature, learned, tmp_path):
    model, _ = learned()
    profile = recipe_class("seka").profile(model, tokenizer(), pairs=2, feature=feature, experts=False)
    path = str(profile.save(tmp_path / "f.safetensors"))
    x, marked = batch()
    before = read_keys(model, x)
    with reattend.apply(
        model, "seka", text=PASSAGES, profile_path=path, feature=feature, gain=8, layers=[0], tokenizer=tokenizer()
    ):
        after = read_keys(model, x)
    assert torch.isfinite(after[0][0]).all() and not torch.equal(after[0][0], before[0][0])
    change = (after[0][0] - before[0][0]).transpose(1, 2)
    assert not change[~marked].any() and change[marked].any()
    with pytest.raises(UnsupportedError, match="feature"):
        reattend.apply(model, "seka", text="a", profile_path=path)


# -- profile and cache -----------------------------------------------------------------------------------------------


def test_triplets_are_made_up_alike_every_time_and_answer_their_question_alone():
    made = triplets(12, seed=3)
    assert made == triplets(12, seed=3) != triplets(12, seed=4) and made[:4] == triplets(2, seed=3)
    assert len(made) == 24 and {t.kind for t in made} == set(KINDS) and len(KINDS) == 4
    for one, two in zip(made[::2], made[1::2]):
        assert (one.question, one.other) == (two.other, two.question) and one.kind != two.kind
    for t in made:
        assert t.context.count(t.answer) == 1 and t.answer not in t.question + t.other
        sample = read_triplet(tokenizer(), t)
        assert sample is not None
        texts = [tokenizer().decode([ids[i] for i in spots]) for ids, spots in zip(sample.ids, sample.places)]
        assert texts[0] == texts[1] == texts[2] and t.answer in texts[0]
    pairs = conflicts(len(FORMS), seed=1)
    assert all(c.words[0] in c.facts[0] and c.words[1] in c.facts[1] and c.words[0] != c.words[1] for c in pairs)


def test_the_profile_is_the_same_whatever_the_batches_and_leaves_the_model_alone(learned):
    model, _ = learned()
    x, _ = batch()
    plain, options = model(**x).logits, dict(pairs=3, min_rise=0.0)
    one, two = (recipe_class("seka").profile(model, tokenizer(), batch_size=n, **options) for n in (1, 5))
    assert one.facts == two.facts and one.facts["triplets"] == 6 and one.facts["left_out"] == 0
    assert set(one.tensors) == set(two.tensors) and len(one.tensors) == 4 * 10
    for name, tensor in one.tensors.items():
        if "vectors" not in name:
            torch.testing.assert_close(two.tensors[name], tensor, atol=1e-4, rtol=1e-3, equal_nan=True)
    for layer in range(4):
        vectors = one.tensors[f"{layer}.relevant.vectors"]
        torch.testing.assert_close(vectors.transpose(1, 2) @ vectors, torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0)
    assert one.tensors["0.mean_distance"].max() < 1e-5 < one.tensors["1.mean_distance"].min()
    assert torch.equal(model(**x).logits, plain)


def test_an_expert_that_no_text_taught_is_left_out(learned, tmp_path):
    model, _ = learned()
    made = [t for t in triplets(4) if t.kind == "place"]
    profile = recipe_class("seka").profile(model, tokenizer(), data=[*made, *(t for t in triplets(1))], min_rise=1e9)
    assert set(profile.facts["risen"].values()) == {0} and profile.tensors["1.experts.vectors"].isnan().all()
    path = str(profile.save(tmp_path / "p.safetensors"))
    with pytest.raises(UnsupportedError, match="no key head"):
        reattend.apply(model, "seka", text="a", adaptive=True, profile_path=path)


def test_the_kept_profile_is_found_again(learned, tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    model, _ = learned()
    options = dict(pairs=2, experts=False)
    with pytest.raises(ReattendError, match="reattend profile seka"):
        reattend.apply(model, "seka", text="Answer", tokenizer=tokenizer())
    made = cached_profile("seka", model, tokenizer(), **options)
    (file,) = (tmp_path / "profiles" / "seka").iterdir()
    assert file == cached_path("seka", sites(model))
    stamp = file.stat().st_mtime_ns
    again = cached_profile("seka", model, tokenizer(), **options)
    assert file.stat().st_mtime_ns == stamp and torch.equal(again.tensors["1.distance"], made.tensors["1.distance"])
    x, _ = batch()
    with reattend.apply(model, "seka", text="Answer", tokenizer=tokenizer()) as session:
        model(**x)
    assert session.applied == 4
    assert cached_profile("seka", model, tokenizer(), pairs=1, experts=False).facts["triplets"] == 2
    # the same weights in half precision share it, other weights do not
    assert cached_path("seka", sites(language_model().bfloat16())) == file
    other = language_model()
    other.model.layers[0].self_attn.k_proj.weight.data += 0.1
    assert cached_path("seka", sites(other)) != file


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (dict(text="a", layers=[9]), "layers 0 to 3, not 9"),
        (dict(text="a", min_diff=1e6), "min_diff.*leaves no key head"),
        (dict(text="a", profile_path="nowhere.safetensors"), "no profile file"),
    ],
)
def test_parameters_that_do_not_fit_model_or_profile_are_named(parameters, problem, learned):
    model, path = learned()
    with pytest.raises(ReattendError, match=problem):
        reattend.apply(model, "seka", **{"profile_path": path, **parameters})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(pairs=0), "pairs"),
        (dict(feature="cosine"), "feature"),
        (dict(data=[("no such words", "What?", "answer", "Who?")]), "no answer was found"),
    ],
)
def test_bad_profiling_options_are_named(options, problem, learned):
    with pytest.raises(ReattendError, match=problem):
        recipe_class("seka").profile(learned()[0], tokenizer(), **options)


def test_models_whose_keys_cannot_be_reached_are_refused(learned):
    _, path = learned()
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(UnsupportedError, match="no k_proj"):
        reattend.apply(model, "seka", text="a", profile_path=path)
    with pytest.raises(ReattendError, match="no k_proj"):
        recipe_class("seka").profile(model, tokenizer())
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(language_model(num_hidden_layers=2), "seka", text="a", profile_path=path)


def test_which_layers_are_meant(learned):
    model, _ = learned()
    table = sites(model).stack("decoder")

    def layers(value):
        return [s.layer for s in recipe("seka", text="a", layers=value).chosen_sites(table)]

    assert layers("all") == layers("last10") == [0, 1, 2, 3] and layers("last2") == [2, 3]
    assert layers("first3") == [0, 1, 2] and layers([3, 1]) == [1, 3]
