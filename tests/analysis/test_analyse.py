"""analyse on tiny models: what it reports is what eager attention and output_hidden_states hold."""

from __future__ import annotations

import json

import pytest
import reattend
import torch
import transformers
from reattend.analysis.analyse import TEXTS
from reattend.hooks import Edits, Support
from reattend.interventions import KeyBias
from reattend.recipes import Info, Recipe
from tiny_language import language_model, tokenizer
from tiny_models import build

TEXT = "Anna has a red house and Paul has a blue garden; the dog sat in the garden."


class SinkDown(Recipe):
    slug = ""
    info = Info("Weakens the first token.", "None", 2026, "0000.00000", ("sinks",), ("llm",), "free")
    factor: float = 4.0

    def supports(self, sites):
        return Support(True)

    def plan(self, sites):
        def bias(call):
            return KeyBias(bias=torch.zeros(call.num_keys).index_fill(0, torch.tensor([0]), -self.factor))

        return [Edits(sites.stack("decoder"), bias, "sink-down")]


@pytest.fixture(scope="module")
def model():
    return language_model()


def eager(model, **inputs):
    """(weights [layers, B, H, T, T], states entering the layers [layers, B, T, D]) from the model itself."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    model.set_attn_implementation("sdpa")
    return torch.stack(output.attentions), torch.stack(output.hidden_states[:-1])


def test_numbers_are_those_of_the_whole_matrices(model):
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids
    weights, states = eager(model, input_ids=ids)
    found = reattend.analyse(model, TEXT, tokenizer=tokenizer(), length=200)
    (text,) = found.samples
    n = ids.shape[1]
    assert len(text) == n and "".join(text.tokens) == TEXT and found.layers == [0, 1, 2, 3]
    means = weights[:, 0].sum(dim=2) / torch.arange(n, 0, -1)
    for layer in range(4):
        close = dict(atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(text.importance[layer], means[layer], **close)
        torch.testing.assert_close(text.hidden[layer], states[layer, 0].norm(dim=-1), **close)
        cosine = torch.cosine_similarity(states[layer, 0], states[layer, 0, :1], dim=-1)
        torch.testing.assert_close(text.similarity[layer], cosine, **close)
        magnitudes = states[layer, 0].abs().flatten()
        assert float(text.largest[layer][0]) == pytest.approx(float(magnitudes.max()), rel=1e-5)
        assert float(text.largest[layer][3]) == pytest.approx(float(magnitudes.median()), rel=1e-5)
    assert found.sink_rate() == pytest.approx(100 * float((means[..., 0] > 0.3).float().mean()))
    assert found.sink_rate(3, epsilon=0.05) == pytest.approx(100 * float((means[..., 3] > 0.05).float().mean()))
    assert found.norms()["key"].shape == (4, n)
    before = torch.cosine_similarity(states[1:, 0], states[1:, 0, :1], dim=-1)[:, 1:].square().mean()
    assert found.similarity() == pytest.approx(float(before), rel=1e-4)


def test_rhythm_equals_the_definitions(model):
    prompt = " ".join([TEXT] * 3)
    answer = " " + TEXT
    words = tokenizer()
    ids = torch.tensor([words(prompt).input_ids + words(answer, add_special_tokens=False).input_ids])
    start, n = len(words(prompt).input_ids), ids.shape[1]
    weights, _ = eager(model, input_ids=ids)
    flat = weights[:, 0].flatten(0, 1)
    gap = (torch.arange(n)[:, None] - torch.arange(n)).clamp_min(0).float()
    spans = (flat * gap).sum(dim=2)[:, start:].mean(dim=1)
    order = spans.argsort()
    near, far = flat[order[:5]].mean(dim=0), flat[order[-5:]].mean(dim=0)
    found = reattend.analyse(model, [(prompt, answer)], tokenizer=words)
    assert found.samples[0].answer == start
    rhythm = found.rhythm()
    assert {4 * layer + head for layer, head in rhythm.local} == set(order[:5].tolist())
    torch.testing.assert_close(rhythm.waad[start:], (near * gap.clamp_max(10)).sum(dim=1)[start:], atol=1e-4, rtol=1e-4)
    assert rhythm.waad[:start].isnan().all()
    for s in (0, start - 20, start, n - 11):
        rows = range(max(start, s + 10), min(n - 1, s + 50) + 1)
        expected = torch.stack([far[t, s] for t in rows]).mean() if len(rows) else torch.tensor(float("nan"))
        torch.testing.assert_close(rhythm.fai[s], expected, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert rhythm.fai[-10:].isnan().all()
    assert {layer for layer, _ in found.rhythm(layers=[1, 3]).local} <= {1, 3}
    assert found.rhythm(layers="middle5").local
    with pytest.raises(reattend.ReattendError, match="middle5"):
        found.rhythm(layers=[9])


def test_padding_and_batches_change_nothing(model):
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids
    short = ids[:, :9]
    batch = torch.cat([ids, torch.cat([torch.zeros(1, ids.shape[1] - 9, dtype=torch.long), short], dim=1)])
    found = reattend.analyse(model, inputs={"input_ids": batch, "attention_mask": (batch > 0).long()}, tokenizer=tokenizer())
    alone = [reattend.analyse(model, inputs={"input_ids": x}, tokenizer=tokenizer()).samples[0] for x in (ids, short)]
    for own, other in zip(found.samples, alone, strict=True):
        assert own.tokens == other.tokens
        for layer in range(4):
            for name in ("importance", "near", "hidden", "key", "similarity"):
                torch.testing.assert_close(
                    getattr(own, name)[layer], getattr(other, name)[layer], atol=1e-4, rtol=1e-3, equal_nan=True
                )


def test_what_recipes_do_is_seen_and_nothing_stays(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
    plain = reattend.analyse(model, TEXT, tokenizer=tokenizer())
    with reattend.apply(model, SinkDown()) as session:
        steered = reattend.analyse(model, TEXT, tokenizer=tokenizer())
    assert session.applied == 4 and steered.recipes == [""]
    for layer in range(4):
        assert steered.first_token()[layer].mean() < plain.first_token()[layer].mean()
    assert steered.sink_rate(epsilon=0.15) < plain.sink_rate(epsilon=0.15)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not model._forward_hooks and not model._forward_pre_hooks and model.config._attn_implementation == "sdpa"


def test_planted_sinks_are_found(model):
    """Token 7 gets the same huge value in dimension 13 as the first one: an intermediate sink, in every layer."""
    planted = language_model(hidden_size=512)
    ids = torch.arange(5, 25)[None].repeat(1, 2)[:, :30]
    row = torch.zeros(512)
    row[13] = 3000.0
    with torch.no_grad():
        planted.model.embed_tokens.weight[ids[0, 0]] += row
        planted.model.embed_tokens.weight[ids[0, 7]] += row
    found = reattend.analyse(planted, inputs={"input_ids": ids})
    assert found.sink_dims() == [13]
    assert {(m.position, m.dim) for m in found.massive()} == {(0, 13), (7, 13), (20, 13), (27, 13)}
    rows = found.intermediate_sinks()
    assert [row[0] for row in rows] == [7, 20, 27] and rows[0][2] == 4 and rows[0][3] > 0.99
    assert found.similarity() > reattend.analyse(model, inputs={"input_ids": ids}).similarity()


def whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_speech_models_both_sides():
    model = whisper()
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 60, (2, 12))}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    heard = reattend.analyse(model, inputs=inputs, stack="encoder")
    said = reattend.analyse(model, inputs=inputs)
    for row in range(2):
        for layer in range(2):
            frames, words = heard.samples[row], said.samples[row]
            torch.testing.assert_close(
                frames.importance[layer], output.encoder_attentions[layer][row].mean(dim=1), atol=1e-5, rtol=1e-4
            )
            expected = output.decoder_attentions[layer][row].sum(dim=1) / torch.arange(12, 0, -1)
            torch.testing.assert_close(words.importance[layer], expected, atol=1e-5, rtol=1e-4)
            states = output.encoder_hidden_states[layer][row]
            torch.testing.assert_close(frames.hidden[layer], states.norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert len(heard.samples[0]) == 20 and len(said.samples[0]) == 12
    assert heard.samples[0].tokens[3] == "3"
    with pytest.raises(reattend.ReattendError, match="both directions"):
        heard.rhythm()
    assert json.loads(heard.json())["per_text"][0].keys().isdisjoint({"rhythm"})
    with pytest.raises(reattend.ReattendError, match="a batch of 2, expected 1"):
        reattend.analyse(
            model, inputs={"input_features": inputs["input_features"][:1], "decoder_input_ids": inputs["decoder_input_ids"]}
        )


def speech_model(half=False):
    """Qwen2-Audio: a language model whose prompt holds the frames of a sound between two tags, as in audio-visual speech models."""
    torch.manual_seed(0)
    text = dict(
        model_type="qwen2", vocab_size=60, hidden_size=512, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    sound = dict(
        num_mel_bins=8, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, max_source_positions=20
    )
    config = transformers.Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=50)
    model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    return model.half() if half else model


@pytest.mark.parametrize("half", [False, True])
def test_sinks_of_a_speech_language_model(half):
    """Massive values at the first token and at the tag that opens the sound, with left padding: found there, and nowhere else."""
    model, tag, dim = speech_model(half), 48, 13
    prompt = [1, tag, *[50] * 10, 49, 5, 6, 7, 8]
    short = [1, 9, 10, tag, *[50] * 10, 49]
    ids = torch.tensor([prompt, [0] * (len(prompt) - len(short)) + short])
    with torch.no_grad():
        for token in (1, tag):
            model.get_input_embeddings().weight[token, dim] = 3000.0
    generator = torch.Generator().manual_seed(1)
    sounds = {
        "input_features": torch.randn(2, 8, 40, generator=generator).to(model.dtype),
        "feature_attention_mask": torch.ones(2, 40, dtype=torch.long),
    }
    found = reattend.analyse(model, inputs={"input_ids": ids, "attention_mask": (ids != 0).long(), **sounds})
    assert [len(sample) for sample in found.samples] == [len(prompt), len(short)]
    assert found.sink_dims() == [dim]
    for row, place in ((0, 1), (1, 3)):
        assert {(m.position, m.dim) for m in found.massive(row)} == {(0, dim), (place, dim)}
        ((position, _, layers, cosine),) = found.intermediate_sinks(row)
        assert position == place and layers == 4 and cosine > 0.99
    assert 0 < found.similarity() < 1


def test_columns_that_draw_more_than_their_share(model):
    """Mean weight of a column over later rows, layers and heads, against what even rows would give it."""
    ids = torch.arange(5, 35)[None]
    weights, _ = eager(model, input_ids=ids)
    n, times = ids.shape[1], 1.1
    found = reattend.analyse(model, inputs={"input_ids": ids}, skip_last=2)
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    expected = {}
    for column in range(1, n - 2):
        mean = weights[:, 0, :, column:, column].mean()
        ratio = float(mean / even[column:, column].mean())
        if ratio > times:
            expected[column] = ratio
    got = found.drawing(times=times)
    assert 0 < len(expected) < n - 3 and [k for k, _, _ in got] == sorted(expected, key=lambda k: -expected[k])
    for column, _, ratio in got:
        assert ratio == pytest.approx(expected[column], rel=1e-4)
    assert found.drawing(times=1e6) == []


def test_a_vision_language_model_and_its_eye():
    tiny = build("llava")
    inputs = tiny.inputs([[5, "image", 6, 7, 8]])
    found = reattend.analyse(tiny.model, inputs=inputs)
    assert len(found.samples[0]) == inputs["input_ids"].shape[1]
    eye = reattend.analyse(tiny.model, inputs=inputs, stack="vision")
    assert len(eye.samples[0]) == 17 and eye.stack == "vision"


def test_json_and_table(model):
    found = reattend.analyse(model, tokenizer=tokenizer(None))
    assert len(found.samples) == len(TEXTS) >= 5 and {len(s) for s in found.samples} == {64}
    data = json.loads(found.json())
    assert data["sink_rate"] == found.sink_rate() and len(data["sink_rate_per_position"]) == 64
    assert data["per_text"][0]["rhythm"]["fai"][-1] is None
    assert set(data["first_token_weight"]) == {"0", "1", "2", "3"}
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    text = console.export_text()
    assert f"{found.sink_rate():.1f} %" in text and "sink dimensions" in text and "no special token in front" in text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"texts": "a dog"}, "tokenizer="),
        ({"texts": [], "tokenizer": True}, "texts is empty"),
        ({"texts": ["a dog", ""], "tokenizer": True}, r"texts\[1\] must be a text or a pair"),
        ({"texts": [("the dog", "")], "tokenizer": True}, "at least one token"),
        ({"texts": [("the dog sat in the garden", "yes")], "tokenizer": True, "length": 3}, "length is 3"),
        ({"texts": "a", "tokenizer": True}, "at least 2"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"length": 1}, "length"),
        ({"skip_last": -1}, "skip_last"),
        ({"stack": "vision", "tokenizer": True}, "has: decoder"),
        ({"inputs": {}, "texts": "a"}, "give one of them"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": {"input_ids": [1, 2]}}, "dict of tensors"),
    ],
)
def test_bad_input_is_refused_before_any_forward(model, given, message, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    if given.get("tokenizer") is True:
        given = {**given, "tokenizer": tokenizer()}
    with pytest.raises(reattend.ReattendError, match=message):
        reattend.analyse(model, **given)
    assert not model._forward_pre_hooks


@pytest.mark.slow
def test_known_values_of_smollm2():
    """Measured before on other texts: 73.5 % of the heads have their sink on the first token, its massive dimension is 507."""
    from reattend.comparison.loading import packaged_smollm2

    model, words = packaged_smollm2()
    found = reattend.analyse(model, tokenizer=words)
    assert found.sink_rate() == pytest.approx(73.5, abs=3)
    assert found.sink_rate(epsilon=0.2) == pytest.approx(82.3, abs=3)
    assert float(found.sink_rates()[1:8].max()) < 6
    assert found.sink_dims() == [507]
    top = found.massive()[0]
    assert (top.position, top.dim) == (0, 507) and top.value > 15000
    with reattend.apply(model, SinkDown(factor=2.0)):
        weaker = reattend.analyse(model, tokenizer=words)
    assert weaker.sink_rate() < found.sink_rate() - 5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"texts": 3}, "texts must be a text or a list"),
        ({"texts": ["a", 3]}, "a text must be a text, got 3"),
        ({"inputs": 3}, "inputs must be a mapping"),
        ({"tokenizer": 3}, "tokenizer must be"),
        ({"length": "x"}, "length must be a whole number"),
        ({"epsilon": "x"}, "epsilon must be a number"),
        ({"ratio": float("nan")}, "ratio must be a number, got NaN"),
        ({"skip_last": 1.5}, "skip_last must be a whole number"),
        ({"stack": None}, "stack must be a text"),
    ],
)
def test_arguments_of_another_kind(options, words):
    with pytest.raises(reattend.ReattendError, match=words):
        reattend.analyse(torch.nn.Linear(2, 2), **options)
