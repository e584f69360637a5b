"""ControlNets: in a pipeline they know step and halves like the denoiser beside them; alone they are networks of their own stack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reattend
import tiny_denoisers
import tiny_pipelines
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    MultiControlNetModel,
    SD3ControlNetModel,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
)
from reattend.hooks import Edits, Plan, attach
from reattend.interventions import Call, HeadGain
from tiny_runs import seeded
from torch import Tensor, nn

PICTURE = torch.rand(1, 3, 16, 16, generator=seeded())


def controlnet(unet: Any, kind: Any = ControlNetModel, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = kind.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32))
    return awake(net)


def awake(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return net.eval()


def pipeline(kind: Any = StableDiffusionControlNetPipeline, several: bool = False, **more: Any) -> Any:
    base = tiny_pipelines.stable_diffusion()
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    net = controlnet(base.unet)
    net = [net, controlnet(base.unet, seed=2)] if several else net
    pipe = kind(**parts, controlnet=net, requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **more: Any) -> Tensor:
    source = torch.Generator().manual_seed(5)
    text = {name: torch.randn(1, 5, 16, generator=source) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call = {"image": PICTURE, "num_inference_steps": 3, "guidance_scale": 4.0, "generator": seeded(), "output_type": "latent"}
    return pipe(**{**call, **text, **more}).images


Seen = list[tuple[str, str, int, int | None, dict[str, list[bool]]]]


def noting(model: Any, seen: Seen, *stacks: str) -> Any:
    def note(call: Call) -> HeadGain:
        assert call.site is not None and call.tokens is not None and not call.tokens.unknown
        clock = call.clock
        seen.append((call.site.stack, clock.phase, clock.step, clock.steps, {n: r.tolist() for n, r in clock.branches.items()}))
        return HeadGain(factor=1.001)

    table = reattend.sites(model)
    ones = [next(site.name for site in table if site.stack.startswith(stack)) for stack in stacks]
    return attach(model, [Plan("note", [Edits(table.where(lambda site: site.name in ones), note)])])


HALVES = {"unconditional": [True, False], "conditional": [False, True]}


def test_a_controlnet_knows_where_the_run_stands() -> None:
    pipe, seen = pipeline(), []
    with noting(pipe, seen, "controlnet", "denoiser"):
        draw(pipe)
    assert seen == [(stack, "denoise", step, 3, HALVES) for step in range(3) for stack in ("controlnet", "denoiser.down")]


def test_a_controlnet_that_guesses_sees_the_conditional_half_alone() -> None:
    pipe, seen = pipeline(), []
    with noting(pipe, seen, "controlnet", "denoiser"):
        draw(pipe, guess_mode=True)
    assert [entry[4] for entry in seen] == [{"conditional": [True]}, HALVES] * 3
    assert [entry[2] for entry in seen] == [0, 0, 1, 1, 2, 2]


def test_a_controlnet_beside_a_perturbed_part() -> None:
    pipe, seen = pipeline(StableDiffusionControlNetPAGPipeline, pag_applied_layers="mid"), []
    with noting(pipe, seen, "controlnet", "denoiser"):
        draw(pipe, pag_scale=2.0, num_inference_steps=1)
    halves = {"unconditional": [True, False, False], "conditional": [False, True, False]}
    assert [entry[4] for entry in seen] == [halves, halves] or [entry[4] for entry in seen] == [HALVES, halves]


def test_several_controlnets_and_a_session_on_one_of_them() -> None:
    pipe, seen = pipeline(several=True), []
    table = reattend.sites(pipe).stack("controlnet")
    assert {site.name.split(".")[2] for site in table} == {"0", "1"} and len({site.layer for site in table}) > 1
    with noting(pipe, seen, "controlnet"):
        draw(pipe, image=[PICTURE, PICTURE])
    assert [entry[1:] for entry in seen] == [("denoise", step, 3, HALVES) for step in range(3)]
    seen.clear()
    single = pipeline()
    with noting(single.controlnet, seen, "controlnet"):
        draw(single)
    assert [entry[1:] for entry in seen] == [("denoise", step, 3, HALVES) for step in range(3)]


def test_edits_act_in_a_controlnet_and_leave_no_trace() -> None:
    pipe = pipeline()
    before, table = draw(pipe), reattend.sites(pipe).stack("controlnet")

    def prompted(call: Call) -> HeadGain | None:
        rows = call.clock.rows("conditional", call.batch)
        return None if rows is None else HeadGain(factor=0.0, rows=rows[:, None])

    with attach(pipe, [Plan("prompted", [Edits(table, prompted)])]) as session:
        changed = draw(pipe)
    assert session.applied == 3 * len(table) and not torch.equal(changed, before)
    assert torch.equal(draw(pipe), before)


def test_a_guide_beside_a_controlnet_grows_the_denoisers_batch_alone() -> None:
    pipe, seen = pipeline(), []
    with noting(pipe, seen, "controlnet"), reattend.apply(pipe, "softpag", strength=1.0, scale=3.0):
        draw(pipe)
    assert [entry[4] for entry in seen] == [HALVES] * 3


def test_a_loop_of_the_users_own_with_a_controlnet() -> None:
    pipe, seen = pipeline(), []
    pipe.scheduler.set_timesteps(2)
    x, text = torch.randn(1, 4, 8, 8, generator=seeded()), torch.randn(2, 5, 16, generator=seeded())
    with noting(pipe, seen, "controlnet", "denoiser"), torch.no_grad(), reattend.rows("unconditional", "conditional"):
        for t in pipe.scheduler.timesteps:
            both = torch.cat([x, x])
            down, mid = pipe.controlnet(both, t, text, PICTURE.repeat(2, 1, 1, 1), return_dict=False)
            pipe.unet(both, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert [entry[2:] for entry in seen] == [(step, 2, HALVES) for step in range(2) for _ in range(2)]


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    net = SD3ControlNetModel.from_transformer(
        copy.deepcopy(model), num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    return awake(net), {**inputs, "controlnet_cond": torch.randn(2, 4, 8, 8)}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    net = FluxControlNetModel.from_transformer(
        model,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        load_weights_from_transformer=False,
    )
    return awake(net), {**inputs, "controlnet_cond": torch.randn(2, 16, 4)}


def sd() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = tiny_denoisers.build("UNet2DConditionModel")
    return controlnet(model), {**inputs, "controlnet_cond": torch.rand(2, 3, 16, 16)}


def several() -> tuple[nn.Module, dict[str, Any]]:
    net, inputs = sd()
    picture = inputs["controlnet_cond"]
    return MultiControlNetModel([net, copy.deepcopy(net)]), {
        **inputs, "controlnet_cond": [picture, picture], "conditioning_scale": [1.0, 0.5],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.*:FutureWarning")
@pytest.mark.parametrize("build", [sd, several, sd3, flux])
def test_a_controlnet_alone_is_a_network_of_its_own_stack(build: Any) -> None:
    net, inputs = build()
    table, seen = reattend.sites(net), []
    assert {site.stack for site in table} == {"controlnet"} and not table.problems
    kinds = {site.kind for site in table}
    assert kinds == {"self", "cross"} if build in (sd, several) else kinds == {"joint"}

    def note(call: Call) -> HeadGain:
        assert call.tokens is not None
        text = call.tokens.roles["text"]
        seen.append((call.clock.phase, int(text.sum(dim=1).max())))
        return HeadGain(factor=0.5)

    with torch.no_grad():
        before = net(**inputs, return_dict=False)
        with attach(net, [Plan("note", [Edits(table, note)])]) as session:
            changed = net(**inputs, return_dict=False)
        after = net(**inputs, return_dict=False)
    assert session.applied == len(seen) == len(table) and {phase for phase, _ in seen} == {"denoise"}
    assert {length for _, length in seen} == ({0, tiny_denoisers.TEXT} if "self" in kinds else {tiny_denoisers.TEXT})
    assert torch.equal(after[0][-1], before[0][-1]) and not torch.equal(changed[0][-1], before[0][-1])
