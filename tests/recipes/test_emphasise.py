"""emphasise (PASTA): golden data of the official code, its invariants, and whole models against hooks that edit the mask."""

from __future__ import annotations

import contextlib
import math

import pytest
import reattend
import torch
import weighed
from golden_files import golden_file
from reattend.hooks.trackers.caches import cache_in
from reattend.interventions import ReattendError, UnsupportedError, fused, reference
from reattend.recipes import Profile
from reattend.recipes.kit.profile import fingerprint
from tiny_language import language_model, tokenizer
from transformers import pipeline

PROMPTS = [
    "The capital of France is Paris. Answer in French. What is the capital?",
    "Anna has a red house. Answer in one word.",
]
PASSAGES = [["Answer in French."], ["red house", "one word"]]


def weights_of(*given, **parameters):
    return weighed.weights_of("emphasise", *given, **parameters)


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["alpha_one", "exclude_one", "exclude_decode", "exclude_two_sections", "include"])
def test_golden_weights_of_the_official_code(name, execute):
    data, facts = golden_file("pasta", name)
    pads = [int(p) for p in facts["left_pads"].strip("[]").split(",")]
    ranges = [[(a - pad, b - pad) for a, b in sections] for sections, pad in zip(data["sections"].tolist(), pads)]
    found = weights_of(
        data["scores"], data["mask"], ranges, pads, int(facts["input_len"]), execute,
        alpha=float(facts["alpha"]), position=facts["scale_position"], official_multi=True,
        heads={0: data["heads"].tolist()},
    )  # fmt: skip
    offset = found.shape[3] - found.shape[2] if found.shape[2] == 1 else 0
    for row, pad in enumerate(pads):
        first = max(0, pad - offset)
        torch.testing.assert_close(found[row, :, first:], data["weights_steered"][row, :, first:], atol=1e-6, rtol=0)
    assert name == "alpha_one" or (found - data["weights_plain"]).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 0.3])
def test_ratios_change_only_between_the_passage_and_the_rest_of_the_prompt(alpha):
    scores, mask = weighed.random_call()
    inside, outside, new = [3, 4, 5], [0, 1, 2, 6, 7, 8, 9, 10, 11], [12, 13, 14]
    ranges = [[(3, 6)], [(3, 6)]]
    plain = weights_of(scores, mask, ranges, [0, 0], 12, alpha=1.0)
    found = weights_of(scores, mask, ranges, [0, 0], 12, alpha=alpha, heads={0: [1, 2]})
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:3]))
    assert torch.equal(found[:, [0, 3]], plain[:, [0, 3]])
    before, after = plain[:, 1:3, -1].double(), found[:, 1:3, -1].double()

    def ratio(weights, a, b):
        return weights[..., a] / weights[..., b]

    for group in (inside, outside, new, inside + new):
        for a, b in zip(group, group[1:]):
            torch.testing.assert_close(ratio(after, a, b), ratio(before, a, b), rtol=1e-4, atol=0)
    torch.testing.assert_close(ratio(after, 4, 7), ratio(before, 4, 7) / alpha, rtol=1e-4, atol=0)
    # rows before the passage see only tokens that all get the same factor
    scores, mask = weighed.random_call(queries=15)
    plain = weights_of(scores, mask, ranges, [0, 0], 12, alpha=1.0)
    found = weights_of(scores, mask, ranges, [0, 0], 12, alpha=alpha)
    torch.testing.assert_close(found[:, :, :3], plain[:, :, :3], atol=1e-6, rtol=0)
    assert (found[:, :, 6:] - plain[:, :, 6:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("parameters", "want"),
    [
        (dict(alpha=0.1), [-1, -1, 0, -1, 0, -1, 0]),
        (dict(alpha=0.1, official_multi=True), [-2, -2, -1, -2, -1, -2, 0]),
        (dict(alpha=10, position="include"), [-1, -1, 0, -1, 0, -1, 0]),
        (dict(alpha=10, position="include", official_multi=True), [-1, -1, 0, -1, 0, -1, 0]),
        (dict(alpha=0.1, position="generation"), [-1, -1, -1, -1, -1, -1, 0]),
        (dict(alpha=0.1, position="generation", official_multi=True), [-2, -2, -2, -2, -2, -2, 0]),
        (dict(alpha=0.1, keep_sink=True), [0, -1, 0, -1, 0, -1, 0]),
    ],
)
def test_bias_of_two_passages_in_powers_of_ten(parameters, want):
    scores = torch.zeros(1, 1, 1, 7)
    found = weights_of(scores, None, [(2, 3), (4, 5)], [0], 6, **parameters)
    expected = 10.0 ** torch.tensor(want)
    torch.testing.assert_close(found[0, 0, 0], expected / expected.sum())


def test_a_prompt_without_passages_and_padding_are_left_alone():
    scores, mask = weighed.random_call(queries=12, keys=12)
    ranges = [[(1, 3)], []]
    found = weights_of(scores, mask, ranges, [2, 0], 12, alpha=0.1)
    plain = weights_of(scores, mask, ranges, [2, 0], 12, alpha=1.0)
    torch.testing.assert_close(found[1], plain[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0, :, -1, 0] / found[0, :, -1, 3], plain[0, :, -1, 0] / plain[0, :, -1, 3])
    torch.testing.assert_close(found[0, :, -1, 0] / found[0, :, -1, 2], 10 * plain[0, :, -1, 0] / plain[0, :, -1, 2])


# -- whole models ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def edited_masks(model, biases, heads):
    """The official way on an eager model: a hook on each attention module adds the bias [B, prompt] to the mask of its heads."""
    total = [0]
    handles = []

    def begin(module, args, kwargs):
        cache, ids = cache_in(kwargs), kwargs["input_ids"]
        total[0] = (cache.get_seq_length() if cache is not None else 0) + ids.shape[1]

    def edit(module, args, kwargs):
        mask = kwargs["attention_mask"]
        keys, layer = mask.shape[-1], module.layer_idx
        batch = mask.shape[0]
        mask = mask.expand(batch, 4, -1, keys).clone()
        start = max(0, total[0] - keys)
        piece = biases.repeat_interleave(batch // biases.shape[0], dim=0)[:, start : start + keys]
        mask[:, heads.get(layer, []), :, : piece.shape[1]] += piece[:, None, None]
        return args, {**kwargs, "attention_mask": mask}

    handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    handles += [layer.self_attn.register_forward_pre_hook(edit, with_kwargs=True) for layer in model.model.layers]
    yield
    for handle in handles:
        handle.remove()


def batch_and_bias(alpha, passages=PASSAGES, prompts=PROMPTS):
    """Inputs, and log alpha on the real prompt tokens outside the passages, found by hand from the offsets of the padded encoding."""
    chars = tokenizer()
    x = chars(prompts, return_tensors="pt", padding=True, return_offsets_mapping=True)
    offsets, real = x.pop("offset_mapping"), x["attention_mask"].bool()
    marked = torch.zeros_like(real)
    for row, texts in enumerate(passages):
        for text in texts:
            c0 = prompts[row].index(text)
            marked[row] |= (offsets[row, :, 0] < c0 + len(text)) & (offsets[row, :, 1] > c0)
    return x, math.log(alpha) * (real & ~marked), marked


HEADS = {0: [1, 2], 2: [0, 3], 3: [2]}
ALL = {layer: [0, 1, 2, 3] for layer in range(4)}
KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def generate(model, x):
    out = model.generate(**x, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(("kind", "heads"), [("Llama", HEADS), ("Mistral", ALL), ("Gemma2", ALL), ("Gemma3", ALL)])
def test_generation_equals_hooks_on_the_masks(kind, heads):
    """Left padding, other passages in each row, GQA and sliding caches."""
    alpha = 0.05
    x, bias, _ = batch_and_bias(alpha)
    model = language_model(kind, **KINDS[kind])
    plain = generate(model, x)
    with reattend.apply(model, "emphasise", text=PASSAGES, alpha=alpha, heads=heads, tokenizer=tokenizer()) as session:
        found = generate(model, x)
    eager = language_model(kind, **KINDS[kind], attn_implementation="eager")
    with edited_masks(eager, bias, heads):
        wanted = generate(eager, x)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=2e-5, rtol=1e-4)
    assert (plain[1][0] - found[1][0]).abs().amax(dim=1).min() > 1e-3, "every row must be steered"
    # as many calls as forward passes at every steered site, none elsewhere
    counts = session.stats["emphasise"]
    assert set(counts) == {f"model.layers.{i}.self_attn" for i in heads} and set(counts.values()) == {session.forwards}
    assert all(torch.equal(a, b) for a, b in zip(generate(model, x), plain))


def test_sessions_with_different_passages_add_up():
    x, first, _ = batch_and_bias(0.3, [["France"], ["Anna"]])
    _, second, _ = batch_and_bias(0.2, [["capital?"], ["Answer"]])
    model = language_model()
    outer = reattend.apply(model, "emphasise", text=[["France"], ["Anna"]], tokenizer=tokenizer())
    inner = reattend.apply(model, "emphasise", text=[["capital?"], ["Answer"]], alpha=0.2, tokenizer=tokenizer())
    both = model(**x).logits
    outer.remove()
    only = model(**x).logits
    inner.remove()
    eager = language_model(attn_implementation="eager")
    real = x["attention_mask"].bool()
    for bias, found in ((first + second, both), (second, only)):
        with edited_masks(eager, bias, ALL):
            torch.testing.assert_close(found[real], eager(**x).logits[real], atol=2e-5, rtol=1e-4)


def test_the_pipeline_brings_its_own_tokenizer():
    model, chars = language_model(), tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=chars, device="cpu")
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False)
    before = pipe(PROMPTS, **options, batch_size=2)
    with reattend.apply(pipe, "emphasise", text="Answer in", alpha=1e-3) as session:
        after = pipe(PROMPTS, **options, batch_size=2)
    assert session.applied == 4 * 6 and before != after
    assert pipe(PROMPTS, **options, batch_size=2) == before
    talk = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "The capital?"}]
    with reattend.apply(pipe, "emphasise", text="Answer in French.") as session:
        pipe(talk, **options)
    assert session.applied == 4 * 6


def test_models_that_do_not_read_their_prompt_with_a_decoder_are_refused():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="reads its prompt with an encoder"):
        reattend.apply(BartForConditionalGeneration(config), "emphasise", text="a")


def test_the_default_alpha_follows_the_heads():
    x, _, _ = batch_and_bias(0.01)
    model = language_model()

    def logits(**parameters):
        with reattend.apply(model, "emphasise", text=PASSAGES, tokenizer=tokenizer(), **parameters):
            return model(**x).logits

    assert torch.equal(logits(heads={1: [2], 3: [0]}), logits(heads=[(1, 2), (3, 0)], alpha=0.01))
    assert torch.equal(logits(), logits(heads=[0, 1, 2, 3], alpha=0.3))


def test_a_profiles_best_heads_are_steered(tmp_path):
    x, _, _ = batch_and_bias(0.01)
    model = language_model()
    scores = torch.zeros(4, 4)
    scores[2, 1], scores[0, 3], scores[3, 0] = 0.9, 0.5, 0.1
    path = Profile("retrieval-heads", fingerprint(model), {"score": scores}).save(tmp_path / "heads.safetensors")
    results = {}
    for name, parameters in {
        "two": dict(profile_path=str(path), top=2),
        "same": dict(heads=[(2, 1), (0, 3)]),
        "all": dict(profile_path=str(path), top=16),
        "scored": dict(heads=[(2, 1), (0, 3), (3, 0)]),
        "default": dict(profile_path=str(path)),
        "best": dict(heads=[(2, 1)]),
    }.items():
        with reattend.apply(model, "emphasise", text=PASSAGES, tokenizer=tokenizer(), **parameters):
            results[name] = model(**x).logits
    assert torch.equal(results["two"], results["same"])
    assert torch.equal(results["all"], results["scored"])  # heads with score 0 are none of the method's
    assert torch.equal(results["default"], results["best"])  # one in twenty of 16
    with pytest.raises(ReattendError, match="another model"):
        reattend.apply(language_model(num_hidden_layers=2), "emphasise", text="a", profile_path=str(path))
    Profile("retrieval-heads", fingerprint(model), {"score": torch.zeros(4, 4)}).save(path)
    with pytest.raises(ReattendError, match="profile_path: no head of this profile"):
        reattend.apply(model, "emphasise", text="a", profile_path=str(path))


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_marked_one_of_two_facts_wins(smollm2):
    """Two conflicting facts, either marked: the mean log-probability of its answer, and its lead over the other, rise as alpha falls.

    Single prompts need not: below 0.1 on all heads the question is weakened too (see the recipe's text).
    """
    model, chars = smollm2
    kinds = [
        ("The key of {}'s house is in the {}.", "Where is the key of {}'s house? Answer: It is in the", ("garden", "office")),
        ("{} lives in {}.", "Where does {} live? Answer: {} lives in", ("Berlin", "Paris")),
        ("The car of {} is {}.", "What colour is the car of {}? Answer: It is", ("blue", "red")),
    ]
    prompts, marked, answers = [], [], []
    for name in ("Anna", "Hugo"):
        for fact, question, words in kinds:
            facts = [fact.format(name, word) for word in words]
            ids = [chars(" " + word)["input_ids"][0] for word in words]
            for k in (0, 1):
                prompts.append(f"{facts[0]} {facts[1]}\nQuestion: {question.format(name, name)}")
                marked.append([facts[k]])
                answers.append([ids[k], ids[1 - k]])
    x = chars(prompts, return_tensors="pt", padding=True, padding_side="left")
    own, lead = [], []
    for alpha in (1.0, 0.3, 0.1):
        with torch.no_grad(), reattend.apply(model, "emphasise", text=marked, alpha=alpha, tokenizer=chars) as session:
            values = model(**x, logits_to_keep=1).logits[:, -1].log_softmax(-1).gather(1, torch.tensor(answers))
        assert session.applied == (0 if alpha == 1 else 30)
        own.append(values[:, 0].mean().item())
        lead.append((values[:, 0] - values[:, 1]).mean().item())
    assert own[0] < own[1] < own[2], own
    assert abs(lead[0]) < 1e-4 and 1 < lead[1] < lead[2], lead
