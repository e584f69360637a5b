"""Negative texts inside attention (nag, vsf): pipelines of every family, several prompts and pictures, long prompts, ControlNets."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import reattend
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from examples.nag import saved
from reattend.hooks.prompts.second_text import encoded
from reattend.interventions import UnsupportedError
from tiny_denoisers import build, noise, unet
from tiny_prompts import FAMILIES, flow, gemma, gemma_tokenizer, t5, t5_tokenizer
from tiny_runs import seeded, stable_diffusion, stable_diffusion_3
from torch import Tensor

METHODS = {
    "nag": {"scale": 8.0, "limit": 10.0, "strength": 1.0},
    "vsf": {"scale": 8.0, "offset": -0.5},
}
REFUSED = {
    ("vsf", "Lumina2"): "lays out the text of each sample by its length",
    ("vsf", "CogVideoX"): "has places for 16 text tokens",
}
methods = pytest.mark.parametrize("slug", METHODS)
NEAR = {"atol": 2e-4, "rtol": 1e-3}


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    given = {"num_inference_steps": 2, "generator": seeded(), "output_type": "latent", **call, **more}
    return pipe(**given)[0]


def push(pipe: Any, slug: str, **more: Any) -> Any:
    return reattend.apply(pipe, slug, **{**METHODS[slug], **more})


@methods
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_and_reads_a_negative_text(slug, guided, family):
    """As its pipeline encodes a prompt, with guidance and without: counted at each site and step, and nothing is left of it."""
    pipe, call = FAMILIES[family]()
    given = {"prompt": "a red circle", **call}
    if family in ("QwenImage", "Flux"):
        guidance = {"true_cfg_scale": 2.0, "negative_prompt": "a sky"} if guided else {"true_cfg_scale": 1.0}
    else:
        guidance = {} if guided else {"guidance_scale": 1.0}
    base = draw(pipe, given, **guidance)
    said = REFUSED.get((slug, family))
    if said:
        with pytest.raises(UnsupportedError, match=said):
            push(pipe, slug, negative="a blue square")
        return
    with push(pipe, slug, negative="a blue square") as session:
        got = draw(pipe, given, **guidance)
    (counts,) = session.stats.values()
    assert set(counts.values()) == {2} and got.isfinite().all()
    assert (got - base).abs().max() > 1e-4 * base.abs().max() and torch.equal(draw(pipe, given, **guidance), base)


def consistency() -> tuple[Any, dict[str, Any]]:
    """A distilled UNet that is told its guidance."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = {**stable_diffusion()[0].components, "unet": unet(cross_attention_dim=16, time_cond_proj_dim=8)[0].eval()}
    parts["scheduler"] = LCMScheduler()
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False), {"guidance_scale": 8.5}


def sana_sprint() -> tuple[Any, dict[str, Any]]:
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8, guidance_embeds=True,
    )  # fmt: skip
    pipe = SanaSprintPipeline(gemma_tokenizer(), gemma(), None, transformer.eval(), SCMScheduler())
    return pipe, {"height": 256, "width": 256, "max_sequence_length": 40, "use_resolution_binning": False}


def chroma() -> tuple[Any, dict[str, Any]]:
    """Its mask of the text goes on with the image's tokens."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipe = ChromaPipeline(flow(), None, t5(), t5_tokenizer(), transformer.eval())
    return pipe, {"height": 16, "width": 16, "max_sequence_length": 16, "guidance_scale": 1.0}


@methods
@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed")  # Chroma's own import
@pytest.mark.parametrize("make", [consistency, sana_sprint, chroma])
def test_distilled_models_and_other_masks(slug, make):
    torch.manual_seed(0)
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": ["a red circle", "a sky"], **call}
    base = draw(pipe, call)
    with push(pipe, slug, negative=["a blue square", "a"]) as session:
        got = draw(pipe, call)
    assert set(session.stats[slug].values()) == {2} and got.isfinite().all()
    assert ((got - base).flatten(1).abs().amax(dim=1) > 1e-4).all() and torch.equal(draw(pipe, call), base)


@methods
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_one_negative_text_per_prompt_and_several_pictures(slug, guidance, make):
    """Each picture is that of its prompt and its negative text alone."""
    pipe, call, part, _ = make(guidance=guidance)
    channels, size = (getattr(pipe, part).config[name] for name in ("in_channels", "sample_size"))
    latents = torch.randn(4, channels, size, size, generator=seeded())
    call = {**call, "height": None, "width": None}
    prompts, negatives = ["a fox", "a map"], ["a dog", "large trees"]
    with push(pipe, slug, negative=negatives):
        together = draw(pipe, call, prompt=prompts, num_images_per_prompt=2, latents=latents)
    for number in (0, 1):
        with push(pipe, slug, negative=negatives[number]):
            part = latents[2 * number : 2 * number + 2]
            alone = draw(pipe, call, prompt=prompts[number], num_images_per_prompt=2, latents=part)
        torch.testing.assert_close(together[2 * number : 2 * number + 2], alone, **NEAR)


@methods
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_a_prompt_longer_than_the_negative_text(slug, make):
    """Prompts of several chunks come as embeddings."""
    pipe, call, _, _ = make(guidance=1.0)
    names = [
        name for name in ("prompt_embeds", "pooled_prompt_embeds") if make is stable_diffusion_3 or name == "prompt_embeds"
    ]
    encoded = pipe.encode_prompt(
        "a fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
        **({"prompt_2": None, "prompt_3": None} if make is stable_diffusion_3 else {}),
    )  # fmt: skip
    given = dict(zip(names, (encoded[0], encoded[2] if len(names) > 1 else None), strict=False))
    given["prompt_embeds"] = given["prompt_embeds"].repeat(1, 2, 1)
    call = {name: value for name, value in call.items() if name != "prompt"} | given | {"num_images_per_prompt": 1}
    base = draw(pipe, call)
    with push(pipe, slug, negative="a dog"):
        got = draw(pipe, call)
    assert (got - base).abs().max() > 1e-4 and got.isfinite().all()


@methods
def test_a_controlnet_reads_the_prompt_alone(slug):
    base = stable_diffusion()[0]
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(base.unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a fox", "image": torch.rand(1, 3, 16, 16, generator=seeded())}
    seen: list[int] = []
    hook = net.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    before = draw(pipe, call)
    with push(pipe, slug, negative="a dog") as session:
        got = draw(pipe, call)
    hook.remove()
    assert len(set(seen)) == 1 and (got - before).abs().max() > 1e-4
    assert all("controlnet" not in name for name in session.stats[slug])


RESIDUALS = {
    "SD3Transformer2DModel": lambda: {"block_controlnet_hidden_states": [noise(2, 16, 16)]},
    "FluxTransformer2DModel": lambda: {
        "controlnet_block_samples": [noise(2, 16, 16)], "controlnet_single_block_samples": [noise(2, 16, 16)]
    },
}  # fmt: skip


@methods
@pytest.mark.parametrize("name", RESIDUALS)
def test_what_a_controlnet_adds_goes_with_its_rows(slug, name):
    """Joint denoisers: a row of the second text has what the row it is tied to has."""
    model, inputs = build(name)
    inputs |= RESIDUALS[name]()
    negative = {"prompt_embeds": torch.randn(1, 5, 8), "pooled_prompt_embeds": torch.randn(1, 8)}
    with torch.no_grad(), push(model, slug, tensors=saved(f"{slug} {name} control", negative)):
        both = model(**inputs)[0]
        for row in (0, 1):
            one = {
                k: v[row : row + 1] if isinstance(v, Tensor) and k not in ("img_ids", "txt_ids") else v
                for k, v in inputs.items()
            }
            one |= {k: [t[row : row + 1] for t in v] for k, v in inputs.items() if isinstance(v, list)}
            torch.testing.assert_close(model(**one)[0][0], both[row], **NEAR)


NOTHING = {
    # away from itself; and out of sight, without the copy that stays in the prompt
    "nag": {"negative": "a fox"},
    "vsf": {"negative": "a dog", "offset": 60.0, "text_rows": "script"},
}


@methods
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_a_push_that_nobody_sees_says_so(slug, make):
    pipe, call, _, _ = make(guidance=1.0)
    call = {**call, "prompt": "a fox", "num_images_per_prompt": 1}
    base = draw(pipe, call)
    with pytest.warns(reattend.ReattendWarning, match=f"{slug}' changed nothing visible.*of attention's output"):  # noqa: SIM117
        with push(pipe, slug, **NOTHING[slug]) as session:
            torch.testing.assert_close(draw(pipe, call), base, **NEAR)
    assert session.changes[slug] < 1e-4


@methods
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
@pytest.mark.filterwarnings("error:.*changed nothing visible")
def test_how_much_a_push_changes_is_that_of_its_first_pass(slug, make):
    """It is measured once at each site, and changes no bit of the picture."""
    pipe, call, _, _ = make(guidance=1.0)
    with push(pipe, slug, negative="a dog") as session:
        first = draw(pipe, call)
        ((label, change),) = session.changes.items()
        assert label == slug and 1e-2 < change < 100
        assert torch.equal(draw(pipe, call), first) and session.changes == {slug: change}


@methods
@pytest.mark.filterwarnings("ignore:.*uncompiled")
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_a_wrapped_denoiser_is_read_as_what_it_wraps(slug, make):
    pipe, call, name, _ = make(guidance=1.0)
    with push(pipe, slug, negative="a dog"):
        wanted = draw(pipe, call)
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    with push(pipe, slug, negative="a dog") as session:
        assert torch.equal(draw(pipe, call), wanted)
    assert session.applied


def together(pipe: Any, call: dict[str, Any], *recipes: Any) -> Tensor:
    with reattend.apply(pipe, *recipes):
        return draw(pipe, call)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_second_texts_beside_each_other_whatever_the_order(make):
    """Each finds its own tokens, and a text that stands after the prompt is part of the prompt of one that does not."""
    pipe, call, _, _ = make(guidance=1.0)
    nag = ("nag", {**METHODS["nag"], "negative": "a dog"})
    first, second = (("vsf", {**METHODS["vsf"], "negative": text}) for text in ("a map of trees", "dog"))
    assert torch.equal(together(pipe, call, nag, first), together(pipe, call, first, nag))
    assert (together(pipe, call, nag, first) - together(pipe, call, nag)).abs().max() > 1e-3
    unseen = ("vsf", {**NOTHING["vsf"], "negative": "a map"})
    torch.testing.assert_close(together(pipe, call, nag, unseen), together(pipe, call, nag), **NEAR)
    both = together(pipe, call, first, second)
    torch.testing.assert_close(both, together(pipe, call, second, first), **NEAR)
    torch.testing.assert_close(together(pipe, call, first, unseen), together(pipe, call, first), **NEAR)
    torch.testing.assert_close(together(pipe, call, unseen, first), together(pipe, call, first), **NEAR)
    for alone in (first, second):
        assert (both - together(pipe, call, alone)).abs().max() > 1e-3


@pytest.mark.parametrize("length", [3, 40])
def test_a_negative_text_of_another_length_beside_tokens_after_the_prompt(length):
    """Joint attention: what fills up the shorter one of two texts comes after these tokens too."""
    model, inputs = build("SD3Transformer2DModel")
    torch.manual_seed(0)
    texts = [
        saved(f"{n} beside", {"prompt_embeds": torch.randn(1, n, 8), "pooled_prompt_embeds": torch.randn(1, 8)})
        for n in (length, 4)
    ]
    nag, unseen = ("nag", {**METHODS["nag"], "tensors": texts[0]}), {"tensors": texts[1], "offset": 60.0, "text_rows": "script"}
    with torch.no_grad():
        with reattend.apply(model, nag):
            wanted = model(**inputs)[0]
        for recipes in ([nag, ("vsf", unseen)], [("vsf", unseen), nag]):
            with reattend.apply(model, *recipes):
                torch.testing.assert_close(model(**inputs)[0], wanted, **NEAR)
        with reattend.apply(model, nag, ("vsf", {**unseen, "offset": -0.5})):
            assert (model(**inputs)[0] - wanted).abs().max() > 1e-3


@methods
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_a_file_with_a_mask_is_the_text_that_it_holds(slug, make):
    """Also where the model is given no mask of its prompt."""
    pipe, call, _, _ = make(guidance=1.0)
    found = encoded(pipe, ["a dog"])
    assert found.words is not None and not found.words.all()
    held = {"prompt_embeds": found.embeds, "prompt_attention_mask": found.words.long()}
    if found.pooled is not None:
        held["pooled_prompt_embeds"] = found.pooled
    with push(pipe, slug, negative="a dog"):
        wanted = draw(pipe, call)
    with push(pipe, slug, tensors=saved(f"{slug} {make.__name__} mask", held)):
        torch.testing.assert_close(draw(pipe, call), wanted, **NEAR)


TEXT = {"prompt_embeds": torch.randn(1, 4, 8, generator=seeded())}


@methods
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt_embeds": torch.ones(1, 4, 8, dtype=torch.long)}, "prompt_embeds must hold floating-point numbers.*int64"),
        ({"prompt_embeds": torch.full((1, 4, 8), torch.nan)}, "prompt_embeds must hold finite numbers"),
        ({**TEXT, "pooled_prompt_embeds": torch.full((1, 8), torch.inf)}, "pooled_prompt_embeds must hold finite numbers"),
        (
            {**TEXT, "pooled_prompt_embeds": torch.ones(1, 8, dtype=torch.int32)},
            "pooled_prompt_embeds must hold floating-point",
        ),
        ({**TEXT, "prompt_attention_mask": torch.full((1, 4), torch.nan)}, "prompt_attention_mask must hold finite numbers"),
    ],
)
def test_numbers_that_are_no_text(slug, wrong, said):
    model, _ = build("UNet2DConditionModel")
    with pytest.raises(reattend.ReattendError, match=said):
        push(model, slug, tensors=saved(f"{slug} {said[:30]}", wrong))


@methods
def test_a_text_goes_to_the_device_of_the_running_call(slug, monkeypatch):
    """It is not looked for once more, in all modules of the pipeline."""
    pipe, call, _, _ = stable_diffusion(guidance=1.0)
    asked: list[int] = []
    home = type(pipe)._execution_device.fget
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: asked.append(1) or home(self)))
    draw(pipe, call)
    alone = len(asked)
    with push(pipe, slug, negative="a dog"):
        draw(pipe, call)
    assert alone and len(asked) == 2 * alone


@methods
@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3])
def test_without_a_text_of_its_own_a_recipe_says_so(slug, make):
    pipe, call, _, _ = make(guidance=1.0)
    negatives = "a dog" if make is stable_diffusion_3 else ["a dog", "a dog"]
    base = draw(pipe, call)

    def said(recipe: dict[str, Any], **more: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", reattend.ReattendWarning)
            with reattend.apply(pipe, slug, **recipe):
                got = [draw(pipe, call, **more) for _ in range(2)]
        assert torch.equal(*got) and (slug == "nag" or recipe or torch.equal(got[0], base))
        return [str(each.message) for each in seen if "changed nothing visible" not in str(each.message)]

    unread = [line for line in said({}, negative_prompt=negatives) if "nobody reads its negative_prompt" in line]
    assert len(unread) == 1 and "name the text as negative" in unread[0]
    idle = [line for line in said({}) if "never acted" in line]
    assert len(idle) == (slug == "vsf") and all("no text: name one as negative" in line for line in idle)
    assert not said({"negative": "a dog"}, negative_prompt=negatives)
    if slug == "nag":
        assert not said({}, negative_prompt=negatives, guidance_scale=4.0) and not said({})


@methods
def test_a_modular_pipeline_is_told_of_its_guider(slug):
    from tiny_modular import sdxl

    with pytest.raises(
        UnsupportedError, match="give the second text as tensors.*or set the guider reattend.guiders.NAGGuidance"
    ):
        push(sdxl()[0], slug, negative="a dog")
