"""Guides: where their shifts go, against diffusers' own PAG pipeline and loops by hand; formulas, scales and prompts of their own; refusals."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import diffusers
import pytest
import reattend
import tiny_denoisers
import torch
from diffusers import StableDiffusionPAGPipeline
from reattend.hooks import Edits, Guide, Plan, attach, sites
from reattend.hooks.doors.guide import away
from reattend.hooks.sites.denoisers import learned_variance
from reattend.hooks.trackers.combination import Combination, combination_of, method_of
from reattend.interventions import Clock, MixValue, ReattendError
from tiny_runs import draw, flux, stable_diffusion, stable_diffusion_3
from torch import Tensor, nn


def weak(model: Any, name: str, layer: int = 1, strength: float = 1.0) -> Edits:
    """Rows of this branch see only themselves in one layer of self-attention."""

    def weaken(call: Any) -> MixValue | None:
        rows = call.clock.rows(name, call.batch)
        return None if rows is None else MixValue(strength=strength, rows=rows[:, None])

    return Edits(sites(model).stack("denoiser").kind("self", "joint")[layer : layer + 1], weaken)


def guided(model: Any, *guides: Guide) -> Any:
    return attach(model, [Plan("guided", [step for guide in guides for step in (weak(model, guide.name), guide)])])


def seen_by_the_pipeline(denoiser: nn.Module, into: list[Tensor]) -> Any:
    """What the denoiser's caller gets, noted after all hooks of a session that has begun."""
    return denoiser.register_forward_hook(lambda module, args, output: into.append(output[0].clone()))


# -- where the shift goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "rescale", "adaptive"),
    [(1.0, 0.0, 0.0), (4.0, 0.7, 0.0), (4.0, 0.0, 0.004), (1.05, 0.7, 0.004)],
)
def test_equal_to_the_pag_pipeline(guidance: float, rescale: float, adaptive: float) -> None:
    """With guidance_rescale too, which looks at the conditional prediction: the unconditional half takes the whole shift."""
    pipe, call, _, _ = stable_diffusion(guidance=guidance)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pag = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")
    pag.set_progress_bar_config(disable=True)
    call |= {"guidance_rescale": rescale}
    expected = draw(pag, call, pag_scale=3.0, pag_adaptive_scale=adaptive)
    before = draw(pipe, call)

    def scale(clock: Clock) -> float:
        return max(0.0, 3.0 - adaptive * (1000 - clock.timestep))

    with guided(pipe, Guide("weak", scale)):
        after = draw(pipe, call)
    near, far = (after - expected).norm() / expected.norm(), (before - expected).norm() / expected.norm()
    assert near < 2e-6 < 1e-2 < far


def test_the_conditional_half_of_one_batch_stays() -> None:
    pipe, call, _, _ = stable_diffusion()
    plain: list[Tensor] = []
    shifted: list[Tensor] = []
    hook = seen_by_the_pipeline(pipe.unet, plain)
    draw(pipe, call, num_inference_steps=1)
    hook.remove()
    with guided(pipe, Guide("weak", 2.0)):
        hook = seen_by_the_pipeline(pipe.unet, shifted)
        draw(pipe, call, num_inference_steps=1)
        hook.remove()
    (before,), (after,) = plain, shifted
    torch.testing.assert_close(after[2:], before[2:], atol=1e-5, rtol=1e-5)
    assert (after[:2] - before[:2]).abs().max() > 1e-3


def test_the_conditional_half_in_a_call_of_its_own_stays_and_the_formula_knows_both() -> None:
    pipe, call, _, guidance = flux()
    known: list[Any] = []

    def formula(seen: Any) -> Tensor:
        known.append((seen.guidance, seen.unconditional))
        return away(seen)

    plain: list[Tensor] = []
    shifted: list[Tensor] = []
    hook = seen_by_the_pipeline(pipe.transformer, plain)
    draw(pipe, call, num_inference_steps=1)
    hook.remove()
    with guided(pipe, Guide("weak", 2.0, formula=formula)):
        hook = seen_by_the_pipeline(pipe.transformer, shifted)
        draw(pipe, call, num_inference_steps=1)
        hook.remove()
    torch.testing.assert_close(shifted[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (shifted[1] - plain[1]).abs().max() > 1e-3
    ((scale, unconditional),) = known
    assert scale == guidance and torch.equal(unconditional, plain[1])


def test_without_guidance_the_conditional_rows_take_it() -> None:
    known: list[Any] = []

    def formula(seen: Any) -> Tensor:
        known.append((seen.guidance, seen.unconditional))
        return away(seen)

    for make in (stable_diffusion, flux):
        pipe, call, part, _ = make(guidance=1.0)
        plain: list[Tensor] = []
        hook = seen_by_the_pipeline(getattr(pipe, part), plain)
        draw(pipe, call, num_inference_steps=1)
        hook.remove()
        with guided(pipe, Guide("weak", 2.0, formula=formula)):
            hook = seen_by_the_pipeline(getattr(pipe, part), plain)
            draw(pipe, call, num_inference_steps=1)
            hook.remove()
        assert not torch.equal(*plain)
    assert known == [(1.0, None)] * 2


def test_a_loop_of_ones_own_is_not_known_and_both_halves_take_it() -> None:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    known: list[Any] = []

    def formula(seen: Any) -> Tensor:
        known.append(seen)
        return away(seen)

    before = model(**doubled).sample
    with guided(model, Guide("weak", 2.0, formula=formula)), reattend.rows("unconditional", "conditional"):
        after = model(**doubled).sample
    (seen,) = known
    shift = 2.0 * (seen.conditional - seen.branch)
    assert seen.guidance is None
    torch.testing.assert_close(torch.cat([seen.unconditional, seen.conditional]), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, before + torch.cat([shift, shift]), atol=1e-5, rtol=1e-5)


class DiffusionPipeline:
    """Stands in for a pipeline that runs the unconditional half first, or promises it and leaves it out."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def negative_first(self, x: Tensor, texts: list[Tensor], guidance_scale: float) -> Tensor:
        with reattend.rows("unconditional"):
            other = self.unet(x, 500, encoder_hidden_states=texts[1], return_dict=False)[0]
        with reattend.rows("conditional"):
            noise = self.unet(x, 500, encoder_hidden_states=texts[0], return_dict=False)[0]
        return other + guidance_scale * (noise - other)

    def left_out(self, x: Tensor, texts: list[Tensor], guidance_scale: float, steps: int = 1) -> Tensor:
        for step in range(steps):
            with reattend.rows("conditional"):
                noise = self.unet(x, 500 - step, encoder_hidden_states=texts[0], return_dict=False)[0]
            other = noise
            if len(texts) > 2:
                other = self.unet(x, 500 - step, encoder_hidden_states=texts[1], return_dict=False)[0]
            noise = other + guidance_scale * (noise - other)
        return noise

    def of_its_own(self, x: Tensor, texts: list[Tensor], guidance_scale: float) -> Tensor:
        with reattend.rows("unconditional"):
            other = self.unet(x, 500, encoder_hidden_states=texts[1], return_dict=False)[0]
        with reattend.rows("conditional"):
            noise = self.unet(x, 500, encoder_hidden_states=texts[0], return_dict=False)[0]
        return torch.lerp(other, noise, guidance_scale)


def a_stand_in() -> tuple[DiffusionPipeline, Tensor, list[Tensor]]:
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    return (
        DiffusionPipeline(model),
        inputs["sample"],
        [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"].flip(1)],
    )


def test_the_conditional_half_may_come_second_where_the_scale_is_known() -> None:
    pipe, x, texts = a_stand_in()
    before = pipe.negative_first(x, texts, 4.0)
    shifts: list[Tensor] = []
    with guided(pipe.unet, Guide("weak", 2.0, formula=lambda seen: shifts.append(away(seen)) or shifts[-1])):
        after = pipe.negative_first(x, texts, 4.0)
        torch.testing.assert_close(after, before + shifts[0], atol=1e-4, rtol=1e-4)
        with pytest.raises(ReattendError, match="call the conditional half first"):
            pipe.of_its_own(x, texts, 4.0)


def test_an_unconditional_half_that_never_comes_is_said() -> None:
    pipe, x, texts = a_stand_in()
    with guided(pipe.unet, Guide("weak", 2.0)), pytest.raises(ReattendError, match="never did, so its shift is lost"):
        pipe.left_out(x, texts, 4.0, steps=2)
    with torch.no_grad():
        assert torch.equal(pipe.left_out(x, texts, 4.0), pipe.left_out(x, texts, 4.0))


class ModularPipeline:
    """Stands in for a modular pipeline: its guider makes one call for each of its predictions and combines them."""

    def __init__(self, unet: nn.Module, guider: Any) -> None:
        self.unet, self.guider = unet, guider

    def __call__(self, x: Tensor, texts: list[Tensor]) -> Any:
        self.guider.set_state(step=2, num_inference_steps=10, timestep=None)
        made = []
        for text in texts[: self.guider.num_conditions]:
            self.guider._count_prepared += 1
            made.append(self.unet(x, 500, encoder_hidden_states=text, return_dict=False)[0])
        return self.guider.forward(*made)


@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("original", [False, True])
def test_a_modular_pipelines_guider_says_how_it_combines(original: bool, scale: float) -> None:
    pipe, x, texts = a_stand_in()
    guider = diffusers.ClassifierFreeGuidance(scale, 0.0, use_original_formulation=original)
    modular, shifts = ModularPipeline(pipe.unet, guider), []
    before = modular(x, texts)
    with guided(pipe.unet, Guide("weak", 2.0, formula=lambda seen: shifts.append(away(seen)) or shifts[-1])):
        after = modular(x, texts)
    (shift,) = shifts
    torch.testing.assert_close(after.pred, before.pred + shift, atol=1e-4, rtol=1e-4)
    if guider.num_conditions == 2:
        torch.testing.assert_close(after.pred_cond, before.pred_cond, atol=1e-5, rtol=1e-5)


def formulas_of(name: str) -> list[tuple[str, float]]:
    code = inspect.unwrap(getattr(diffusers, name).__call__).__code__
    return [(ast.unparse(formula.scale), formula.more) for formula in method_of(code).formulas]


@pytest.mark.parametrize(
    ("name", "scale", "more"),
    [
        ("StableDiffusionPipeline", "self.guidance_scale", 0.0),
        ("StableDiffusionXLPipeline", "self.guidance_scale", 0.0),
        ("StableDiffusion3Pipeline", "self.guidance_scale", 0.0),
        ("FluxPipeline", "true_cfg_scale", 0.0),
        ("QwenImagePipeline", "true_cfg_scale", 0.0),
        ("Lumina2Pipeline", "guidance_scale", 0.0),
        ("WanPipeline", "current_guidance_scale", 0.0),
        ("PixArtAlphaPipeline", "guidance_scale", 0.0),
        ("CogVideoXPipeline", "self.guidance_scale", 0.0),
        ("HunyuanVideoPipeline", "true_cfg_scale", 0.0),
        ("DiTPipeline", "guidance_scale", 0.0),
        ("IFPipeline", "guidance_scale", 0.0),
    ],
)
def test_what_a_pipeline_makes_of_its_halves_is_read(name: str, scale: str, more: float) -> None:
    assert formulas_of(name) == [(scale, more)]


class Combining:
    """Methods that combine in other ways, with a place to ask in."""

    guidance_scale = 3.0

    def more(self, on: bool, guidance_scale: float = 2.0) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        if on:
            a = a + guidance_scale * (a - b)
        return found

    def changed(self, guidance_scale: float = 2.0) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        guidance_scale = guidance_scale + 1
        a = b + guidance_scale * (a - b)
        return found

    def attribute(self) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        a = b + self.guidance_scale * (a - b)
        return found

    def attribute_changed(self) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        self._guidance_scale = 5.0
        a = b + self.guidance_scale * (a - b)
        return found

    def a_call_decides(self, guidance_scale: float = 2.0) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        if bool(a):
            a = b + guidance_scale * (a - b)
        return found

    def half_changed(self, guidance_scale: float = 2.0, twice: bool = True) -> Combination | None:
        a = b = 0.0
        found = combination_of(self)
        if twice:
            b = 2 * b
        a = b + guidance_scale * (a - b)
        return found

    def two(self, one: float, other: float) -> Combination | None:
        a = b = c = 0.0
        guidance_scale, cfg_scale = one, other
        found = combination_of(self)
        a = b + guidance_scale * (a - b)
        c = b + cfg_scale * (c - b)
        return found

    def none(self, guidance_scale: float = 2.0) -> Combination | None:
        return combination_of(self)


def test_a_combination_is_known_or_said_to_be_unknown() -> None:
    here = Combining()
    assert here.more(True) == Combination(3.0) and here.more(False) == Combination(1.0)
    assert here.attribute() == Combination(3.0) and here.two(2.0, 2.0) == Combination(2.0)
    assert here.changed() is here.attribute_changed() is here.a_call_decides() is here.two(2.0, 3.0) is here.none() is None
    assert here.half_changed() is None and here.half_changed(twice=False) == Combination(2.0)
    assert here.more(True, torch.tensor(2.0)) is None and combination_of(None) is None


# -- formulas and scales ---------------------------------------------------------------------------------------------------


def test_formulas_see_all_branches_and_their_shifts_add_up() -> None:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    before, seen = model(**inputs).sample, {}

    def note(predictions: Any) -> Tensor:
        seen[predictions.scale] = predictions
        return predictions.scale * (predictions.branches["a"] - predictions.branches["dropped"])

    steps = [weak(model, "a", 0), Guide("a", 2.0, formula=note), weak(model, "b", 1), Guide("b", 3.0, formula=note)]
    with attach(model, [Plan("both", [*steps, weak(model, "dropped", 2), Guide("dropped", formula=None)])]):
        after = model(**inputs).sample
    one, other = seen[2.0], seen[3.0]
    assert list(one.branches) == ["a", "b", "dropped"] and one.branch is one.branches["a"] and other.branch is one.branches["b"]
    for number, name in enumerate(("a", "b", "dropped")):
        with attach(model, [Plan("alone", [weak_everywhere(model, number)])]):
            torch.testing.assert_close(one.branches[name], model(**inputs).sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, before + 5.0 * (one.branches["a"] - one.branches["dropped"]))


def weak_everywhere(model: Any, layer: int) -> Edits:
    return Edits(sites(model).stack("denoiser").kind("self", "joint")[layer : layer + 1], lambda call: MixValue(strength=1.0))


def test_a_formula_that_returns_something_else() -> None:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    for formula in (lambda seen: 1.0, lambda seen: seen.conditional[:1]):
        with (
            guided(model, Guide("x", formula=formula)),
            pytest.raises(ReattendError, match="guide 'x': its formula must return"),
        ):
            model(**inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_scale_by_step_and_steps_without_it_cost_nothing() -> None:
    pipe, call, _, _ = stable_diffusion()
    scales, rows = [2.0, 0.0, 1.0], []
    clocks: list[Clock] = []

    def scale(clock: Clock) -> float:
        clocks.append(clock)
        return scales[clock.step]

    with guided(pipe, Guide("weak", scale)) as session:
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        after = draw(pipe, call)
        hook.remove()
        assert session.applied == 2
    assert rows == [6, 4, 6] and [clock.step for clock in clocks] == [0, 1, 2] and {clock.steps for clock in clocks} == {3}
    with guided(pipe, Guide("weak", lambda clock: 0.0)) as session, pytest.warns(reattend.ReattendWarning):
        assert torch.equal(draw(pipe, call), draw(pipe, call)) and not torch.equal(draw(pipe, call), after)
        session.remove()


def test_a_scale_that_is_no_number() -> None:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    for wrong in (float("nan"), None, torch.tensor(1.0)):
        with guided(model, Guide("x", lambda clock, wrong=wrong: wrong)), pytest.raises(ReattendError, match="finite number"):
            model(**inputs)


def test_a_branch_that_is_dropped_runs_and_changes_no_bit() -> None:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    doubled = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    before, clocks = model(**doubled).sample, []
    table = sites(model)[:1]

    def note(call: Any) -> MixValue | None:
        clocks.append(call.clock)
        return MixValue(strength=1.0, rows=call.clock.rows("beside", call.batch)[:, None])

    for of, source in (("conditional", [2, 3]), ("all", [0, 1, 2, 3])):
        steps = [Edits(table, note), Guide("beside", formula=None, of=of)]
        with attach(model, [Plan("beside", steps)]) as session, reattend.rows("unconditional", "conditional"):
            near = model(**doubled).sample
            assert session.applied == 1
        torch.testing.assert_close(near, before, atol=1e-5, rtol=1e-5)
        clock = clocks.pop()
        assert clock.source.tolist() == [0, 1, 2, 3, *source] and clock.branches["beside"].tolist() == [False] * 4 + [
            True
        ] * len(source)
        assert clock.branches["unconditional"].tolist() == [True, True, False, False, *(row < 2 for row in source)]
        assert clock.branches["conditional"].tolist() == [False, False, True, True, *(row > 1 for row in source)]
    with pytest.raises(ReattendError, match="formula=None"):
        Guide("x", of="all")
    with pytest.raises(ReattendError, match="of must be"):
        Guide("x", of="unconditional")


def test_a_branch_of_all_rows_in_two_calls() -> None:
    pipe, call, _, _ = flux()
    before, seen = draw(pipe, call), []
    table = sites(pipe.transformer)[:1]
    note = Edits(table, lambda at: seen.append((list(at.clock.branches), at.batch)))
    with (
        pytest.warns(reattend.ReattendWarning),
        attach(pipe, [Plan("beside", [note, Guide("beside", formula=None, of="all")])]),
    ):
        torch.testing.assert_close(draw(pipe, call), before, atol=1e-5, rtol=1e-5)
    assert seen == [(["conditional", "beside"], 4), (["unconditional", "beside"], 4)] * 3


# -- prompts of their own --------------------------------------------------------------------------------------------------

PROMPTS = {
    "UNet2DConditionModel": ("encoder_hidden_states",),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "UNetMotionModel": ("encoder_hidden_states",),
    "HunyuanVideoTransformer3DModel": ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
    "QwenImageTransformer2DModel": ("encoder_hidden_states", "encoder_hidden_states_mask"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_its_own_equals_a_call_with_that_prompt(name: str) -> None:
    model, inputs = tiny_denoisers.build(name)
    torch.manual_seed(2)
    other = {
        key: torch.randn_like(inputs[key]) if inputs[key].is_floating_point() else inputs[key].flip(0) for key in PROMPTS[name]
    }
    calls: list[Any] = []

    def arguments(call: Any) -> dict[str, Tensor]:
        calls.append(call)
        return other

    before, second, seen = model(**inputs)[0], model(**{**inputs, **other})[0], []

    def formula(predictions: Any) -> Tensor:
        seen.append(predictions.branch)
        return away(predictions)

    for given in (other, arguments):
        with attach(model, [Plan("negative", [Guide("negative", 2.0, formula=formula, arguments=given)])]):
            after = model(**inputs)[0]
        torch.testing.assert_close(seen.pop(), second, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after, before + 2.0 * (before - second), atol=1e-3, rtol=1e-3)
    assert (second - before).abs().max() > 1e-3 and calls[0].root is model and calls[0].clock.phase == "denoise"
    if name != "UNetMotionModel":  # one text for all rows
        one = {key: value[:1] for key, value in other.items()}
        third = model(**{**inputs, **{key: value.expand_as(inputs[key]) for key, value in one.items()}})[0]
        with attach(model, [Plan("negative", [Guide("negative", 2.0, arguments=one)])]):
            torch.testing.assert_close(model(**inputs)[0], before + 2.0 * (before - third), atol=1e-3, rtol=1e-3)


def test_a_prompt_with_arguments_in_a_group() -> None:
    changes = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model, inputs = tiny_denoisers.unet(**changes)
    model.eval().requires_grad_(False)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.rand(2, 6)}
    inputs["added_cond_kwargs"] = added
    other = {"encoder_hidden_states": torch.randn(2, 5, 8), "added_cond_kwargs": {"text_embeds": torch.randn(2, 8)}}
    before = model(**inputs).sample
    second = model(**{**inputs, **other, "added_cond_kwargs": {**added, **other["added_cond_kwargs"]}}).sample
    with attach(model, [Plan("negative", [Guide("negative", 2.0, arguments=other)])]):
        torch.testing.assert_close(model(**inputs).sample, before + 2.0 * (before - second), atol=1e-4, rtol=1e-4)
    assert list(inputs["added_cond_kwargs"]) == ["text_embeds", "time_ids"] and len(added["text_embeds"]) == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 7, 8)}, r"must have the shape \(2, 5, 8\).*padded to one length"),
        ({"encoder_hidden_states": torch.zeros(0, 5, 8)}, r"must have the shape \(2, 5, 8\)"),
        ({"encoder_hidden_states": "a fox"}, "must be a tensor, got str"),
        ({"pooled": torch.zeros(2, 8)}, "its branch has an argument pooled of its own, but this call .* has none"),
        ({"img_ids": torch.zeros(16, 3)}, "is one for all rows of the batch, so a branch has none of its own"),
    ],
)
def test_prompts_that_do_not_fit(other: dict[str, Any], message: str) -> None:
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    before, ran = model(**inputs).sample, []
    with attach(model, [Plan("negative", [Guide("negative", arguments=other)])]), pytest.raises(ReattendError, match=message):
        model.x_embedder.register_forward_pre_hook(lambda *_: ran.append(1))
        model(**inputs)
    model.x_embedder._forward_pre_hooks.clear()
    assert not ran and torch.equal(model(**inputs).sample, before)


# -- rows of arguments -----------------------------------------------------------------------------------------------------


def few() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Denoisers whose arguments do not say by their shape how they hold rows, at batch 1 and 2."""
    torch.manual_seed(0)
    kandinsky = {
        "in_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "out_visual_dim": 4, "patch_size": (1, 2, 2), "model_dim": 32,
        "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": False,
    }  # fmt: skip
    hidream = {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "caption_channels": [8, 8], "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 0),
    }  # fmt: skip
    return {
        "Kandinsky5Transformer3DModel": (kandinsky, {
            "hidden_states": torch.randn(1, 1, 8, 8, 4), "encoder_hidden_states": torch.randn(1, 5, 8), "timestep": torch.tensor([5.0]),
            "pooled_projections": torch.randn(1, 8), "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        }),
        "HiDreamImageTransformer2DModel": (hidream, {
            "hidden_states": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([5.0, 5.0]),
            "encoder_hidden_states_t5": torch.randn(2, 5, 8), "encoder_hidden_states_llama3": torch.randn(2, 2, 5, 8),
            "pooled_embeds": torch.randn(2, 8),
        }),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Kandinsky5Transformer3DModel", "HiDreamImageTransformer2DModel"])
def test_arguments_whose_shapes_do_not_say_it(name: str) -> None:
    config, inputs = few()[name]
    model = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    before, seen = model(**inputs).sample, []
    other = {key: torch.randn_like(value) for key, value in inputs.items() if key.startswith(("encoder_", "pooled_"))}
    second = model(**{**inputs, **other}).sample
    guide = Guide("other", 2.0, formula=lambda p: seen.append((p.conditional, p.branch)) or away(p), arguments=other)
    with attach(model, [Plan("other", [guide])]):
        after = model(**inputs).sample
    ((conditional, branch),) = seen
    torch.testing.assert_close(conditional, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(branch, second, atol=1e-4, rtol=1e-4)
    assert after.shape == before.shape and (second - before).abs().max() > 1e-3


def test_arguments_of_which_nothing_is_known_are_refused() -> None:
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    with guided(model, Guide("x")):
        with pytest.raises(
            ReattendError, match=r"whether the argument cross_attention_kwargs.regions \(2, 3\) .* is not known"
        ):
            model(**inputs, cross_attention_kwargs={"regions": torch.zeros(2, 3)})
        with pytest.raises(ReattendError, match=r"timestep_cond .* should have 2 rows along dimension 0"):
            model(**inputs, timestep_cond=torch.zeros(3, 4))


def test_latents_in_a_list_are_refused() -> None:
    """Z-Image gets one tensor for each sample: there is no batch to add rows to."""
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    with guided(model, Guide("x")), pytest.raises(ReattendError, match="gets its latents as no batch"):
        model(**{**inputs, "hidden_states": list(inputs["hidden_states"])})


# -- what is left as it is, and what is refused ------------------------------------------------------------------------------


def test_learned_variances_stay() -> None:
    model, inputs = tiny_denoisers.build("PixArtTransformer2DModel")
    before = model(**inputs).sample
    with guided(model, Guide("weak", 5.0)):
        after = model(**inputs).sample
    torch.testing.assert_close(after[:, 4:], before[:, 4:], atol=1e-5, rtol=1e-5)
    assert (after[:, :4] - before[:, :4]).abs().max() > 1e-3


def test_learned_variances_of_models_whose_input_has_further_channels() -> None:
    """DeepFloyd's second stage sees the picture of the first beside its latents, so only its scheduler tells."""
    from diffusers import DDPMScheduler

    unet, _ = tiny_denoisers.unet(in_channels=6, out_channels=6)
    assert learned_variance(unet, DDPMScheduler(variance_type="learned_range"))
    assert not learned_variance(unet, DDPMScheduler()) and not learned_variance(unet, None)


CACHES = {
    "TaylorSeerCache": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: diffusers.MagCacheConfig(num_inference_steps=3, calibrate=True),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000), current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_blocks_are_refused(name: str) -> None:
    pipe, call, _, _ = flux()
    before = draw(pipe, call)
    pipe.transformer.enable_cache(CACHES[name]())
    for model in (pipe, pipe.transformer):
        with pytest.raises(ReattendError, match=rf"guide 'x'.*{name}.*disable_cache\(\)"):
            guided(model, Guide("x", 1.0))
    pipe.transformer.disable_cache()
    with guided(pipe, Guide("x", 1.0)):
        draw(pipe, call)

        def enable(*_: Any) -> dict[str, Any]:
            pipe.transformer.enable_cache(CACHES[name]())
            return {}

        with pytest.raises(ReattendError, match=rf"{name}.*disable_cache\(\)"):
            draw(pipe, call, callback_on_step_end=enable)
        pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, call), before)


def test_a_cache_put_on_by_hand_is_refused() -> None:
    from diffusers.hooks import apply_first_block_cache

    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    session = guided(model, Guide("x", 1.0))
    apply_first_block_cache(model, diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ReattendError, match="guide 'x'.*FBC"):
        model(**inputs)
    session.remove()
    with pytest.raises(ReattendError, match="guide 'x'.*FBC"):
        guided(model, Guide("x", 1.0))


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "UNet2DConditionModel"])
def test_a_guide_that_is_removed_in_mid_pass_ends_its_pass(name: str) -> None:
    model, inputs = tiny_denoisers.build(name)
    before = model(**inputs).sample
    with guided(model, Guide("weak", 2.0)):
        wanted = model(**inputs).sample
    session = guided(model, Guide("weak", 2.0))
    inner = next(module for path, module in model.named_modules() if path.endswith(("blocks.1", "mid_block")))
    handle = inner.register_forward_pre_hook(lambda *_: session.remove())
    after = model(**inputs).sample
    handle.remove()
    assert torch.equal(after, wanted) and torch.equal(model(**inputs).sample, before)


def test_an_error_in_mid_pass_leaves_nothing() -> None:
    pipe, call, _, _ = stable_diffusion_3()
    before = draw(pipe, call)
    with guided(pipe, Guide("weak", 2.0)):
        wanted = draw(pipe, call)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, call)
        handle.remove()
        assert torch.equal(draw(pipe, call), wanted)
    assert torch.equal(draw(pipe, call), before)


def test_half_precision() -> None:
    pipe, call, _, _ = stable_diffusion_3()
    pipe.to(torch.bfloat16)
    before = draw(pipe, call)
    with guided(pipe, Guide("weak", 2.0)):
        after = draw(pipe, call)
    assert after.dtype == before.dtype and after.isfinite().all() and not torch.equal(after, before)


@pytest.mark.parametrize("scale", ["2", None, torch.tensor(2.0)])
def test_a_scale_is_a_number_or_a_function(scale: Any) -> None:
    with pytest.raises(ReattendError, match="scale must be a finite number"):
        Guide("weak", scale=scale)


def test_formulas_change_no_prediction_in_place() -> None:
    pipe, call, _, _ = stable_diffusion()
    changes = Guide("weak", formula=lambda seen: seen.conditional.sub_(seen.branch))
    with (
        attach(pipe, [Plan("weak", [changes])]),
        pytest.raises(ReattendError, match="'weak': its formula changed a prediction"),
    ):
        draw(pipe, call)
    listed: Any = Guide("weak", arguments=lambda call: [1])  # type: ignore[arg-type, return-value]
    with (
        attach(pipe, [Plan("weak", [listed])]),
        pytest.raises(ReattendError, match="arguments must be tensors by name, got list"),
    ):
        draw(pipe, call)
