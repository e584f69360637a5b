"""Image tokens that really leave the sequence: golden tensors of the official code, and equality with hiding them in every way to run."""

from __future__ import annotations

import json
import threading

import pytest
import torch
import transformers
from asked_images import HOW, NONE, ONE, PROMPTS, TWO, WHAT, tiny_models, turn
from golden_files import golden_file
from reattend.hooks import Capture, Edits, Exit, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import KeyBias, ReattendError, UnsupportedError
from test_visual_token_exit import SLUG, logits_of, prompts_of, steer, text_logits

FAMILIES = sorted(set(tiny_models.BUILDERS) - {"gemma3", "llama4"})


def build(family):
    tiny = tiny_models.build(family)
    if family in ("pixtral", "mistral3"):
        tiny.model.config.text_config.sliding_window = None  # as the published models have it; the class has a default
    return tiny


def lengths(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


# -- golden ------------------------------------------------------------------------------------------------------------------


def golden(name):
    data, told = golden_file("visual-token-exit", name)
    facts = {k: json.loads(v) for k, v in told.items()}
    text = {
        "model_type": "llama",
        "pad_token_id": 0,
        **{k: v for k, v in facts.items() if "_len" not in k and k not in ("seed", "exit_layer", "rope_theta")},
    }
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": facts["rope_theta"]}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tiny_models.CLIP, image_token_id=15, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    weights = {k.removeprefix("model."): v for k, v in data.items() if k.startswith("model.")}
    model.model.language_model.load_state_dict(weights)
    ids = torch.tensor([[1] * facts["prefix_len"] + [15] * facts["image_len"] + [1] * facts["text_len"]])
    model.lm_head = torch.nn.Identity()  # logits are then what it reads: states after the final norm
    return facts, data, model, ids


@pytest.mark.parametrize("mode", ["hide", "leave"])
@pytest.mark.parametrize("name", ["exit_first", "exit_mid", "exit_last_layer"])
def test_golden(name, mode):
    """Hidden states after the final norm, of the prompt's text and of every later token."""
    facts, data, model, ids = golden(name)
    given: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: given[-1])
    with steer(model, facts["exit_layer"], mode=mode) as session, torch.no_grad():
        given.append(data["inputs_embeds"])
        out = model(input_ids=ids, use_cache=True)
        found = out.logits[:, ids[0] != 15]
        torch.testing.assert_close(found, data["prefill_last_hidden_state"], atol=1e-4, rtol=0)
        held = lengths(cache_of(out))
        for step, embeds in enumerate(data["decode_embeds"]):
            given.append(embeds[None, None])
            later = model(input_ids=torch.ones(1, 1, dtype=torch.long), **{cache_name(model): cache_of(out)})
            expected = data["decode_hidden_states"][:, step : step + 1]
            torch.testing.assert_close(later.logits, expected, atol=1e-4, rtol=0)
        behind = facts["num_hidden_layers"] - 1 - facts["exit_layer"]
        assert session.applied == behind * (1 if mode == "leave" else 3)
    if mode == "leave" and behind:
        assert held == data["kv_lengths_after_prefill"].tolist()
    if behind:
        assert (found - data["no_exit_text_hidden_state"]).abs().max() > 1e-2


# -- leaving equals hiding -----------------------------------------------------------------------------------------------------


def both(tiny, run, exit_layer=1):
    """(hidden, left) results of run()."""
    results = []
    for mode in ("hide", "leave"):
        with steer(tiny.model, exit_layer, mode=mode) as session:
            results.append(run())
            assert session.applied > 0
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hiding(family):
    """Batches with one image, two and none, left-padded: every logit of prefill and decode, and the lengths of all caches."""
    tiny = build(family)
    inputs = tiny.inputs(prompts_of(family))
    base = logits_of(tiny.model, inputs)
    hidden, left = both(tiny, lambda: logits_of(tiny.model, inputs))
    torch.testing.assert_close(left, hidden, atol=1e-5, rtol=1e-5)
    hidden, left = both(tiny, lambda: text_logits(tiny.model, inputs))
    torch.testing.assert_close(left, hidden, atol=1e-5, rtol=1e-5)
    with steer(tiny.model, mode="leave") as session, torch.no_grad():
        out = tiny.model(**inputs)
        assert list(session.stats[SLUG].values()) == [1, 1]
    text = int(((inputs["input_ids"] != tiny_models.IMAGE) & inputs["attention_mask"].bool()).sum(dim=1).max())
    width = inputs["input_ids"].shape[1]
    assert lengths(cache_of(out)) == [width, width, text, text] and out.logits.shape[1] == width > text
    assert torch.equal(logits_of(tiny.model, inputs), base), "detached, the model is what it was"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [[ONE], [TWO, TWO], [NONE, ONE], [ONE, [1, *turn(*HOW, "image", *WHAT, 8, 9, 16)]]])
def test_batches(prompts, implementation):
    tiny = build("llava")
    tiny.model.set_attn_implementation(implementation)
    inputs = tiny.inputs(prompts)
    for layer in (0, 2):
        hidden, left = both(tiny, lambda: logits_of(tiny.model, inputs), layer)
        torch.testing.assert_close(left, hidden, atol=1e-5, rtol=1e-5)


def test_rows_without_padding_that_lose_different_numbers_of_tokens():
    """The model makes no mask here, and the row with the longer text has places that nobody may see beside it."""
    tiny = build("qwen2_vl")
    inputs = tiny.inputs([[1, "image", 5, 6, 7, 8], [1, "image", 5, 6]])  # 6 and 8 image tokens
    assert bool(inputs["attention_mask"].all())
    hidden, left = both(tiny, lambda: logits_of(tiny.model, inputs))
    torch.testing.assert_close(left, hidden, atol=1e-5, rtol=1e-5)


def test_images_of_the_next_turn_leave_too():
    tiny = build("llava")
    whole, first = tiny.inputs([[*ONE, 30, *turn("image", *HOW)]]), tiny.inputs([ONE])
    width, begun = whole["input_ids"].shape[1], first["input_ids"].shape[1]
    later = {"attention_mask": whole["attention_mask"], "pixel_values": whole["pixel_values"][1:]}
    with steer(tiny.model, mode="leave"), torch.no_grad():
        cache = cache_of(tiny.model(**first))
        tiny.model(input_ids=whole["input_ids"][:, begun:], **{cache_name(tiny.model): cache}, **later)
    assert lengths(cache) == [width] * 2 + [width - 32] * 2


def test_gradients_flow_to_the_image():
    tiny = build("llava")
    inputs = tiny.inputs([ONE])
    found = []
    for mode in ("hide", "leave"):
        tiny.model.zero_grad()
        with steer(tiny.model, mode=mode) as session:
            tiny.model(**inputs, use_cache=False).logits[:, -1].logsumexp(dim=-1).sum().backward()
            assert session.applied == 2
        found.append(tiny.model.model.multi_modal_projector.linear_1.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_threads_do_not_mix():
    tiny = build("llava")
    batches = [tiny.inputs(p) for p in ([ONE], [TWO], PROMPTS)]
    with steer(tiny.model) as session:
        expected = [logits_of(tiny.model, b) for b in batches]
        assert session.applied == 3 * 2 * 4
    got: dict[int, torch.Tensor] = {}
    with steer(tiny.model, mode="leave") as session:
        threads = [
            threading.Thread(target=lambda n=n, b=b: got.update({n: logits_of(tiny.model, b)})) for n, b in enumerate(batches)
        ]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert session.applied == 3 * 2
    for n, logits in enumerate(expected):
        torch.testing.assert_close(got[n], logits, atol=1e-5, rtol=1e-5)


# -- with other recipes, and what is refused -----------------------------------------------------------------------------------


def favour(table, layers, **places):
    def bias(call):
        return KeyBias(bias=2.0 * call.columns("bos").float())

    return Plan("favour", [Edits(table.only(layers), bias)])


def test_recipes_in_front_of_the_exit_go_on():
    tiny = build("llava")
    inputs = tiny.inputs(PROMPTS)
    plan = favour(sites(tiny.model).stack("decoder"), [0, 1])
    with attach(tiny.model, [plan]) as other:
        hidden, left = both(tiny, lambda: logits_of(tiny.model, inputs))
        assert other.applied == 2 * 2 * 4
    torch.testing.assert_close(left, hidden, atol=1e-5, rtol=1e-5)
    with steer(tiny.model) as session:
        assert (logits_of(tiny.model, inputs) - hidden).abs().max() > 1e-3
        assert session.applied == 8


def test_steps_behind_the_exit_are_refused():
    tiny = build("llava")
    inputs = tiny.inputs([ONE])
    base = logits_of(tiny.model, inputs)
    table = sites(tiny.model).stack("decoder")
    behind = favour(table, [2])
    with steer(tiny.model, mode="leave") as session:
        for plan in (behind, Plan("look", [Capture(table, lambda call, edits: None)])):
            with pytest.raises(UnsupportedError, match="taken tokens out of the sequence"):
                attach(tiny.model, [plan])
        with pytest.raises(UnsupportedError, match="only one can"):
            steer(tiny.model, 2, mode="leave")
        logits_of(tiny.model, inputs)
        assert session.applied == 2
    with attach(tiny.model, [behind]) as other:
        with pytest.raises(UnsupportedError, match="'favour' acts or looks at model.language_model.layers.2"):
            steer(tiny.model, mode="leave")
        logits_of(tiny.model, inputs)
        assert other.applied == 4
    with pytest.raises(UnsupportedError, match="taken tokens out"), attach(tiny.model, [behind], isolated=True):
        logits_of(tiny.model, inputs)
        with steer(tiny.model, mode="leave", isolated=True):  # isolated ones are told by the pass in which they meet
            logits_of(tiny.model, inputs)
    assert torch.equal(logits_of(tiny.model, inputs), base)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma3", 'not tested for .*gemma3_text.*mode="hide"'), ("llama4", "llama4_text"), ("pixtral", "sliding window")],
)
def test_models_that_tokens_cannot_leave(family, reason):
    with pytest.raises(UnsupportedError, match=reason):
        steer(tiny_models.build(family).model, mode="leave")


def test_caches_that_tokens_cannot_leave():
    tiny = build("llava")
    inputs = tiny.inputs([ONE])
    with steer(tiny.model, mode="leave") as session, torch.no_grad():
        cache = cache_of(tiny.model(**inputs))
        assert session.applied == 2
    last = inputs["input_ids"][:, -1:]
    with pytest.raises(ReattendError, match="run the whole prompt again"), steer(tiny.model, mode="leave"):
        tiny.model(input_ids=last, **{cache_name(tiny.model): cache})
    with torch.no_grad():
        cache = cache_of(tiny.model(input_ids=last))
    with pytest.raises(ReattendError, match="run the whole prompt again"), steer(tiny.model, mode="leave"):
        tiny.model(**inputs, **{cache_name(tiny.model): cache})
    with pytest.raises(ReattendError, match="at least one role"):
        Exit(sites(tiny.model), ())
