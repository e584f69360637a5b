"""Recipes as guiders of diffusers' modular pipelines: the pictures of the same recipes through `wrap`, saved, loaded, and nothing left."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
if Version(diffusers.__version__) < Version("0.42"):
    pytest.skip("reattend.guiders needs diffusers 0.42", allow_module_level=True)

import reattend  # noqa: E402
from diffusers import ClassifierFreeGuidance, HeunDiscreteScheduler, ModularPipeline, PerturbedAttentionGuidance  # noqa: E402
from diffusers.hooks import LayerSkipConfig  # noqa: E402
from reattend import ReattendError, UnsupportedError  # noqa: E402
from reattend.guiders import NAGGuidance, PAGGuidance, SEGGuidance, SoftPAGGuidance  # noqa: E402
from reattend.hooks import attachment  # noqa: E402
from reattend.recipes.kit import guiders  # noqa: E402
from reattend.recipes.kit.registry import registry  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_modular import PIPELINES, STEPS, draw, sdxl, stable_diffusion_3, whole_sdxl  # noqa: E402

PERTURBED = {"pag": PAGGuidance, "softpag": SoftPAGGuidance, "seg": SEGGuidance}
ALL = {**PERTURBED, "nag": NAGGuidance}
FREE = ("guidance_scale", "guidance_rescale", "use_original_formulation", "guidance_start", "guidance_stop", "enabled")


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def through_wrap(pipe: Any, call: dict[str, Any], slug: str, parameters: dict[str, Any], **guidance: Any) -> Tensor:
    pipe.update_components(guider=ClassifierFreeGuidance(**guidance))
    with reattend.wrap(pipe).use(slug, **parameters):
        return draw(pipe, call)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max().clamp_min(1)))


def by_guider(pipe: Any, call: dict[str, Any], guider: Any) -> Tensor:
    pipe.update_components(guider=guider)
    return draw(pipe, call)


def passes(denoiser: nn.Module) -> list[int]:
    """Grows by the rows of each pass from now on."""
    rows: list[int] = []
    first = "hidden_states" if "hidden_states" in inspect.signature(denoiser.forward).parameters else "sample"
    denoiser.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs.get(first, args[0] if args else None))), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("slug", ALL)
def test_parameters_are_those_of_the_recipe(slug: str) -> None:
    given = inspect.signature(ALL[slug].__init__).parameters
    fields = {name: field.default for name, field in registry()[slug].model_fields.items()}
    for name in ("negative", "tensors") if slug == "nag" else ():
        del fields[name]  # the pipeline's negative prompt
    assert {name: p.default for name, p in given.items() if name not in (*FREE, "self")} == fields
    assert list(given)[1:8] == ["scale", *FREE], "in this order, for those who give them by place"


# Qwen-Image's modular pipeline brings what the guider returns to the size of the conditional prediction, which a recipe without a guider
# of its own shifts as well where there is no unconditional one
@pytest.mark.parametrize(("name", "guidance"), [*((name, 4.0) for name in PIPELINES), ("SDXL", 1.0), ("SD3", 1.0)])
@pytest.mark.parametrize("slug", PERTURBED)
def test_the_picture_is_that_of_the_recipe(name: str, slug: str, guidance: float) -> None:
    pipe, denoiser, call = PIPELINES[name]()
    plain = by_guider(pipe, call, ClassifierFreeGuidance(guidance))
    expected = through_wrap(pipe, call, slug, {"layers": [0]}, guidance_scale=guidance)
    got = by_guider(pipe, call, PERTURBED[slug](guidance_scale=guidance, layers=[0]))
    close(got, expected)
    assert (got - plain).abs().max() > 100 * (got - expected).abs().max()
    assert not hooks_of(denoiser)


@pytest.mark.parametrize(
    ("parameters", "guidance"),
    [
        ({"rescale": 0.7}, {}),
        ({"rescale": 0.7}, {"guidance_scale": 1.0}),
        ({"heads": [[0, 1], [1, 0]]}, {"guidance_rescale": 0.7}),
        ({"start": 0.25, "stop": 0.75}, {"use_original_formulation": True}),
        ({"adaptive": 0.003}, {"guidance_scale": 4.0, "guidance_rescale": 0.3}),
    ],
)
def test_all_parameters_count(parameters: dict[str, Any], guidance: dict[str, Any]) -> None:
    pipe, _, call = stable_diffusion_3()
    expected = through_wrap(pipe, call, "pag", parameters, **guidance)
    close(by_guider(pipe, call, PAGGuidance(**parameters, **guidance)), expected)
    assert not torch.allclose(expected, by_guider(pipe, call, ClassifierFreeGuidance(**guidance)), atol=1e-3)


def test_a_pipeline_that_rescales_has_the_true_conditional_prediction() -> None:
    """Qwen-Image's, without classifier-free guidance too."""
    pipe, _, call = PIPELINES["Qwen-Image"]()
    seen: list[Any] = []

    class Seen(PAGGuidance):
        def forward(self, *args: Any, **predictions: Any) -> Any:
            seen.append((predictions, super().forward(*args, **predictions)))
            return seen[-1][1]

    by_guider(pipe, call, Seen(scale=2.0, guidance_scale=1.0))
    for predictions, output in seen:
        conditional, branch = predictions["pred_cond"], predictions["pred_cond_perturbed"]
        torch.testing.assert_close(output.pred, conditional + 2 * (conditional - branch))
        assert output.pred_cond is conditional and output.pred_uncond is None
    assert len(seen) == STEPS


def test_beside_a_recipe_on_the_pipeline(tmp_path: Path) -> None:
    """What a recipe does to the prompt's rows it does to the further pass as well, as it does to a branch's rows."""
    pipe, denoiser, call = sdxl()
    save_file({"prompt_embeds": call["negative_prompt_embeds"]}, tmp_path / "no.safetensors")
    negative = {"tensors": str(tmp_path / "no.safetensors")}
    pipe.update_components(guider=ClassifierFreeGuidance(4.0))
    with reattend.wrap(pipe).use(("nag", negative), ("pag", {"layers": [0]})):
        expected = draw(pipe, call)
    pipe.update_components(guider=PAGGuidance(guidance_scale=4.0, layers=[0]))
    with reattend.wrap(pipe).use("nag", **negative):
        close(draw(pipe, call), expected)
    assert not hooks_of(denoiser)


@pytest.mark.parametrize("name", ["SDXL", "SD3"])
@pytest.mark.parametrize(
    ("guidance", "parameters"),
    [
        ({"guidance_scale": 4.0}, {}),
        ({"guidance_scale": 1.0}, {}),
        ({"guidance_scale": 3.0, "use_original_formulation": True}, {"rescale": 0.7}),
        ({"guidance_scale": 1.0}, {"rescale": 0.7}),
        ({"guidance_scale": 4.0, "guidance_rescale": 0.7}, {"start": 0.25, "stop": 0.75}),
    ],
)
def test_beside_a_recipe_with_a_branch_of_its_own(name: str, guidance: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Each shift counts once: u + s (c - u) + scale_pag (c - c_pag) + scale_seg (c - c_seg)."""
    pipe, denoiser, call = PIPELINES[name]()
    pag, seg = {"scale": 3.0, "layers": [0], **parameters}, {"scale": 2.0, "layers": [1]}
    pipe.update_components(guider=ClassifierFreeGuidance(**guidance))
    with reattend.wrap(pipe).use(("pag", pag), ("seg", seg)):
        expected = draw(pipe, call)
    pipe.update_components(guider=PAGGuidance(**pag, **guidance))
    with reattend.wrap(pipe).use("seg", **seg):
        close(draw(pipe, call), expected)
    alone = draw(pipe, call)
    assert not torch.allclose(alone, expected, atol=1e-3)
    pipe.update_components(guider=SEGGuidance(**seg, **guidance))
    with reattend.wrap(pipe).use("pag", **pag):
        close(draw(pipe, call), expected)
    assert not hooks_of(denoiser)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", ["SDXL", "SD3"])
def test_nag_beside_a_recipe_with_a_branch(name: str, guidance: float, tmp_path: Path) -> None:
    pipe, _, call = PIPELINES[name]()
    fields = [field for field in ("prompt_embeds", "pooled_prompt_embeds") if name == "SD3" or field == "prompt_embeds"]
    save_file({field: call[f"negative_{field}"] for field in fields}, tmp_path / "no.safetensors")
    pipe.update_components(guider=ClassifierFreeGuidance(guidance))
    with reattend.wrap(pipe).use(("nag", {"tensors": str(tmp_path / "no.safetensors")}), ("pag", {"layers": [0]})):
        expected = draw(pipe, call)
    pipe.update_components(guider=NAGGuidance(guidance_scale=guidance))
    with reattend.wrap(pipe).use("pag", layers=[0]):
        close(draw(pipe, call), expected)


@pytest.mark.parametrize("slug", PERTURBED)
def test_the_same_recipe_twice_is_refused_before_the_first_pass(slug: str) -> None:
    pipe, denoiser, call = stable_diffusion_3()
    rows = passes(denoiser)
    pipe.update_components(guider=PERTURBED[slug](layers=[0]))
    for isolated in (False, True):
        with (
            reattend.apply(pipe, (slug, {"layers": [1]}), isolated=isolated),
            pytest.raises(
                ReattendError, match=f"{PERTURBED[slug].__name__}: the recipe '{slug}' acts on this pipeline already"
            ),
        ):
            draw(pipe, call)
    assert not rows and hooks_of(denoiser) == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_inside_a_session_that_changes_nothing(name: str) -> None:
    """The sites of a pipeline have other names than those of its denoiser."""
    pipe, denoiser, call = PIPELINES[name]()
    for slug in ALL:
        alone = by_guider(pipe, call, ALL[slug]())
        for model in (pipe, denoiser):
            with reattend.apply(model, ("entropy-scaling", {"strength": 0.0, "base": 32})):
                assert torch.equal(draw(pipe, call), alone), slug
    assert not hooks_of(denoiser)


def test_a_scheduler_of_second_order() -> None:
    pipe, _, call = sdxl(HeunDiscreteScheduler())
    expected = through_wrap(pipe, call, "softpag", {"layers": [0]}, guidance_scale=4.0)
    close(by_guider(pipe, call, SoftPAGGuidance(guidance_scale=4.0, layers=[0])), expected)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda **g: PAGGuidance(scale=0.0, **g),
        lambda **g: SoftPAGGuidance(strength=0.0, **g),
        lambda **g: SEGGuidance(sigma=0.0, **g),
        lambda **g: NAGGuidance(scale=1.0, **g),
        lambda **g: NAGGuidance(strength=0.0, **g),
    ],
)
def test_nothing_is_bit_identical_and_costs_nothing(make: Any, guidance: float) -> None:
    pipe, denoiser, call = stable_diffusion_3()
    plain = by_guider(pipe, call, ClassifierFreeGuidance(guidance))
    rows = passes(denoiser)
    assert torch.equal(by_guider(pipe, call, make(guidance_scale=guidance)), plain)
    assert len(rows) == STEPS * (1 + (guidance != 1))


@pytest.mark.parametrize("name", PIPELINES)
def test_disabled(name: str) -> None:
    """On SDXL too, whose blocks switch a guider on."""
    pipe, _, call = PIPELINES[name]()
    plain = by_guider(pipe, call, ClassifierFreeGuidance(1.0))
    for slug in ALL:
        assert torch.equal(by_guider(pipe, call, ALL[slug](guidance_scale=4.0, enabled=False)), plain)
        assert torch.equal(draw(pipe, call), plain), "the next run as well"
        again = pipe.guider.new(enabled=True)
        assert not torch.equal(by_guider(pipe, call, again), plain)


def test_switched_off_and_on() -> None:
    pipe, _, call = stable_diffusion_3()
    plain = by_guider(pipe, call, ClassifierFreeGuidance(1.0))
    acting = by_guider(pipe, call, PAGGuidance(guidance_scale=4.0))
    pipe.guider.disable()
    assert torch.equal(draw(pipe, call), plain)
    pipe.guider.enable()
    assert torch.equal(draw(pipe, call), acting)


@pytest.mark.parametrize("slug", ALL)
def test_disabled_without_a_negative_prompt(slug: str) -> None:
    pipe, _, call = sdxl()
    call = {name: value for name, value in call.items() if not name.startswith("negative")}
    plain = by_guider(pipe, call, ClassifierFreeGuidance(1.0))
    assert torch.equal(by_guider(pipe, call, ALL[slug](guidance_scale=4.0, enabled=False)), plain)
    whole = whole_sdxl()
    given = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 2, "output": "latents"}
    whole.update_components(guider=ALL[slug](guidance_scale=4.0, enabled=False))
    whole(**given)


def test_passes_by_step() -> None:
    """Parts of the schedule in fractions, of the recipe and of classifier-free guidance; a branch that is off costs no pass."""
    pipe, denoiser, call = stable_diffusion_3()
    rows = passes(denoiser)
    by_guider(pipe, call, PAGGuidance(start=0.25, stop=0.75, guidance_scale=4.0, guidance_stop=0.5))
    assert rows == [1] * (2 + 3 + 2 + 1)
    assert pipe.guider.num_conditions == 3, "the next run reads both texts again, whatever the last step took"


@pytest.mark.parametrize("slug", ALL)
def test_sites_are_found_once_a_run(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large denoiser that takes as long as a pass of a small one."""
    pipe, denoiser, call = stable_diffusion_3()
    found: list[Any] = []
    for module in (attachment, guiders):
        monkeypatch.setattr(module, "sites", lambda model, real=module.sites: (found.append(model), real(model))[1])
    for run in (1, 2):
        by_guider(pipe, call, ALL[slug](guidance_scale=4.0))
        assert found == [denoiser] * run


# -- nag ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_nag_reads_the_negative_prompt(name: str, guidance: float, tmp_path: Path) -> None:
    pipe, denoiser, call = PIPELINES[name]()
    names = {
        "prompt_embeds": "prompt_embeds",
        "pooled_prompt_embeds": "pooled_prompt_embeds",
        "prompt_embeds_mask": "prompt_attention_mask",
    }
    save_file(
        {new: call[f"negative_{old}"] for old, new in names.items() if f"negative_{old}" in call}, tmp_path / "no.safetensors"
    )
    expected = through_wrap(pipe, call, "nag", {"tensors": str(tmp_path / "no.safetensors")}, guidance_scale=guidance)
    plain = by_guider(pipe, call, ClassifierFreeGuidance(guidance))
    rows = passes(denoiser)
    got = by_guider(pipe, call, NAGGuidance(guidance_scale=guidance))
    assert len(rows) == STEPS * (1 + (guidance != 1)) and hooks_of(denoiser) == 1
    close(got, expected)
    assert (got - plain).abs().max() > 100 * (got - expected).abs().max()


def test_nag_needs_a_negative_prompt() -> None:
    pipe, denoiser, call = sdxl()
    del call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"]
    with pytest.raises(
        ReattendError, match="NAGGuidance: the pipeline has no embeddings of a negative prompt: pass negative_prompt"
    ):
        by_guider(pipe, call, NAGGuidance())
    assert not hooks_of(denoiser)


def test_nag_in_part_of_the_schedule() -> None:
    pipe, _, call = sdxl()
    early, late, never = (
        by_guider(pipe, call, g) for g in (NAGGuidance(stop=0.5), NAGGuidance(start=0.5), NAGGuidance(scale=1.0))
    )
    assert not torch.equal(early, late) and not torch.equal(early, never)


# -- saved and loaded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ALL)
def test_saved_and_loaded(slug: str, tmp_path: Path) -> None:
    guider = ALL[slug](scale=2.5, guidance_scale=3.5, guidance_start=0.1, stop=0.5)
    guider.save_pretrained(tmp_path)
    again = ALL[slug].from_pretrained(tmp_path)
    assert again.recipe == guider.recipe
    public = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (again, guider)]
    assert public[0] == public[1] and public[0]["guidance_scale"] == 3.5
    assert (again.guidance_scale, again._start) == (3.5, 0.1)
    other = guider.new(scale=1.5, guidance_scale=2.0)
    assert (other.recipe.scale, other.guidance_scale, other.recipe.stop) == (1.5, 2.0, 0.5)
    assert type(guider).__name__ in repr(guider) and guider.recipe.scale == 2.5


def test_heads_are_plain_data(tmp_path: Path) -> None:
    guider = SoftPAGGuidance(heads=[(0, 1), (1, 0)])
    guider.save_pretrained(tmp_path)
    assert SoftPAGGuidance.from_pretrained(tmp_path).recipe == guider.recipe


# -- nothing is left ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_an_error_in_a_pass() -> None:
    pipe, denoiser, call = stable_diffusion_3()
    guider = PAGGuidance(guidance_scale=4.0)
    expected, count = by_guider(pipe, call, guider), []
    block = denoiser.get_submodule("transformer_blocks.2")

    def fails(*_: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("out of memory")

    handle = block.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(pipe, call)
    handle.remove()
    assert not hooks_of(denoiser), "although cleanup_models is not called after an error"
    assert torch.equal(draw(pipe, call), expected)


def test_what_an_error_before_a_pass_leaves_goes_with_the_next_one() -> None:
    pipe, denoiser, call = stable_diffusion_3()
    guider = PAGGuidance(guidance_scale=1.0)
    expected = by_guider(pipe, call, guider)
    guider.set_state(0, STEPS, torch.tensor(1000.0))
    guider.prepare_inputs({"encoder_hidden_states": (call["prompt_embeds"], call["negative_prompt_embeds"])})
    guider.prepare_models(denoiser)
    guider.prepare_models(denoiser)
    assert hooks_of(denoiser), "and now an error comes in between"
    assert torch.equal(draw(pipe, call), expected)
    assert not hooks_of(denoiser)


# -- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PAGGuidance(scale=-1), "scale: .* greater than or equal to 0, got -1"),
        (lambda: PAGGuidance(layers=[0], heads=[[0, 1]]), "give layers or heads, not both"),
        (lambda: PAGGuidance(start=0.5, stop=0.5), "start 0.5 must lie below stop 0.5"),
        (lambda: SEGGuidance(sigma="wide"), "sigma: "),
        (lambda: NAGGuidance(norm="l3"), "norm: "),
        (lambda: PAGGuidance(guidance_scale="high"), "PAGGuidance: guidance_scale must be a number, got 'high'"),
        (lambda: PAGGuidance(guidance_scale=float("nan")), "guidance_scale must be a number, got nan"),
        (lambda: PAGGuidance(guidance_rescale=2), "guidance_rescale must be a number from 0 to 1, got 2"),
        (lambda: SEGGuidance(guidance_start=0.6, guidance_stop=0.5), "guidance_start 0.6 must lie below guidance_stop 0.5"),
        (lambda: NAGGuidance(enabled="yes"), "enabled must be True or False, got 'yes'"),
        (lambda: SoftPAGGuidance().new(strength=2), "strength: .* less than or equal to 1, got 2"),
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(ReattendError, match=message):
        make()


def test_a_layer_that_is_not_there_is_refused_before_the_first_pass() -> None:
    pipe, denoiser, call = stable_diffusion_3()
    rows = passes(denoiser)
    with pytest.raises(UnsupportedError, match="recipe 'pag' does not fit this model: layer 9 does not exist"):
        by_guider(pipe, call, PAGGuidance(layers=[9]))
    assert not rows


@pytest.mark.parametrize("slug", ALL)
def test_a_part_of_the_schedule_without_a_step_is_refused_before_the_first_pass(slug: str) -> None:
    pipe, denoiser, call = sdxl()
    rows = passes(denoiser)
    words = f"{ALL[slug].__name__} acts from 0.3 to 0.31 of the schedule, and none of the 4 steps of this run lies there"
    with pytest.raises(ReattendError, match=words):
        by_guider(pipe, call, ALL[slug](start=0.3, stop=0.31))
    assert not rows
    by_guider(pipe, call, ALL[slug](start=0.3, stop=0.31, enabled=False))


def test_a_loop_of_ones_own_says_where_it_stands() -> None:
    with pytest.raises(ReattendError, match="PAGGuidance: call set_state"):
        PAGGuidance().prepare_inputs({"encoder_hidden_states": (torch.zeros(1), torch.zeros(1))})


# -- beside diffusers' own ---------------------------------------------------------------------------------------------------


def one_step(guider: Any, denoiser: nn.Module, call: dict[str, Any]) -> Tensor:
    """The prediction at step 1 of 10."""
    guider.set_state(1, 10, torch.tensor(500.0))
    batches = guider.prepare_inputs({"text": (call["prompt_embeds"], call["negative_prompt_embeds"])})
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pooled = {"text_embeds": call["pooled_prompt_embeds"], "time_ids": torch.ones(1, 6)}
    for batch in batches:
        guider.prepare_models(denoiser)
        with torch.no_grad():
            batch.noise_pred = denoiser(sample, 500, encoder_hidden_states=batch.text, added_cond_kwargs=pooled).sample
        guider.cleanup_models(denoiser)
    return guider(batches)[0]


def test_the_prediction_of_diffusers_own_guider() -> None:
    """Where that works: a UNet, under classifier-free guidance. Without, its second pass reads the negative prompt and perturbs nothing."""
    _, denoiser, call = sdxl()
    at = LayerSkipConfig(
        indices=[0],
        fqn="mid_block.attentions.0.transformer_blocks",
        skip_attention=False,
        skip_ff=False,
        skip_attention_scores=True,
    )
    part = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0, "perturbed_guidance_config": at}
    theirs = PerturbedAttentionGuidance(guidance_scale=4.0, perturbed_guidance_scale=3.0, **part)
    layer = next(n for n, s in enumerate(reattend.sites(denoiser).kind("self")) if s.name.startswith("mid_block"))
    with reattend.rows("conditional"):
        ours = one_step(PAGGuidance(3.0, 4.0, layers=[layer]), denoiser, call)
        plain = one_step(ClassifierFreeGuidance(4.0), denoiser, call)
    expected = one_step(theirs, denoiser, call)
    close(ours, expected)
    assert not torch.allclose(ours, plain, atol=1e-3)
    for hook in (m for m in denoiser.modules() if hasattr(m, "_diffusers_hook")):
        assert not hook._diffusers_hook.hooks


def test_a_pipeline_takes_it_up() -> None:
    pipe, _, _ = stable_diffusion_3()
    assert isinstance(pipe, ModularPipeline)
    pipe.update_components(guider=PAGGuidance(guidance_scale=4.0))
    pipe.update_components(guider=pipe.guider.new(scale=1.0))
    assert pipe.guider.recipe.scale == 1.0 and pipe.guider.guidance_scale == 4.0
    assert type(pipe.guider).__module__ == "reattend.guiders", "where diffusers looks for it when it loads a pipeline"


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "usage.md").read_text(encoding="utf-8")
    (code,) = (block.partition("```")[0] for block in page.split("```python\n")[1:] if "PAGGuidance(" in block)
    pipe = whole_sdxl()

    def small(**given: Any) -> Any:
        return pipe(**{"num_inference_steps": 4, **given, "height": 16, "width": 16})

    class Small:
        """The pipeline, whose pictures are small."""

        __call__ = staticmethod(small)

        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

    names: dict[str, Any] = {"pipe": Small()}
    exec(code, names)
    assert names["image"].size == (16, 16)
    assert PAGGuidance.from_pretrained("guider").recipe.layers == [4]
    negative = [
        small(prompt="a fox", negative_prompt=text, generator=torch.Generator().manual_seed(1), output="latents")
        for text in ("blurry", "red")
    ]
    assert not torch.equal(*negative), "it is encoded although classifier-free guidance is off"
