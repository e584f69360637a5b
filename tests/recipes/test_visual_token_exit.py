"""Visual-token exit: against attention that cannot see the image, the invariants of the method, ways to run, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
import reattend
import torch
from asked_images import HOW, NONE, ONE, PROMPTS, WHAT, tiny_models, turn
from by_hand import attention_by_hand
from reattend.hooks import sites
from reattend.hooks.trackers.caches import cache_in
from reattend.interventions import Call, Clock, Keep, ReattendError, TokenMap, UnsupportedError, fused, reference
from reattend.interventions.engine.bands import hide_columns
from reattend.recipes import recipe, recipe_class

SLUG = "visual-token-exit"
FEW = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def prompts_of(family):
    """PaliGemma's prompts see all of themselves: rows that differ in their number of images would differ in what padding does."""
    return [ONE] if family == "paligemma" else PROMPTS


def steer(model, exit_layer=1, **options):
    return reattend.apply(model, SLUG, exit_layer=exit_layer, **options)


def logits_of(model, inputs, **options):
    return torch.stack(model.generate(**inputs, **{**FEW, **options}).logits, dim=1)


# -- a naive implementation ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def blindfolded(model, image, exit_layer):
    """The model with whole matrices in which no row of a layer behind `exit_layer` sees the columns `image` [B, T]."""

    def hide(layer, scores, visible):
        if layer <= exit_layer:
            return scores
        seen = torch.nn.functional.pad(image, (0, total[-1] - image.shape[1]))[:, -scores.shape[3] :][:, None, None]
        return scores.masked_fill(seen & (visible & ~seen).any(dim=-1, keepdim=True), -torch.inf)

    def count(module, args, kwargs):
        cache = cache_in(kwargs)
        total.append(kwargs["input_ids"].shape[1] + (0 if cache is None else cache.get_seq_length()))

    total = []
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with attention_by_hand(model, scores=hide):
            yield
    finally:
        handle.remove()


def modules(model):
    table = sites(model).stack("decoder")
    return [(site, table.module(site)) for site in table]


@pytest.mark.parametrize("family", sorted(tiny_models.BUILDERS))
def test_equals_a_naive_implementation(family):
    """Prompts with one image, with two, and with none, left-padded: every logit of prefill and decode."""
    tiny = tiny_models.build(family)
    prompts = prompts_of(family)
    inputs = tiny.inputs(prompts)
    base = logits_of(tiny.model, inputs)
    with blindfolded(tiny.model, inputs["input_ids"] == tiny_models.IMAGE, 1):
        expected = logits_of(tiny.model, inputs)
    with steer(tiny.model) as session:
        got = logits_of(tiny.model, inputs)
        assert sorted(session.stats[SLUG].values()) == [4, 4] and len(session.stats[SLUG]) == 2
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)
    assert ((got - base)[:2].abs().amax(dim=(1, 2)) > 1e-4).all(), "without the image the answer is another"
    if len(prompts) > 2:
        torch.testing.assert_close(got[2], base[2], atol=3e-6, rtol=1e-5)
    assert torch.equal(logits_of(tiny.model, inputs), base), "detached, the model is what it was"


@pytest.mark.parametrize("mask", [None, "causal", "additive"])
def test_a_key_bias_hides_as_keep_does(mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 3:8] = image[1, 0:2] = True  # rows 0 and 1 of the second prompt see nothing else
    visible = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    masks = {None: None, "causal": visible, "additive": torch.zeros(1, 1, 12, 12).masked_fill(~visible, -torch.inf)}
    call = Call(query, key, value, masks[mask], is_causal=mask is None)
    edit = hide_columns([image & (torch.arange(12) < 5), image])
    kept = reference(call, [Keep(pattern=~image[:, None])])
    torch.testing.assert_close(fused(call, [edit]), kept, atol=1e-3, rtol=0)
    read = ~image[:, None, :, None].expand_as(kept)
    torch.testing.assert_close(fused(call, [edit])[read], kept[read], atol=2e-6, rtol=1e-5)
    assert hide_columns([]) is None and hide_columns([image & False]) is None


# -- the invariants of the method --------------------------------------------------------------------------------------------


def text_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[(inputs["input_ids"] != tiny_models.IMAGE) & inputs["attention_mask"].bool()]


def noisy_logits(tiny, inputs, layer):
    """`text_logits` where the image tokens that enter a layer are noise."""
    image = inputs["input_ids"] == tiny_models.IMAGE

    def noise(module, args):
        return (args[0] + 10 * torch.randn_like(args[0]) * image[..., None], *args[1:])

    handle = tiny.model.model.language_model.layers[layer].register_forward_pre_hook(noise)
    try:
        return text_logits(tiny.model, inputs)
    finally:
        handle.remove()


@pytest.mark.parametrize("exit_layer", [0, 1, 2])
def test_what_image_tokens_are_behind_the_exit_is_read_by_nobody(exit_layer):
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    with steer(tiny.model, exit_layer) as session:
        expected = text_logits(tiny.model, inputs)
        torch.testing.assert_close(noisy_logits(tiny, inputs, exit_layer + 1), expected, atol=1e-5, rtol=1e-5)
        assert (noisy_logits(tiny, inputs, exit_layer) - expected).abs().max() > 1e-3, "up to the exit the image is seen"
        assert session.applied == 3 * (3 - exit_layer)


def test_earlier_exits_change_more_layers():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    found = []
    for layer in (0, 1, 2):
        with steer(tiny.model, layer) as session:
            found.append(text_logits(tiny.model, inputs))
            assert {s for s in session.stats[SLUG]} == {s.name for s, _ in modules(tiny.model) if s.layer > layer}
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(found, found[1:]))


def test_videos_leave_too():
    tokens = TokenMap(
        1, 6, 6, {"image": torch.tensor([[0, 1, 0, 0, 0, 0]]).bool(), "video": torch.tensor([[0, 0, 0, 1, 1, 0]]).bool()}
    )
    zeros = torch.zeros(1, 2, 6, 8)
    edit = recipe(SLUG, exit_layer=0).hide(Call(zeros, zeros, zeros, tokens=tokens, clock=Clock("prefill")))
    assert edit.bias[0, 0].tolist() == [0, -1e4, 0, -1e4, -1e4, 0]


# -- ways to run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_as_fully(dtype):
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    tiny.model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with steer(tiny.model) as session:
        expected = text_logits(tiny.model, inputs)
        assert torch.equal(noisy_logits(tiny, inputs, 2), expected) and expected.isfinite().all()
        assert (noisy_logits(tiny, inputs, 1) - expected).abs().max() > 1e-2
        assert session.applied == 3 * 2


# -- what is refused -----------------------------------------------------------------------------------------------------------


def test_the_first_layer_of_a_model_that_adds_images_again():
    with pytest.raises(UnsupportedError, match="exit_layer must be 1 or more"):
        steer(tiny_models.build("qwen3_vl").model, exit_layer=0)


def test_states_that_hold_the_image_cannot_be_hidden():
    """Qwen 3.5: its linear attention carries the image on in a state."""
    import transformers

    text = {k: v for k, v in tiny_models.TEXT.items() if k != "bos_token_id"}
    text |= {"layer_types": ["full_attention", "full_attention", "linear_attention", "full_attention"]}
    config = transformers.Qwen3_5Config(text_config=text, vision_config={"depth": 1, "hidden_size": 16, "out_hidden_size": 32})
    with torch.device("meta"):
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match="layer 2 of .* no softmax attention"):
        steer(model)
    assert recipe(SLUG, exit_layer=2).supports(sites(model)).ok


# -- profiling -----------------------------------------------------------------------------------------------------------------


def test_profile(tmp_path):
    """Agreement and loss per layer as teacher forcing says them, and the smallest layer that is good enough."""
    tiny = tiny_models.llava()
    samples = [tiny.inputs([[1, *turn("image", *text)]]) for text in (WHAT, HOW, [8, 9, 10, 20])]
    options = {"answer_tokens": 4, "agreement": 0.0, "loss_ratio": 100.0}
    learned = recipe_class(SLUG).profile(tiny.model, None, samples=samples, **options)
    same, loss, plain = torch.zeros(3), torch.zeros(3), 0.0
    for inputs in samples:
        ids = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer = ids[0, -4:]

        def read(whole=whole, answer=answer):
            with torch.no_grad():
                logits = tiny.model(**whole).logits[0, -5:-1]
            return int((logits.argmax(dim=-1) == answer).sum()), torch.nn.functional.cross_entropy(
                logits, answer, reduction="sum"
            )

        plain += read()[1]
        for layer in range(3):
            with steer(tiny.model, layer):
                right, lost = read()
            same[layer] += right / 12
            loss[layer] += lost
    torch.testing.assert_close(learned.tensors["agreement"], same)
    torch.testing.assert_close(learned.tensors["loss_ratio"], loss / plain, atol=1e-5, rtol=1e-4)
    assert (
        learned.tensors["layers"].tolist() == [0, 1, 2]
        and int(learned.tensors["exit_layer"]) == 0 == learned.facts["exit_layer"]
    )
    strict = {**options, "loss_ratio": float((loss / plain)[1:].min()) + 1e-4}
    chosen = recipe_class(SLUG).profile(tiny.model, None, samples=samples, layers=[2, 1], **strict)
    assert int(chosen.tensors["exit_layer"]) == 1 + int((loss / plain)[1:].argmin())
    path = str(chosen.save(tmp_path / "exit.safetensors"))
    inputs = tiny.inputs(PROMPTS)
    with steer(tiny.model, int(chosen.tensors["exit_layer"])):
        expected = text_logits(tiny.model, inputs)
    with reattend.apply(tiny.model, SLUG, profile_path=path) as session:
        assert torch.equal(text_logits(tiny.model, inputs), expected)
        assert session.applied == 3 - int(chosen.tensors["exit_layer"])
    with pytest.raises(ReattendError, match="made for another model"):
        reattend.apply(tiny_models.build("qwen2_vl").model, SLUG, profile_path=path)


def test_profiling_says_what_is_wrong():
    tiny, learn = tiny_models.llava(), recipe_class(SLUG).profile
    samples = [tiny.inputs([ONE])]
    with pytest.raises(ReattendError, match="samples are needed"):
        learn(tiny.model, None)
    with pytest.raises(ReattendError, match="takes samples, layers"):
        learn(tiny.model, None, samples=samples, top=3)
    with pytest.raises(ReattendError, match="layers must name some of 0 to 2"):
        learn(tiny.model, None, samples=samples, layers=[3])
    with pytest.raises(ReattendError, match="agreement between 0 and 1"):
        learn(tiny.model, None, samples=samples, agreement=2)
    with pytest.raises(ReattendError, match="no exit layer of .* the best"):
        learn(tiny.model, None, samples=samples, answer_tokens=1, loss_ratio=1e-6)
    with pytest.raises(ReattendError, match="cross-attention"):
        learn(tiny_models.mllama().model, None, samples=samples)
    with pytest.raises(ReattendError, match="every sample needs an image"):
        learn(tiny.model, None, samples=[tiny.inputs([NONE])])
    with pytest.raises(ReattendError, match="plain model"), steer(tiny.model):
        learn(tiny.model, None, samples=samples)
    assert learn(tiny_models.build("qwen3_vl").model, None, samples=[tiny_models.build("qwen3_vl").inputs([ONE])], answer_tokens=1,
                 agreement=0, loss_ratio=1e6).tensors["layers"].tolist() == [1, 2]  # fmt: skip
