"""Which half is conditional: the table of pipelines against the source of every pipeline of diffusers, and one run of each kind of layout."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.pipelines
import pytest
import reattend
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.trackers.guidance_rows import branches_of
from reattend.hooks.trackers.pipelines import Guidance, guidance_of
from reattend.interventions import Call, HeadGain, ReattendError, UnsupportedError
from tiny_runs import flux, seeded
from torch import Tensor
from transformers import CLIPTextModelWithProjection

# -- the table, against the source -----------------------------------------------------------------------------------------

# pipelines of which nothing is known, with the reason; whoever needs their rows is refused
UNKNOWN = {
    "pipeline_cosmos3_omni": "text and pictures in one stream of tokens, no batch",
    "pipeline_cycle_diffusion": "four parts, two of them of a source picture",
    "pipeline_diffusion_gemma": "no denoiser of diffusers",
    "pipeline_ideogram4": "one denoiser for each half",
    "pipeline_leditspp_stable_diffusion": "one part for each edit",
    "pipeline_leditspp_stable_diffusion_xl": "one part for each edit",
    "pipeline_llada2": "no denoiser of diffusers",
    "pipeline_rfd4_proteina": "proteins",
    "pipeline_semantic_stable_diffusion": "one part for each edit",
    "pipeline_spectrogram_diffusion": "never guides",
    "pipeline_stable_diffusion_attend_and_excite": "passes of single texts in between",
    "pipeline_stable_diffusion_diffedit": "four parts, two of them of a source text",
    "pipeline_stable_diffusion_gligen_text_image": "two calls, of each another half is used",
    "pipeline_stable_diffusion_paradigms": "several steps in one batch",
    "pipeline_stable_diffusion_pix2pix_zero": "two denoised pictures in one run",
    "pipeline_stable_diffusion_safe": "three parts, one of them of unwanted concepts",
    "pipeline_stable_diffusion_sag": "further passes of one half",
    "pipeline_unidiffuser": "text and picture denoised in turn",
}
CALLED = re.compile(
    r"(self\.)?(transformer|transformer_2|unet|prior|decoder|image_unet|unconditional_transformer|model|current_model)"
)
NEGATIVE = re.compile("neg|uncond|empty|null")
LATENTS = re.compile("latent|sample|^x|noise_pred|pred$|velocity|logits")


def modules() -> Iterator[tuple[str, str]]:
    """Names and source of the modules that hold a pipeline of diffusers which calls something."""
    for info in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if not info.name.rpartition(".")[2].startswith("pipeline_") or "onnx" in info.name or "flax" in info.name:
            continue
        spec = importlib.util.find_spec(info.name)
        assert spec is not None and spec.origin is not None
        with open(spec.origin) as file:
            text = file.read()
        if "def __call__" in text:
            yield info.name, text


def order(names: list[ast.expr]) -> str:
    return "".join("u" if NEGATIVE.search(ast.unparse(name)) else "c" for name in names)


@functools.cache
def read(text: str) -> tuple[set[str], set[str], list[str]]:
    """Of a pipeline's source: the orders in which texts are joined, those in which predictions are parted, and its denoiser calls."""
    joined, parted, calls = set(), set(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if CALLED.fullmatch(name):
                calls.append((node.lineno, "u" if NEGATIVE.search(ast.unparse(node)) else "c"))
            first = node.args[0] if node.args else None
            if name in ("torch.cat", "torch.concat") and isinstance(first, (ast.List, ast.Tuple)) and len(first.elts) > 1:
                along = [ast.unparse(word.value) for word in node.keywords if word.arg in ("dim", "axis")]
                texts = all(re.search("embed|class_|_text|hidden_states", ast.unparse(item)) for item in first.elts)
                if (along or ["0"]) == ["0"] and texts:
                    joined.add(order(first.elts))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            targets, value = node.targets[0].elts, ast.unparse(node.value)
            names = [ast.unparse(target) for target in targets]
            along_rows = ".chunk(" in value and "dim=1" not in value and LATENTS.search(value.split(".chunk")[0])
            if along_rows and "_" not in names and not any("embed" in name for name in names):
                parted.add(order(targets))
    return joined - {"cc", "uu", "ccc"}, parted - {"cc", "uu"}, [half for _, half in sorted(calls)]


@pytest.mark.parametrize("module", [pytest.param(m, id=m[0].rpartition(".")[2]) for m in modules()])
def test_every_pipeline_against_its_source(module: tuple[str, str]) -> None:
    name, text = module
    guidance, (joined, parted, calls) = guidance_of(name), read(text)
    if guidance is None:
        assert name.rpartition(".")[2] in UNKNOWN, f"a pipeline that nobody has read: {joined}, {parted}, {calls}"
        return
    assert name.rpartition(".")[2] not in UNKNOWN
    if guidance.guider:
        assert "guider_state_batch" in text and "prepare_inputs" in text
    elif guidance.batch:
        # what the source shows agrees; one that shows nothing never guides
        known = {parts.replace("-", "c").replace("cc", "c") for parts in guidance.batch}
        shown = {re.sub("(.)\\1+", "\\1", found) for found in joined | parted}
        if "prompt_embeds + negative_prompt_embeds" in text:  # texts of different lengths, in a list
            shown.add("cu")
        assert shown <= known, f"{name}: {joined}, {parted}"
        assert shown or "num_cfg" in text or not any(doubled(line) for line in text.splitlines())
    else:
        # one call for each half, the prompt's first; or no guidance at all
        assert not any(doubled(line) for line in text.splitlines())
        assert "u" not in calls or (calls[0], calls[-1]) == ("c", "u"), f"{name}: {calls}"


def doubled(line: str) -> bool:
    return "latents] * 2" in line and "image" not in line or "latents.repeat(2" in line


def test_code_that_is_no_pipeline_of_diffusers_is_unknown() -> None:
    assert guidance_of("__main__") is None and guidance_of("diffusers.pipelines.new_one.pipeline_new_one") is None
    assert guidance_of("my.pipelines.stable_diffusion.pipeline_stable_diffusion") is None
    assert guidance_of("diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen") == Guidance(("cu",))


# -- one run of each kind ---------------------------------------------------------------------------------------------------


def stable_diffusion() -> tuple[Any, dict[str, Any], str]:
    pipe = tiny_pipelines.stable_diffusion()
    return pipe, texts(), "encoder_hidden_states"


def texts() -> dict[str, Any]:
    return {"prompt_embeds": torch.ones(1, 5, 16), "negative_prompt_embeds": -torch.ones(1, 5, 16), "guidance_scale": 4.0}


def dit() -> tuple[Any, dict[str, Any], str]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, norm_num_groups=4,
        sample_size=8, patch_size=2,
    ).eval()  # fmt: skip
    pipe = DiTPipeline(model, tiny_pipelines.vae(4), DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [3], "guidance_scale": 4.0}, "class_labels"


def cascade() -> tuple[Any, dict[str, Any], str]:
    torch.manual_seed(0)
    prior = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, patch_size=1, block_out_channels=(16, 16),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1), clip_text_in_channels=16,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_pooled_in_channels=16, clip_image_in_channels=16, clip_seq=1, timestep_ratio_embedding_dim=8, self_attn=True,
        timestep_conditioning_type=("sca",), switch_level=(False,),
    ).eval()  # fmt: skip
    encoder = CLIPTextModelWithProjection(tiny_pipelines.text_config(projection_dim=16)).eval()
    pipe = StableCascadePriorPipeline(
        tokenizer=tiny_pipelines.tokenizer(), text_encoder=encoder, prior=prior, scheduler=DDPMWuerstchenScheduler(),
        resolution_multiple=8.0,
    )  # fmt: skip
    pooled = {"prompt_embeds_pooled": torch.ones(1, 1, 16), "negative_prompt_embeds_pooled": -torch.ones(1, 1, 16)}
    return pipe, {**texts(), **pooled, "height": 64, "width": 64, "output_type": "pt"}, "clip_text"


def in_turn() -> tuple[Any, dict[str, Any], str]:
    pipe, call, _, _ = flux()
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.ones(1, 5, 8) * (1 if name == "prompt_embeds" else -1)
    call |= {name: torch.randn(1, 8) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipe, call, "encoder_hidden_states"


def picture() -> tuple[Any, dict[str, Any], str]:
    pipe = tiny_pipelines.stable_diffusion()
    unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=8).eval()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipe = StableDiffusionInstructPix2PixPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
    return pipe, {**texts(), "image": torch.rand(1, 3, 16, 16), "image_guidance_scale": 1.5}, "encoder_hidden_states"


def denoiser(pipe: Any) -> Any:
    return next(part for name in ("unet", "transformer", "prior") if (part := getattr(pipe, name, None)) is not None)


def seen_by(
    pipe: Any, call: dict[str, Any], argument: str, table: Any = None
) -> list[tuple[list[bool], dict[str, list[bool]]]]:
    """Of each pass of a run: which rows were given the prompt (a positive text, the class 3), and what the clock says of the rows."""
    seen: list = []
    prompted: list = []
    model, pipe_call = denoiser(pipe), {"num_inference_steps": 2, "generator": seeded(), "output_type": "latent", **call}
    pipe.set_progress_bar_config(disable=True)

    def note(_: Any, args: tuple, given: dict[str, Any]) -> None:
        text = given[argument]
        prompted.append([bool(row.float().mean() > 0 if text.dim() > 1 else row == 3) for row in text])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    table = reattend.sites(pipe).where(lambda site: site.stack.startswith("denoiser"))[:1]

    def rows(call: Call) -> HeadGain:
        seen.append({name: rows.tolist() for name, rows in call.clock.branches.items()})
        return HeadGain(factor=1.001)

    plan = Plan("note", [Edits(table, rows)])
    try:
        with attach(pipe, [plan]):
            pipe(**{k: v for k, v in pipe_call.items() if not (k == "output_type" and isinstance(pipe, DiTPipeline))})
    finally:
        handle.remove()
    return list(zip(prompted, seen, strict=True))


@pytest.mark.parametrize("build", [stable_diffusion, dit, cascade, in_turn])
def test_the_rows_that_are_given_the_prompt_are_conditional(build: Callable[[], tuple[Any, dict[str, Any], str]]) -> None:
    pipe, call, argument = build()
    passes = seen_by(pipe, call, argument)
    assert len(passes) == (4 if build is in_turn else 2)
    for given, rows in passes:
        none = [False] * len(given)
        assert rows.get("conditional", none) == given
        assert rows.get("unconditional", none) == [not row for row in given]


def test_three_predictions_of_a_picture_and_a_text() -> None:
    pipe, call, argument = picture()
    for given, rows in seen_by(pipe, call, argument):
        assert given == rows["conditional"] == [True, False, False] and rows["unconditional"] == [False, False, True]
    with reattend.apply(pipe, "softpag"), pytest.raises(UnsupportedError, match="makes three predictions"):
        pipe(**call, num_inference_steps=2, output_type="latent")


# -- code that nobody has read ----------------------------------------------------------------------------------------------


class Own(StableDiffusionPipeline):
    """A pipeline of the user's own: what its batch holds is known to nobody else."""

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        self._guidance_scale = 4.0
        return self.unet(torch.cat([x, x]), 500, encoder_hidden_states=text).sample


def test_unread_code_is_refused_for_whoever_needs_the_rows_and_serves_the_others() -> None:
    base = tiny_pipelines.stable_diffusion()
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = Own(**parts, requires_safety_checker=False)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(2, 5, 16)
    table = reattend.sites(pipe).stack("denoiser")[:1]

    def asks(call: Call) -> HeadGain:
        rows = call.clock.rows("conditional", call.batch)
        return HeadGain(factor=1.001, rows=None if rows is None else rows[:, None])

    with torch.no_grad():
        with attach(pipe, [Plan("asks", [Edits(table, asks)])]):
            with pytest.raises(ReattendError, match=r"conditional is not known: the code of Own .*reattend.rows"):
                pipe(x, text)
            with reattend.rows("unconditional", "conditional"):
                pipe(x, text)
        with reattend.apply(pipe, "softpag"), pytest.raises(ReattendError, match="conditional is not known"):
            pipe(x, text)
        with attach(pipe, [Plan("does not ask", [Edits(table, lambda call: HeadGain(factor=1.001))])]):
            pipe(x, text)


def test_a_subclass_that_leaves_the_call_alone_is_known() -> None:
    class Renamed(StableDiffusionPipeline):
        pass

    base, call, argument = stable_diffusion()
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    for given, rows in seen_by(Renamed(**parts, requires_safety_checker=False), call, argument):
        assert given == rows["conditional"] == [False, True]


def test_latents_in_a_list() -> None:
    a, b = torch.randn(1, 4, 8), torch.randn(1, 4, 6)
    layout = Guidance(("cu",)).layout([a, b, a, b], perturbed=False)
    assert layout == ("conditional", "unconditional") and Guidance(("cu",)).layout([a, b], perturbed=False) is None
    assert branches_of(layout, [a, b, a, b])["conditional"].tolist() == [True, True, False, False]
