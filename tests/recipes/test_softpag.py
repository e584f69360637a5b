"""SoftPAG against golden data of PAG, its variants against their formulas on the materialised matrix, and its parameters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.doors.guide import away
from reattend.hooks.tokens.denoisers import read_forward
from reattend.hooks.trackers.combination import Combination
from reattend.hooks.trackers.denoising_run import Run
from reattend.hooks.trackers.guided_pass import GuidedPass, Part, settle
from reattend.interventions import (
    Call,
    Clock,
    ReattendError,
    Site,
    TokenMap,
    UnsupportedError,
    fused,
    reference,
)
from tiny_denoisers import build
from torch import Tensor

SELF = Site("mid_block.attn1", 0, "denoiser.mid", "self", 2, 2, 4, False, "sdpa")
JOINT = Site("transformer_blocks.0.attn", 0, "denoiser", "joint", 2, 2, 4, False, "sdpa")


golden = functools.partial(golden_file, "pag")


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def linear(x: Tensor, data: dict[str, Tensor], name: str) -> Tensor:
    return x @ data[f"w.{name}.weight"].T + data[f"w.{name}.bias"]


def branch_clock(batch: int, chunks: int) -> Clock:
    rows = torch.zeros(batch, dtype=torch.bool)
    rows[batch - batch // chunks :] = True
    return Clock("denoise", branches={"softpag": rows})


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("name", ["unet_selfattn_cfg", "unet_selfattn_nocfg"])
def test_whole_layer_at_full_strength_is_pag(name: str, run: Any) -> None:
    data, facts = golden(name)
    heads, chunks = int(facts["heads"]), int(facts["chunks"])
    q, k, v = (split_heads(linear(data["x"], data, f"to_{n}"), heads) for n in "qkv")
    call = Call(q, k, v, site=SELF, clock=branch_clock(len(q), chunks))
    edit = reattend.recipe("softpag", strength=1.0).weaken(None, call)
    output = linear(run(call, [edit]).transpose(1, 2).flatten(2), data, "to_out.0")
    torch.testing.assert_close(output, data["out"], atol=1e-5, rtol=0)
    plain = linear(fused(call, []).transpose(1, 2).flatten(2), data, "to_out.0")
    torch.testing.assert_close(plain, data["out_plain"], atol=1e-5, rtol=0)
    untouched = len(q) - len(q) // chunks
    assert torch.equal(fused(call, [edit])[:untouched], fused(call, [])[:untouched])


def joint_call(name: str) -> tuple[Call, dict[str, Tensor], int]:
    data, facts = golden(name)
    heads, chunks = int(facts["heads"]), int(facts["chunks"])
    parts = [
        torch.cat([split_heads(linear(data["x"], data, f"to_{n}"), heads), split_heads(linear(data["ctx"], data, t), heads)], 2)
        for n, t in (("q", "add_q_proj"), ("k", "add_k_proj"), ("v", "add_v_proj"))
    ]
    image, total = data["x"].shape[1], parts[0].shape[2]
    is_image = (torch.arange(total) < image).expand(len(parts[0]), -1)
    tokens = TokenMap(len(parts[0]), total, total, {"image": is_image, "text": ~is_image})
    return Call(*parts, site=JOINT, clock=branch_clock(len(parts[0]), chunks), tokens=tokens), data, image


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("name", ["mmdit_joint_cfg", "mmdit_joint_nocfg"])
def test_masked_scope_is_the_joint_form_of_diffusers(name: str, run: Any) -> None:
    call, data, image = joint_call(name)
    edit = reattend.recipe("softpag", strength=1.0, scope="masked").weaken(None, call)
    output = run(call, [edit]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(linear(output[:, :image], data, "to_out.0"), data["out_img"], atol=1e-5, rtol=0)
    torch.testing.assert_close(linear(output[:, image:], data, "to_add_out"), data["out_txt"], atol=1e-5, rtol=0)


def test_scopes_of_a_joint_stream() -> None:
    call, _, image = joint_call("mmdit_joint_cfg")
    plain = fused(call, [])
    for scope, rows in (("image", slice(0, image)), ("all", slice(None))):
        output = fused(call, [reattend.recipe("softpag", strength=1.0, scope=scope).weaken(None, call)])
        expected = plain.clone()
        expected[-1, :, rows] = call.value[-1, :, rows]
        torch.testing.assert_close(output, expected)


def a_call(tokens: int = 7) -> Call:
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 4, tokens, 8) for _ in range(3))
    return Call(q, k, v, site=SELF, clock=branch_clock(3, 3))


def perturbed(call: Call, **parameters: Any) -> Tensor:
    return fused(call, [reattend.recipe("softpag", **parameters).weaken([1, 3], call)])


def target(call: Call, kind: str) -> Tensor:
    scores = call.query @ call.key.transpose(2, 3) * call.scaling
    if kind == "identity":
        return torch.eye(call.num_keys).expand_as(scores)
    if kind == "uniform":
        return torch.full_like(scores, 1 / call.num_keys)
    if kind == "mean_query":
        mean = call.query.mean(dim=2, keepdim=True) @ call.key.transpose(2, 3) * call.scaling
        return mean.softmax(dim=-1).expand_as(scores)
    if kind == "argmax":
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), call.num_keys).float()
    return (scores / 2.5).softmax(dim=-1)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["identity", "uniform", "mean_query", "argmax", "temperature"])
def test_perturbations_against_their_formula(kind: str, strength: float) -> None:
    call = a_call()
    weights = (call.query @ call.key.transpose(2, 3) * call.scaling).softmax(dim=-1)
    mixed = (1 - strength) * weights + strength * target(call, kind)
    expected = weights @ call.value
    expected[2, [1, 3]] = (mixed @ call.value)[2, [1, 3]]
    output = perturbed(call, perturbation=kind, strength=strength, temperature=2.5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    plain = fused(call, [])
    assert torch.equal(output[:2], plain[:2]) and torch.equal(output[:, [0, 2]], plain[:, [0, 2]])


@pytest.mark.parametrize("kind", ["identity", "uniform", "mean_query", "argmax", "temperature"])
def test_perturbations_that_can_change_nothing(kind: str) -> None:
    call = a_call()
    call.value = call.value[:, :, :1].expand_as(call.value).contiguous()
    torch.testing.assert_close(perturbed(call, perturbation=kind, strength=0.7), fused(call, []), atol=1e-5, rtol=1e-5)
    assert torch.equal(perturbed(call, perturbation=kind, strength=0.0), fused(call, []))
    single = a_call(tokens=1)
    torch.testing.assert_close(perturbed(single, perturbation=kind), fused(single, []))
    if kind == "temperature":
        torch.testing.assert_close(perturbed(a_call(), perturbation=kind, temperature=1.0), fused(a_call(), []))


def test_linear_in_its_strength() -> None:
    call = a_call()
    none, half, full = (perturbed(call, strength=u) for u in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("name", ["combine_cfg", "combine_nocfg"])
def test_combination_is_that_of_pag(name: str, read: bool) -> None:
    """read: whether the pipeline's guidance scale could be read, so that the unconditional half takes all of the shift."""
    data, facts = golden(name)
    chunks = data["noise_pred"].chunk(3 if facts["cfg"] == "True" else 2)
    batch = sum(len(c) for c in chunks[:-1])
    branches = {"conditional": torch.arange(batch) >= batch - len(chunks[-1])}
    if len(chunks) == 3:
        branches["unconditional"] = ~branches["conditional"]
    halves = {
        half: branches[half].nonzero()[:, 0].tolist() if half in branches else [] for half in ("conditional", "unconditional")
    }
    guidance = float(facts["guidance_scale"]) if len(chunks) == 3 else 1.0
    part = Part("softpag", halves["conditional"], float(facts["pag_scale"]), away, batch)
    combination = Combination(guidance) if read else None
    guided = GuidedPass(Clock("denoise", branches=branches), [part], batch, halves, Run(), combination)
    (result,) = settle((data["noise_pred"],), guided)
    if len(chunks) == 3:
        unconditional, conditional = result.chunk(2)
        assert torch.equal(conditional, chunks[1]) == read
        result = unconditional + guidance * (conditional - unconditional)
    torch.testing.assert_close(result, data["guided"], atol=1e-5, rtol=0)


def test_golden_identity_of_guided_diffusion() -> None:
    data, facts = golden("identity_guided_diffusion")
    heads = int(facts["n_heads"])
    q, k, v = data["qkv"].unflatten(1, (heads, 3, -1)).unbind(dim=2)
    call = Call(*(x.transpose(2, 3) for x in (q, k, v)), site=SELF, clock=branch_clock(len(q), 1))
    output = fused(call, [reattend.recipe("softpag", strength=1.0).weaken(None, call)])
    torch.testing.assert_close(output.transpose(2, 3).flatten(1, 2), data["out_perturbed"], atol=1e-5, rtol=0)


# -- on whole denoisers ----------------------------------------------------------------------------------------------


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def by_hand(model: Any, inputs: dict[str, Any], layers: dict[int, Any], heads: list[int] | None, rows: str) -> Tensor:
    """The weak prediction from a run of its own: u = 0.5 of the identity in every row of the batch."""
    from reattend.interventions import MixValue

    tables = list(layers.values())
    act = [Edits(t, lambda c: MixValue(strength=0.5, heads=heads, rows=c.query_rows(rows)), outputs=True) for t in tables]
    with attach(model, [Plan("weak", list(act))]):
        return predict(model, inputs)


# the second half of their channels is a learned variance, which no guide moves
VARIANCE = ("PixArtTransformer2DModel", "HunyuanDiT2DModel")


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "UNetMotionModel", "SD3Transformer2DModel (3.5)", "FluxTransformer2DModel",
             "PixArtTransformer2DModel", "HunyuanDiT2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel",
             "AuraFlowTransformer2DModel",
             "CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel",
             "WanTransformer3DModel", "MochiTransformer3DModel", "QwenImageTransformer2DModel"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_equal_to_two_calls_on_every_denoiser(name: str) -> None:
    from reattend.recipes.kit.denoisers import default_layers, image_layers

    model, inputs = build(name)
    before = predict(model, inputs)
    table = reattend.sites(model)
    layers = {n: t for n, t in image_layers(table).items() if n in default_layers(table)}
    weak = by_hand(model, inputs, layers, None, "image")
    with reattend.apply(model, "softpag", scale=3.0) as session:
        guided = predict(model, inputs)
        assert session.applied > 0
    scale, shift = before.abs().max(), 3.0 * (before - weak)
    if name in VARIANCE:
        shift[:, before.shape[1] // 2 :] = 0
    torch.testing.assert_close(guided / scale, (before + shift) / scale, atol=1e-4, rtol=1e-4)
    assert (guided - before).abs().max() > 1e-4 * scale
    assert torch.equal(predict(model, inputs), before)


def test_single_heads() -> None:
    model, inputs = build("FluxTransformer2DModel")
    from reattend.recipes.kit.denoisers import image_layers

    before = predict(model, inputs)
    layers = image_layers(reattend.sites(model))
    assert [t[0].stack for t in layers.values()] == ["denoiser.double"] * 2 + ["denoiser.single"] * 2
    weak = by_hand(model, inputs, {3: layers[3]}, [1], "image")
    with reattend.apply(model, "softpag", heads=[(3, 1)]) as session:
        guided = predict(model, inputs)
    assert session.stats == {"softpag": {"single_transformer_blocks.1.attn": 1}}
    torch.testing.assert_close(guided, before + 5.0 * (before - weak), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", [{}, {"heads": [(1, 1)]}])
def test_difference_grows_with_the_scale(chosen: dict[str, Any]) -> None:
    model, inputs = build("SD3Transformer2DModel")
    before = predict(model, inputs)
    far = []
    for scale in (1.0, 2.0, 4.0):
        with reattend.apply(model, "softpag", scale=scale, **chosen):
            far.append((predict(model, inputs) - before).norm().item())
    assert 0 < far[0] < far[1] < far[2]


def test_a_dual_layer_of_sd35_has_a_number_and_heads_of_its_own() -> None:
    """It is of image tokens alone: there is no text to leave as it is, nor to go on seeing."""
    from reattend.recipes.kit.denoisers import image_layers

    model, inputs = build("SD3Transformer2DModel (3.5)")
    before = predict(model, inputs)
    layers = image_layers(reattend.sites(model))
    names = [[site.name for site in table] for table in layers.values()]
    assert names == [[f"transformer_blocks.{n}.attn"] for n in range(3)] + [[f"transformer_blocks.{n}.attn2"] for n in range(2)]
    weak = by_hand(model, inputs, {4: layers[4]}, [0], "image")
    for scope in ("image", "all", "masked"):
        with reattend.apply(model, "softpag", heads=[(4, 0)], scope=scope) as session:
            guided = predict(model, inputs)
        assert session.stats == {"softpag": {"transformer_blocks.1.attn2": 1}}
        torch.testing.assert_close(guided, before + 5.0 * (before - weak), atol=1e-4, rtol=1e-4)


def test_auraflow_s_registers_are_seen_as_the_text_is() -> None:
    """Scope "masked": each image token sees itself, the text, and the registers before it; text and registers see what they did."""
    from reattend.interventions import Keep
    from reattend.recipes.kit.denoisers import image_layers

    model, inputs = build("AuraFlowTransformer2DModel")
    before = predict(model, inputs)
    layers = image_layers(reattend.sites(model))

    def hide(call: Call) -> Keep:
        image = call.query_rows("image")
        assert call.tokens is not None and call.tokens.roles["register"].sum() == 8 * call.batch
        return Keep(pattern=~image[:, :, None] | ~call.columns("image")[:, None] | torch.eye(call.num_keys, dtype=torch.bool))

    for number in (1, len(layers) - 1):  # a double and a single block
        with attach(model, [Plan("by hand", [Edits(layers[number], hide)])]):
            weak = predict(model, inputs)
        with reattend.apply(model, "softpag", layers=[number], scope="masked", strength=1.0):
            guided = predict(model, inputs)
        torch.testing.assert_close(guided, before + 5.0 * (before - weak), atol=2e-4, rtol=1e-4)
        assert not torch.equal(weak, before)


def test_two_denoisers_of_one_pipeline_share_heads() -> None:
    """Wan 2.2 switches from one to the other on the way."""
    import tiny_prompts

    pipe, call = tiny_prompts.wan()
    pipe.register_modules(transformer_2=build("WanTransformer3DModel", seed=1)[0])
    pipe.register_to_config(boundary_ratio=0.5)
    call |= {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent"}

    def drawn() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    plain = drawn()
    with reattend.apply(pipe, "softpag", heads=[(1, 0)]) as session:
        guided = drawn()
    (counts,) = session.stats.values()
    assert counts == {"transformer.blocks.1.attn1": 2, "transformer_2.blocks.1.attn1": 1}
    assert not torch.equal(guided, plain) and torch.equal(drawn(), plain)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("SD3Transformer2DModel", {"layers": [3]}, "layer 3 does not exist: .* has layers 0 to 2"),
        ("SD3Transformer2DModel", {"heads": [(0, 2)]}, "head 2 does not exist: layer 0 has heads 0 to 1"),
        (
            "SanaTransformer2DModel",
            {"perturbation": "uniform"},
            "transformer_blocks.1.attn1 cannot be intercepted: .*linear attention",
        ),
        ("SD3Transformer2DModel", {"start": 0.5}, "a bare denoiser has none"),
    ],
)
def test_models_that_do_not_fit(name: str, parameters: dict[str, Any], message: str) -> None:
    model, _ = build(name)
    with pytest.raises((UnsupportedError, ReattendError), match=message):
        reattend.apply(model, "softpag", **parameters)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_at_once_are_refused() -> None:
    model, _ = build("SD3Transformer2DModel")
    with reattend.apply(model, "softpag", layers=[0]), pytest.raises(ReattendError, match="two guides are called 'softpag'"):
        reattend.apply(model, "softpag", layers=[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_read_forward_counts_both_texts() -> None:
    model, inputs = build("AuraFlowTransformer2DModel")
    assert read_forward(model, inputs, Clock("denoise"), {}).text_length == 5, "its registers are no text"
    model, inputs = build("HunyuanDiT2DModel")
    assert read_forward(model, inputs, Clock("denoise"), {}).text_length == 3 + 2


@pytest.mark.parametrize("size, blocks, layers", [(64, 4, [4]), (128, 3, [3]), (16, 3, [5]), (8, 3, [6]), (None, 3, [3])])
def test_the_default_layer_of_a_unet_sees_enough_of_the_picture(size: int | None, blocks: int, layers: list[int]) -> None:
    """SD 1.5 and SDXL keep the published mid block; a UNet for small pictures takes the last layer of the first block that sees 8 x 8."""
    from types import SimpleNamespace

    from reattend.hooks import SiteTable
    from reattend.interventions import Site
    from reattend.recipes.kit.denoisers import default_layers

    down = [("denoiser.down", f"down_blocks.{n}") for n in range(blocks)]
    up = [("denoiser.up", f"up_blocks.{n}") for n in range(blocks)]
    places = [*down, ("denoiser.mid", "mid_block"), *up]
    listed = [
        Site(f"unet.{name}.attn1", n, stack, "self", 4, 4, 8, False, "sdpa", None) for n, (stack, name) in enumerate(places)
    ]
    config = SimpleNamespace(sample_size=size, block_out_channels=[32] * blocks)
    assert default_layers(SiteTable(listed, {}, "UNet", config)) == layers


def test_the_default_acts_on_the_zoo_s_pictures() -> None:
    pytest.importorskip("diffusers")
    pipe = reattend.zoo.load("shapes-sd")
    from reattend.recipes.kit.denoisers import default_layers

    assert default_layers(reattend.sites(pipe)) == default_layers(reattend.sites(pipe.unet)) == [7]
