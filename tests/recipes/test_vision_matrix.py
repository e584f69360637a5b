"""Every vision-language recipe on every family of vision-language models: it acts, each row of a batch is what it is alone, or it says why not.

What a method means is tested in its own file; here is only what all of them owe to every model.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import pytest
import reattend
import tiny_models
import torch
from asked_images import ASSISTANT, NONE, ONE, PROMPTS, TWO, USER, WHAT, tokenizer
from reattend.hooks import sites
from reattend.interventions import ReattendError, ReattendWarning, UnsupportedError
from reattend.recipes import recipe

FAMILIES = [
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3", "gemma3",
    "paligemma", "pixtral", "mistral3",
]  # fmt: skip
# thresholds and strengths at which every method acts on models with random weights
METHODS = {
    "var": {"tau": 1.5, "sink_dims": list(range(8)), "first_layer": 1, "rho": 1.0, "summ": 0.0},
    "vhr": {},
    "selective-emphasis": {"first_layer": 1, "local_share": 0.5},
    "gift": {"saliency_layers": [1], "enhance_layers": [1, 3], "words": "content", "alpha": 3.0},
    "cmai": {"first_layer": 1},
    "pai": {"first_layer": 1, "alpha": 0.5, "gamma": 1.3},
    "opera": {"candidates": 2},
    "visual-token-exit": {"exit_layer": 1},
    "visual-token-exit, leaving": {"exit_layer": 1, "mode": "leave"},
}
# how often each edited layer (and "logits") is counted in one prefill and two decode steps
COUNTS = {
    "var": [3] * 3,
    "vhr": [3] * 4,
    "selective-emphasis": [3] * 3,
    "gift": [3] * 2,
    "cmai": [3] * 3,
    "pai": [3] * 4,
    "opera": [3],
    "visual-token-exit": [3] * 2,
    "visual-token-exit, leaving": [1] * 2,  # at decode nothing more leaves
}
# the first image of each prompt among all images of the batch
FIRST = {id(ONE): 0, id(TWO): 1, id(NONE): 3}
# var's dimensions are no real ones here, and it says so
pytestmark = pytest.mark.filterwarnings("ignore:var. no first token is a sink")
FEW = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@functools.cache
def model_of(family):
    tiny = tiny_models.mllama() if family == "mllama" else tiny_models.build(family)
    if family == "gemma3":
        tiny.model.config.boi_token_id, tiny.model.config.eoi_token_id = 94, 95
    if family in ("pixtral", "mistral3"):
        tiny.model.config.text_config.sliding_window = None  # as the published models have it; the class has a default
    return tiny, reattend.wrap(tiny.model)


def inputs_of(family, prompts, side="left"):
    """As the processor makes them; pictures are those that the prompts have in `PROMPTS`."""
    tiny, _ = model_of(family)
    first = FIRST[id(prompts[0])]
    inputs = replace(tiny, expand=lambda n: tiny.expand(n + first)).inputs(prompts, side)
    if family == "paligemma":  # its processor's: all of the prompt sees all of it
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


@functools.cache
def plain(family):
    """Logits [3, 3 steps, V] without a recipe."""
    return logits_of(family, PROMPTS)


def logits_of(family, prompts, **options):
    out = model_of(family)[1].generate(**inputs_of(family, prompts), **{**FEW, **options})
    return torch.stack(out.logits, dim=1)


def steer(family, method, **more):
    slug = method.split(",")[0]
    if slug == "gift":
        more["tokenizer"] = tokenizer()
    return model_of(family)[1].use(slug, **{**METHODS[method], **more})


def differs(one, other):
    """[B]: the largest difference among tokens that neither of them rules out."""
    open_tokens = (one > -900) & (other > -900)
    return torch.where(open_tokens, (one - other).abs(), 0.0).flatten(1).amax(dim=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_acts_and_each_row_is_what_it_is_alone(family, method):
    """One image, two images and none, left-padded, through prefill and decoding."""
    if method.endswith("leaving") and family == "gemma3":
        with pytest.raises(UnsupportedError, match='mode="hide"'):
            steer(family, method)
        return
    base = plain(family)
    with steer(family, method) as session:
        got = logits_of(family, PROMPTS)
        (counts,) = session.stats.values()
        assert sorted(counts.values()) == COUNTS[method]
        alone = [logits_of(family, [prompt])[0] for prompt in PROMPTS]
    moved = differs(got, base)
    assert (moved[:2] > 1e-4).all(), moved
    assert moved[2] < 3e-6, "a prompt without an image"
    for row, single in zip(got, alone, strict=True):
        torch.testing.assert_close(row, single, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits_of(family, PROMPTS), base), "detached, the model is what it was"


@pytest.mark.parametrize("method", METHODS)
def test_images_behind_cross_attention(method):
    """Mllama's rows of text hold no image weights, and a row of cross-attention holds nothing else; vhr needs neither."""
    tiny, model = model_of("mllama")
    if method != "vhr":
        with pytest.raises(UnsupportedError, match="cross-attention.*a row there holds image weights alone"):
            steer("mllama", method)
        return
    inputs = tiny.inputs([[1, 5, "image", 7, 8]])
    inputs["cross_attention_mask"] = torch.ones(*inputs["input_ids"].shape, 1, 1, dtype=torch.long)
    base = model.generate(**inputs, **FEW)
    with steer("mllama", method) as session:
        got = model.generate(**inputs, **FEW)
        assert session.stats["vhr"] == {f"model.language_model.layers.{n}.self_attn": 3 for n in (0, 2)}
    assert (got.logits[0] - base.logits[0]).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_right_padding(family, method):
    """One pass: the last token of every row as alone."""
    if method.endswith("leaving") and family == "gemma3":
        return
    inputs = inputs_of(family, PROMPTS, "right")
    model = model_of(family)[1]
    with warnings.catch_warnings(), steer(family, method) as session, torch.no_grad():
        if method == "opera":
            with pytest.raises(ReattendError, match="padded on the left"):
                model(**inputs)
            session.counts.clear()
            return
        got = model(**inputs).logits
        for row, prompt in enumerate(PROMPTS):
            last = int(inputs["attention_mask"][row].nonzero()[-1])
            single = model(**inputs_of(family, [prompt])).logits[0, -1]
            torch.testing.assert_close(got[row, last], single, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen2_vl"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=["beams", "samples"]
)
def test_beams_and_samples(family, method, options):
    """Against the same without a cache, where nothing has to follow beams or leave windows."""
    if method.endswith("leaving") and family == "gemma3":
        return
    inputs, model = inputs_of(family, PROMPTS), model_of(family)[1]
    # without a cache the model would take a placeholder of its own for a further image
    options = {**options, "max_new_tokens": 5, "suppress_tokens": [tiny_models.IMAGE]}
    caches = [{}, {}] if method == "opera" else [{}, {"use_cache": False}]
    with steer(family, method):
        runs = []
        for more in caches:
            torch.manual_seed(7)
            runs.append(model.generate(**inputs, **{**FEW, **options, **more}))
    torch.manual_seed(7)
    base = model.generate(**inputs, **{**FEW, **options})
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=3e-5, rtol=1e-4)
    assert (differs(runs[0].logits[0], base.logits[0])[:4] > 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
def test_text_alone(method):
    """No image anywhere: not a bit changes, and the session says that it never acted. opera acts on any answer."""
    tiny, model = model_of("llava")
    text = tiny.inputs([NONE, NONE[:6]])
    with torch.no_grad():
        base = model(**text).logits
        session = steer("llava", method)
        got = model(**text).logits
    if method == "opera":
        assert differs(got[:, -1], base[:, -1]).max() == 0
        session.remove()
        return
    assert torch.equal(got, base)
    with pytest.warns(ReattendWarning, match="never acted"):
        session.remove()


# -- what is refused before anything runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        *[
            (m, {"last_layer": n}, f"last_layer: there is no layer {n}; LlavaForConditionalGeneration has 0 to 3")
            for m in ("var", "pai", "cmai", "selective-emphasis")
            for n in (4, -5)
        ],
        *[
            (m, {"first_layer": 3, "last_layer": 0}, "no decoder self-attention in layers 3 to 0; it has layers 0 to 3")
            for m in ("var", "pai", "cmai", "selective-emphasis")
        ],
        ("var", {"first_layer": 3, "skip_last_layer": True}, "skip_last_layer leaves no layer"),
        ("var", {"sink_dims": []}, "sink_dims"),
        ("var", {"tau": 6.0}, "can never be reached"),
        ("vhr", {"heads": [[1, 4]]}, "head 4 of layer 1, but it has heads 0 to 3"),
        ("gift", {"enhance_layers": [-1]}, "there is no layer -1"),
        ("visual-token-exit", {"exit_layer": 4}, "there is no layer 4"),
        *[(m, {k: float("nan")}, k) for m, k in [("var", "summ"), ("vhr", "alpha"), ("gift", "alpha"), ("cmai", "gamma"),
                                                ("selective-emphasis", "local_share"), ("opera", "scale")]],
    ],
)  # fmt: skip
def test_what_can_never_act_is_refused(method, wrong, message):
    with pytest.raises(ReattendError, match=message):
        steer("llava", method, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_refused_before_any_layer_runs(method):
    tiny, model = model_of("llava")
    ran = []
    handle = tiny.model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    options = {"pai": [{}, {"gamma": 1.0}], "gift": [{}, {"ranges": [(2, 4)]}]}
    try:
        for more in options.get(method, [{}]):
            with pytest.raises(ReattendError, match="input_ids"), steer("llava", method, **more):
                model(inputs_embeds=torch.randn(1, 5, 32))
    finally:
        handle.remove()
    assert not ran


@pytest.mark.parametrize("method", METHODS)
def test_resampled_images_have_no_places(method):
    """Idefics 2 hands latents to its decoder: no places of the image. vhr compares heads with and without them, wherever they lie."""
    import transformers

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
    latents = {"n_latents": 4, "depth": 1, "n_heads": 2, "head_dim": 8}
    config = transformers.Idefics2Config(
        text_config={**tiny_models.TEXT, "model_type": "mistral"},
        vision_config={**vision, "patch_size": 6},
        perceiver_config={**{f"resampler_{k}": n for k, n in latents.items()}, "num_key_value_heads": 1},
        image_token_id=tiny_models.IMAGE,
    )
    with torch.device("meta"):
        model = transformers.Idefics2ForConditionalGeneration(config)
    chosen = recipe(method.split(",")[0], **METHODS[method])
    support = chosen.supports(sites(model))
    assert support.ok if method == "vhr" else "are no places of the image" in support.reason


@pytest.mark.parametrize("method", ["var", "pai", "selective-emphasis", "gift", "cmai"])
def test_the_window_leaves_the_image_behind(method):
    """Gemma 3: where a sliding layer no longer holds an image token nothing is changed and nothing is counted."""
    tiny, model = model_of("gemma3")
    inputs = tiny.inputs([[1, USER, "image", *WHAT, *range(20, 35), ASSISTANT]])
    options = {"pai": {"gamma": 1.0}, "gift": {"enhance_layers": [1, 2, 3]}}
    with steer("gemma3", method, **options.get(method, {})) as session:
        model.generate(**inputs, **FEW)
    (counts,) = session.stats.values()
    # the prompt's own pass holds all keys at every layer
    assert counts == {f"model.language_model.layers.{n}.self_attn": 1 if n == 2 else 3 for n in (1, 2, 3)}
