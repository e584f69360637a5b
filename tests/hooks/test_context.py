"""The context door: what a site is handed of a second text is what the model makes of it, and rows of it are as in a hand-written loop."""

import gc
import types

import pytest
import reattend
import torch
from reattend.hooks import Context, Edits, Guide, Plan, attach, sites
from reattend.hooks.prompts.second_text import encoded
from reattend.interventions import Extrapolate, HeadGain, MixValue, ReattendError, Second, TakeOutput, UnsupportedError
from tiny_denoisers import DENOISERS, build
from tiny_llama import tiny_llama, traces
from tiny_runs import STEPS, draw, flux, pixart_alpha, seeded, stable_diffusion, stable_diffusion_3
from tiny_streams import STREAMS
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.filterwarnings("ignore:recipe .* never acted")
CROSS = [
    "UNet2DConditionModel", "UNetMotionModel", "PixArtTransformer2DModel", "SanaTransformer2DModel", "LTXVideoTransformer3DModel",
    "WanTransformer3DModel", "WanTransformer3DModel (image)", "UNet3DConditionModel",
]  # fmt: skip
JOINT = ["SD3Transformer2DModel", "SD3Transformer2DModel (3.5)", "FluxTransformer2DModel"]


def reading(model):
    table = sites(model).stack("denoiser")
    return table.kind("cross") if len(table.kind("cross")) else table.kind("joint")


def second(inputs, texts=1, seed=5):
    """A second text for these inputs, as tensors."""
    torch.manual_seed(seed)
    own = inputs["encoder_hidden_states"]
    tensors = {"prompt_embeds": torch.randn(texts, *own.shape[1:])}
    if "pooled_projections" in inputs:
        tensors["pooled_prompt_embeds"] = torch.randn(texts, inputs["pooled_projections"].shape[1])
    return tensors


def session(model, use, **given):
    return attach(model, [Plan("second", [Context("second", reading(model), use, **given)])])


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs)[0]


def operands(model, inputs):
    """{site: (key, value)} of a plain pass."""
    found = {}

    def note(call):
        found[call.site.name] = (call.key.clone(), call.value.clone())

    with attach(model, [Plan("note", [Edits(reading(model), note)])]):
        predict(model, inputs)
    return found


# -- cross-attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSS)
def test_keys_and_values_are_those_that_the_model_makes_of_the_text(name):
    model, inputs = build(name, among={**DENOISERS, **STREAMS})
    tensors, found = second(inputs), {}

    def use(call, text):
        found[call.site.name] = text
        return Second(key=text.key, value=text.value, mask=text.mask, combine=0.5)

    base, before = predict(model, inputs), traces(model)
    with session(model, use, tensors=tensors) as at_work:
        pushed = predict(model, inputs)
    rows = inputs["encoder_hidden_states"].shape[0]
    wanted = operands(model, {**inputs, "encoder_hidden_states": tensors["prompt_embeds"].expand(rows, -1, -1)})
    assert list(found) == list(wanted) and set(at_work.stats["second"].values()) == {1}
    for place, (key, value) in wanted.items():
        torch.testing.assert_close(found[place].key[0], key[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[place].value[0], value[0], atol=1e-5, rtol=1e-5)
    assert (pushed - base).abs().max() > 1e-3 and traces(model) == before and torch.equal(predict(model, inputs), base)


def test_they_are_made_once_a_run_by_whatever_stands_there():
    """A projection that was put in the place of another one, as adapters are; three steps, one projection."""
    pipe, call, _, _ = stable_diffusion()
    ran, table = [], reading(pipe)

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, text):
            ran.append(text.shape[0])
            return self.inner(text) + text.mean(dim=-1, keepdim=True)

    module = table.module(table[0])
    module.to_k = Adapted(module.to_k)
    found = []
    with session(pipe, lambda at, text: found.append((at.site.name, text.key)), texts="a dog"):
        draw(pipe, call)
        draw(pipe, call)
    # each step's own text, and in each run the prompt's once more and the second one
    assert ran == 2 * [4, 4, 1, *[4] * (STEPS - 1)]
    text = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    wanted = module.to_k(text).unflatten(2, (table[0].num_heads, -1)).transpose(1, 2)
    for key in (key for name, key in found if name == table[0].name):
        torch.testing.assert_close(key, wanted)


def test_other_rows_keep_their_bits_and_masks_hide_padding():
    model, inputs = build("PixArtTransformer2DModel")
    tensors, seen = second(inputs), []
    mask = torch.tensor([[1, 1, 0, 0, 0]])

    def use(call, text):
        call.then.append(lambda output: seen.append((call, text, output)))
        return Second(key=text.key, value=text.value, mask=text.mask, rows=torch.tensor([[False], [True]]))

    with session(model, use, tensors={**tensors, "prompt_attention_mask": mask}):
        predict(model, inputs)
    call, text, output = seen[0]
    assert text.mask.tolist() == [[[[True, True, False, False, False]]]]
    wanted = torch.nn.functional.scaled_dot_product_attention(call.query, text.key[:, :, :2], text.value[:, :, :2])
    torch.testing.assert_close(output[1], wanted[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(output[0], call.original()[0])


@pytest.mark.parametrize("texts", [["a dog"], ["a dog", "a cat"]], ids=["one text", "one per prompt"])
def test_each_row_has_its_prompts_text(texts):
    """Two prompts, two images each, classifier-free guidance and a further guide's branch."""
    pipe, call, _, _ = stable_diffusion(images=2)
    found = []
    steps = [Context("second", reading(pipe), lambda at, text: found.append((at, text)), texts=texts), Guide("further", 1.0)]
    with attach(pipe, [Plan("second", steps)]):
        draw(pipe, call)
    keys = []
    for text in texts:
        with session(pipe, lambda at, given: keys.append(given.key), texts=text):
            draw(pipe, call, num_inference_steps=1)
    first = [keys[0], keys[len(keys) // len(texts)]] if len(texts) == 2 else keys[:1]
    at, text = found[0]
    assert at.batch == 12  # [negative, prompts, copies], each two prompts twice
    if len(texts) == 1:
        assert text.key.shape[0] == 1
        torch.testing.assert_close(text.key, first[0])
    else:
        for row in range(12):
            torch.testing.assert_close(text.key[row], first[row % 4 // 2][0])


def test_a_text_is_encoded_with_the_settings_of_the_run():
    pipe, call, _, _ = stable_diffusion_3()
    lengths = []

    def use(at, text):
        lengths.append(at.num_keys)

    with session(pipe, use, texts="a dog"):
        draw(pipe, call, max_sequence_length=20, num_inference_steps=1)
        draw(pipe, call, max_sequence_length=12, num_inference_steps=1)
    assert [lengths[0] - n for n in lengths] == [0, 0, 0, 8, 8, 8]  # the texts of both are as long


def test_later_steps_may_take_gradients():
    model, inputs = build("UNet2DConditionModel")
    with session(model, lambda call, text: Second(key=text.key, value=text.value, combine=0.5), tensors=second(inputs)):
        with torch.inference_mode():
            model(**inputs)
        sample = inputs["sample"].clone().requires_grad_()
        model(**{**inputs, "sample": sample})[0].sum().backward()
    assert sample.grad.isfinite().all() and sample.grad.abs().sum() > 0


# -- joint attention --------------------------------------------------------------------------------------------------


def push(call, text):
    """The image rows move away from what they read in the second text."""
    image, second = call.query_rows("image"), text.rows[:, None]
    tied = (text.partner != torch.arange(call.batch))[:, None]
    return [
        Extrapolate(other=text.partner, factor=4.0, limit=9.0, strength=0.5, rows=image & tied & ~second),
        TakeOutput(batch=text.partner, rows=image & second),
    ]


class ByHand(TorchFunctionMode):
    """The same for a batch of prompts and second texts, n rows each: what attention gives is pushed before anybody sees it."""

    def __init__(self, n, image):
        super().__init__()
        self.n, self.image = n, image

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention and output.shape[2] > 16:
            image = output[:, :, self.image]
            z, other = image[: self.n], image[self.n :]
            away = 4 * z - 3 * other
            size, grown = (t.abs().sum(dim=(1, 3), keepdim=True) for t in (z, away))
            pushed = 0.5 * away * ((grown / size).clamp_max(9.0) / (grown / size)) + 0.5 * z
            output = output.clone()
            output[:, :, self.image] = torch.cat([pushed, pushed])
        return output


@torch.no_grad()
def by_hand(model, inputs, tensors, image):
    """Prompts and second texts in one batch; the image tokens of the second half are those of the first one."""
    n = inputs["hidden_states"].shape[0]

    def tie(module, args, kwargs):
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": torch.cat([hidden[:n], hidden[:n]])}

    blocks = [block.attn for block in model.transformer_blocks]
    blocks += list(getattr(model, "single_transformer_blocks", []))[:1]
    hooks = [block.register_forward_pre_hook(tie, with_kwargs=True) for block in blocks]
    shared = ("img_ids", "txt_ids")
    given = {name: value if name in shared else torch.cat([value, value]) for name, value in inputs.items()}
    given["encoder_hidden_states"][n:] = tensors["prompt_embeds"]
    given["pooled_projections"][n:] = tensors["pooled_prompt_embeds"]
    with ByHand(n, image):
        output = model(**given)[0][:n]
    for hook in hooks:
        hook.remove()
    return output


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("name", [*JOINT, "FluxTransformer2DModel (Kontext)"])
def test_rows_of_a_second_text_are_those_of_a_hand_written_loop(name, texts):
    model, inputs = build(name, among={**DENOISERS, **STREAMS})
    tensors = second(inputs, texts)
    # of the editing model two images stand after the one that is made
    image = slice(5, 29) if "Kontext" in name else slice(5, None) if name.startswith("Flux") else slice(0, 16)
    base, before = predict(model, inputs), traces(model)
    with session(model, push, tensors=tensors) as at_work:
        pushed = predict(model, inputs)
    torch.testing.assert_close(pushed, by_hand(model, inputs, tensors, image), atol=2e-5, rtol=1e-4)
    assert (pushed - base).abs().max() > 1e-3
    assert at_work.stats == {"second": {site.name: 1 for site in reading(model)}}
    assert traces(model) == before and torch.equal(predict(model, inputs), base)


@pytest.mark.parametrize("name", JOINT)
def test_rows_that_nobody_pushes_change_nothing(name):
    """The second text's rows run beside the prompt's, and leave no trace in them."""
    model, inputs = build(name)
    seen = []
    with session(model, lambda call, text: seen.append((call.batch, text)), tensors=second(inputs)):
        got = predict(model, inputs)
    torch.testing.assert_close(got, predict(model, inputs), atol=1e-6, rtol=1e-5)
    assert got.shape[0] == 2 and all(batch == 4 for batch, _ in seen)
    assert all(text.partner.tolist() == [2, 3, 0, 1] and text.rows.tolist() == [False, False, True, True] for _, text in seen)


@pytest.mark.parametrize("length", [3, 8])
@pytest.mark.parametrize("name", [*JOINT, "QwenImageTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_a_text_of_its_own_length_in_joint_attention(name, length):
    """The shorter text is filled up, and nobody sees what fills it: each row sees the image and its own text."""
    model, inputs = build(name)
    tensors, found = second(inputs), []
    tensors["prompt_embeds"] = torch.randn(1, length, 8)
    base = predict(model, inputs)

    def use(call, text):
        call.then.append(lambda output: found.append((call, text, output)))
        return HeadGain(factor=torch.ones(1, 1))

    with session(model, use, tensors=tensors):
        got = predict(model, inputs)
    torch.testing.assert_close(got, base, atol=2e-5, rtol=1e-4)
    assert found and torch.equal(predict(model, inputs), base)
    for call, text, output in found:
        image = call.columns("image")
        own = (image | call.columns("text") | call.columns("padding")).clone()
        stream = own & ~image
        own &= ~(stream & (stream.cumsum(dim=1) > torch.where(text.rows, length, 5)[:, None]))
        for row in (2, 3):
            seen = own[row]
            assert int(seen.sum()) == int(image[row].sum()) + length
            wanted = torch.nn.functional.scaled_dot_product_attention(
                call.query[row], call.key[row][:, seen], call.value[row][:, seen]
            )
            torch.testing.assert_close(output[row][:, image[row]], wanted[:, image[row]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [stable_diffusion_3, flux], ids=["one batch", "two calls"])
def test_pipelines(make):
    """Guidance in one batch and in two calls: rows of the second text stand beside the conditional ones alone."""
    pipe, call, _, guidance = make()
    batches = []

    def use(at, text):
        if at.site.layer == 0 and at.site.stack != "denoiser.single":
            batches.append((at.batch, at.clock.source.tolist()))
        return push(at, text)

    torch.manual_seed(1)
    given = {"texts": "a dog"}
    if make is flux:
        given = {"tensors": {"prompt_embeds": torch.randn(2, 5, 8), "pooled_prompt_embeds": torch.randn(2, 8)}}
    base = draw(pipe, call)
    with session(pipe, use, **given) as at_work:
        pushed = draw(pipe, call)
        assert torch.equal(draw(pipe, call), pushed)
    assert set(at_work.stats["second"].values()) == {2 * STEPS} and (pushed - base).abs().max() > 1e-3
    assert batches == 2 * STEPS * [(3, [0, 1, 1]) if make is stable_diffusion_3 else (4, [0, 1, 0, 1])]
    assert torch.equal(draw(pipe, call), base)


def test_sd3_encodes_both_of_its_texts():
    pipe, call, _, _ = stable_diffusion_3()
    embeds, _, pooled, _ = pipe.encode_prompt("a dog", None, None, "cpu", 1, False)
    found = encoded(pipe, ["a dog"])
    assert torch.equal(found.embeds, embeds) and torch.equal(found.pooled, pooled) and found.mask is None
    with session(pipe, push, texts="a dog"):
        by_text = draw(pipe, call)
    with session(pipe, push, tensors={"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}):
        assert torch.equal(draw(pipe, call), by_text)


# -- after the prompt, in the same stream -----------------------------------------------------------------------------

AFTER = [
    "UNet2DConditionModel",
    "PixArtTransformer2DModel",
    *JOINT,
    "AuraFlowTransformer2DModel",
    "QwenImageTransformer2DModel",
]


@pytest.mark.parametrize("name", AFTER)
def test_further_positions_are_those_of_a_longer_text(name):
    model, inputs = build(name)
    tensors, found = second(inputs, 2), []
    if name.startswith("PixArt"):
        tensors["prompt_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    longer = {**inputs, "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], tensors["prompt_embeds"]], dim=1)}
    for mask in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        if mask in inputs:
            longer[mask] = torch.cat(
                [inputs[mask], tensors.get("prompt_attention_mask", torch.ones(2, 5)).to(inputs[mask])], dim=1
            )
    if "txt_ids" in inputs:
        longer["txt_ids"] = torch.zeros(10, 3)
    if "txt_seq_lens" in inputs:
        longer["txt_seq_lens"] = [10, 10]
    base = predict(model, inputs)
    with session(model, lambda call, text: found.append((call, text.columns)), tensors=tensors, place="after"):
        got = predict(model, inputs)
    torch.testing.assert_close(got, predict(model, longer))
    assert (got - base).abs().max() > 1e-5 and torch.equal(predict(model, inputs), base)
    for call, columns in found:
        text = call.columns("text")
        assert columns.sum(dim=1).tolist() == ([3, 5] if name.startswith("PixArt") else [5, 5]) and not (columns & ~text).any()
        if call.site.kind == "joint" and not name.startswith("SD3"):
            assert not call.columns("image")[:, :10].any()


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
)
def test_rows_that_are_not_the_prompts_see_nothing_of_it(name):
    model, inputs = build(name)
    base = predict(model, inputs)
    with (
        session(model, lambda call, text: None, tensors=second(inputs), place="after"),
        reattend.rows("unconditional", "conditional"),
    ):
        got = predict(model, inputs)
    torch.testing.assert_close(got[0], base[0], atol=1e-5, rtol=1e-4)
    assert (got[1] - base[1]).abs().max() > 1e-4


# -- part of the schedule, other sessions, restore --------------------------------------------------------------------


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_part_of_the_schedule(make):
    pipe, call, _, _ = make()
    steps = []
    with session(pipe, lambda at, text: steps.append((at.clock.step, at.batch)), texts="a dog", start=0.25, stop=0.75):
        draw(pipe, call, num_inference_steps=4)
    assert {step for step, _ in steps} == {1, 2}


def test_beside_other_sessions_and_nothing_is_left():
    pipe, call, _, _ = stable_diffusion()
    base = draw(pipe, call)
    with attach(pipe, [Plan("other", [Edits(reading(pipe), lambda at: HeadGain(factor=1.1, heads=[1]))])]):
        wanted, before = draw(pipe, call), traces(pipe.unet)
        with session(pipe, lambda at, text: Second(key=text.key, value=text.value, combine=0.5), texts="a dog"):
            assert not torch.equal(draw(pipe, call), wanted)
        assert traces(pipe.unet) == before and torch.equal(draw(pipe, call), wanted)
    assert torch.equal(draw(pipe, call), base)


def test_restored_after_an_exception():
    pipe, call, _, _ = stable_diffusion_3()
    base, before = draw(pipe, call), traces(pipe.transformer)

    def fail(at, text):
        raise ZeroDivisionError

    with session(pipe, fail, texts="a dog"), pytest.raises(ZeroDivisionError):
        draw(pipe, call)
    gc.collect()
    assert traces(pipe.transformer) == before and torch.equal(draw(pipe, call), base)


def test_beside_a_guide_that_perturbs():
    """Its branch is a copy of the prompt's rows: what it sees is pushed in no row of it."""
    pipe, call, _, _ = stable_diffusion_3()
    with session(pipe, push, texts="a dog"):
        wanted = draw(pipe, call)

    def weaken(at):
        rows = at.clock.rows("weak", at.batch)
        return None if rows is None else MixValue(strength=1.0, rows=rows[:, None])

    guide = [Edits(reading(pipe)[:1], weaken), Guide("weak", 1e-6)]
    for plans in ([Plan("weak", guide)], []):
        with attach(pipe, [*plans, Plan("second", [Context("second", reading(pipe), push, texts="a dog")])]):
            torch.testing.assert_close(draw(pipe, call), wanted, atol=1e-4, rtol=1e-3)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_apply_refuses():
    unet, inputs = build("UNet2DConditionModel")
    mochi, _ = build("MochiTransformer3DModel")
    hunyuan, _ = build("HunyuanDiT2DModel")
    sd3, joint = build("SD3Transformer2DModel")
    video, _ = build("UNetSpatioTemporalConditionModel", among=STREAMS)
    ernie, _ = build("ErnieImageTransformer2DModel", among=STREAMS)
    aura, plain = build("AuraFlowTransformer2DModel")
    llama, pixart = tiny_llama(), pixart_alpha()[0]
    text = second(inputs)

    def nothing(call, text):
        return None

    for model, table, given, words in (
        (llama, sites(llama), {"tensors": text}, "brings a second text to a denoiser, and LlamaForCausalLM has none"),
        (unet, reading(unet), {"texts": "a dog"}, "is a bare denoiser and encodes no text: give the second text as tensors"),
        (pixart, reading(pixart), {"texts": "a dog"}, "has no text encoder: give the second text as tensors"),
        (
            unet,
            sites(unet).kind("self"),
            {"tensors": text},
            r"acts where a denoiser reads its prompt, and .*attn1 \(self\) does not",
        ),
        (mochi, reading(mochi), {"tensors": text}, "attends for each sample alone"),
        (hunyuan, reading(hunyuan), {"tensors": text}, "joins its text from several inputs"),
        (sd3, reading(sd3), {"tensors": text}, "reads a pooled text beside the tokens"),
        (aura, reading(aura), {"tensors": second(joint)}, "reads no pooled text: leave pooled_prompt_embeds out"),
        (unet, reading(unet), {"tensors": text, "stop": 0.5}, "a bare denoiser has none"),
        (video, reading(video), {"tensors": text}, "takes no text as encoder_hidden_states"),
        (ernie, reading(ernie), {"tensors": text}, "takes no text as encoder_hidden_states"),
        (
            sd3,
            reading(sd3)[1:],
            {"tensors": second(joint)},
            "needs all of them: transformer_blocks.0.attn is not among its sites",
        ),
        (mochi, reading(mochi), {"tensors": text, "place": "after"}, "lays out the text of each sample by its length"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            attach(model, [Plan("x", [Context("second", table, nothing, **given)])])
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in getattr(model, "modules", list)())
    for given, words in (
        ({}, "either as texts or as tensors"),
        ({"texts": "a", "tensors": text}, "either as texts or as tensors"),
        ({"texts": []}, "texts must be a text or a list of texts"),
        (
            {"tensors": {"embeds": torch.ones(1, 2, 3)}},
            "under the names prompt_embeds, pooled_prompt_embeds, prompt_attention_mask",
        ),
        ({"tensors": {"prompt_embeds": torch.ones(2, 3)}}, r"prompt_embeds must be \[texts, tokens, width\], got \[2, 3\]"),
        ({"tensors": {**text, "pooled_prompt_embeds": torch.ones(3, 8)}}, r"must be \[1, width\], as there are texts"),
        ({"tensors": {**text, "prompt_attention_mask": torch.ones(1, 4)}}, r"must be \[1, 5\], as prompt_embeds"),
        ({"texts": "a", "start": 0.5, "stop": 0.5}, "0 <= start < stop <= 1 must hold"),
        ({"texts": "a", "copies": 2}, 'copies must be 1, or more with place "after"'),
        ({"texts": "a", "place": "after", "copies": 0}, "copies must be 1"),
        ({"texts": "a", "place": "before"}, 'place must be "beside" or "after"'),
    ):
        with pytest.raises(ReattendError, match=words):
            Context("second", reading(unet), nothing, **given)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("UNet2DConditionModel", {"prompt_embeds": torch.ones(1, 5, 7)}, "are 7 wide, those of the prompt 8"),
        (
            "UNet2DConditionModel",
            {"prompt_embeds": torch.ones(3, 5, 8)},
            "3 second texts cannot be shared out to 2 rows of the prompt",
        ),
        ("SD3Transformer2DModel", {"pooled_prompt_embeds": torch.ones(1, 7)}, "are 7 wide, those of the prompt 8"),
    ],
)
def test_what_is_refused_before_the_first_layer(name, change, words):
    model, inputs = build(name)
    ran = []
    handle = next(iter(model.children())).register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        session(model, lambda call, text: None, tensors={**second(inputs), **change}),
        pytest.raises(ReattendError, match=f"^second: .*{words}"),
    ):
        predict(model, inputs)
    handle.remove()
    assert not ran


def test_a_text_of_its_own_length_in_cross_attention():
    model, inputs = build("UNet2DConditionModel")
    lengths = []
    with session(model, lambda call, text: lengths.append(text.key.shape[2]), tensors={"prompt_embeds": torch.randn(1, 9, 8)}):
        predict(model, inputs)
    assert lengths == [9] * 4


def test_keys_that_do_not_come_from_the_projections_are_noticed():
    model, inputs = build("UNet2DConditionModel")
    module = reading(model).module(reading(model)[0])

    def louder(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}

    handle = module.register_forward_pre_hook(louder, with_kwargs=True)
    with (
        session(model, lambda call, text: None, tensors=second(inputs)),
        pytest.raises(ReattendError, match="are not those that its projections give"),
    ):
        predict(model, inputs)
    handle.remove()


def test_a_pipeline_that_cannot_encode_says_so():
    pipe, call, _, _ = stable_diffusion()

    def broken(self, *args, **kwargs):
        raise ValueError("no tokenizer of this kind")

    with session(pipe, lambda at, text: None, texts="a dog"):
        embeds = pipe.encode_prompt("a fox", "cpu", 1, True)
        pipe.text_encoder.forward = types.MethodType(broken, pipe.text_encoder)
        given = {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "num_inference_steps": 1,
            "generator": seeded(),
        }
        with pytest.raises(ReattendError, match="could not encode the second text: no tokenizer of this kind"):
            pipe(**given, output_type="latent")


def test_rows_that_nobody_knows():
    model, inputs = build("UNet2DConditionModel")
    with session(model, lambda call, text: None, tensors=second(inputs)) as at_work:
        with reattend.rows("unconditional"):
            predict(model, inputs)
        with reattend.rows("neither", "conditional"):
            predict(model, inputs)
    assert at_work.applied == 0


@pytest.mark.parametrize("place", ["beside", "after"])
@pytest.mark.parametrize("images", [3, 5])
def test_calls_to_an_image_prompt_are_left_alone(place, images):
    """Also where it has as many tokens as the text, whose place after the prompt is hidden from the negative one."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    model, inputs = build("UNet2DConditionModel")
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, 8, num_tokens=(images,)))
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=8, num_image_text_embeds=images)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 8)]}
    asked = []

    def use(call, text):
        asked.append(call.num_keys)

    with session(model, use, tensors=second(inputs), place=place), reattend.rows("unconditional", "conditional"):
        predict(model, inputs)
    length = inputs["encoder_hidden_states"].shape[1] * (2 if place == "after" else 1)
    assert asked == [length] * len(reading(model))
