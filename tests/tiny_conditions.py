"""What users do with a stock pipeline besides calling it: other schedulers, pipelines from its parts, adapters, offload, callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import tiny_pipelines
import torch
from tiny_runs import draw, flux, seeded
from torch import Tensor

STEPS = 4
PICTURE = torch.rand(1, 3, 16, 16, generator=seeded())
MASK = PICTURE[:, :1].round()
CALL = {"prompt": "a fox", "guidance_scale": 4.0, "num_inference_steps": STEPS}
# of eight steps these pipelines draw half
HALF = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 2 * STEPS}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Condition:
    """make: a pipeline for the method and what draws with it, perhaps with another pipeline. passes: of the denoiser, by step. steps: of all
    its runs together.

    like: what must give the same picture under the same method. case: of `tiny_runs`; a method that refuses it is not asked.
    """

    make: Callable[[], tuple[Any, Run]]
    passes: tuple[int, ...] = (1,) * STEPS
    steps: int = STEPS
    like: Callable[[], tuple[Any, Run]] | None = None
    case: str = "SD"


def stable_diffusion(**call: Any) -> tuple[Any, Run]:
    pipe = tiny_pipelines.stable_diffusion()
    return pipe, lambda: draw(pipe, CALL, **call)


def encoded(prompt: str, pipe: Any) -> Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


# -- prompts and pictures ------------------------------------------------------------------------------------------------


def embedded() -> tuple[Any, Run]:
    """The prompts as tensors."""
    pipe = tiny_pipelines.stable_diffusion()

    def run() -> Tensor:
        texts = {"prompt_embeds": encoded("a fox", pipe), "negative_prompt_embeds": encoded("a dog", pipe)}
        return draw(pipe, CALL, prompt=None, **texts)

    return pipe, run


NOISE = torch.randn(2, 4, 8, 8, generator=seeded())


def two_pictures() -> tuple[Any, Run]:
    return stable_diffusion(num_images_per_prompt=2, latents=NOISE)


def one_by_one() -> tuple[Any, Run]:
    pipe = tiny_pipelines.stable_diffusion()
    return pipe, lambda: torch.cat([draw(pipe, CALL, latents=NOISE[row, None]) for row in (0, 1)])


# -- schedulers ----------------------------------------------------------------------------------------------------------

ONCE = (1,) * STEPS
# Heun's second evaluation is at the timestep of the step after, those of KDPM2 lie between two steps
TWICE = (1, *(2,) * (STEPS - 1))
BETWEEN = (*(2,) * (STEPS - 1), 1)
SCHEDULERS = {
    "EulerDiscreteScheduler": ONCE,
    "DPMSolverMultistepScheduler": ONCE,
    "HeunDiscreteScheduler": TWICE,
    "KDPM2DiscreteScheduler": BETWEEN,
    # as Stable Diffusion's files set it: its second step is evaluated twice
    "PNDMScheduler": (1, 2, 1, 1),
}


def scheduled(name: str) -> Callable[[], tuple[Any, Run]]:
    def make() -> tuple[Any, Run]:
        pipe, run = stable_diffusion()
        more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
        return pipe, run

    return make


# -- pipelines made from the parts of the one that the method is applied to --------------------------------------------------


def parts(pipe: Any, **more: Any) -> dict[str, Any]:
    return {
        **{n: part for n, part in pipe.components.items() if n != "image_encoder"},
        "requires_safety_checker": False,
        **more,
    }


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_parts(kind: str, inside: bool = False, own: bool = False, **call: Any) -> Callable[[], tuple[Any, Run]]:
    """inside: it is made by from_pipe, anew for each picture. own: the method is applied to it, not to the one that it is made from."""

    def make() -> tuple[Any, Run]:
        pipe, cls = tiny_pipelines.stable_diffusion(), getattr(diffusers, kind)
        more = {"controlnet": tiny_pipelines.controlnet()} if "ControlNet" in kind else {}
        if inside:
            return pipe, lambda: draw(quiet(cls.from_pipe(pipe, **more)), CALL, **call)
        second = quiet(cls(**parts(pipe, **more)))
        return second if own else pipe, lambda: draw(second, CALL, **call)

    return make


def of_sd3(own: bool = False) -> tuple[Any, Run]:
    pipe = tiny_pipelines.stable_diffusion_3()
    second = quiet(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    return second if own else pipe, lambda: draw(second, CALL, **HALF)


def of_flux(own: bool = False) -> tuple[Any, Run]:
    """Guided in two calls."""
    pipe, call, _, _ = flux()
    second = quiet(diffusers.FluxImg2ImgPipeline.from_pipe(pipe))
    return second if own else pipe, lambda: draw(second, {**call, **HALF})


INPAINT = {**HALF, "mask_image": MASK, "height": 16, "width": 16}

# -- adapters ------------------------------------------------------------------------------------------------------------


def low_rank(pipe: Any) -> dict[str, Tensor]:
    """A LoRA of all projections of attention."""
    source = torch.Generator().manual_seed(4)
    found = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            for half, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                found[f"unet.{name}.lora_{half}.weight"] = 0.5 * torch.randn(shape, generator=source)
    return found


def lora(fused: bool = False) -> tuple[Any, Run]:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.load_lora_weights(low_rank(pipe))
    if fused:
        pipe.fuse_lora(lora_scale=0.5)
    return pipe, lambda: draw(pipe, CALL, **({} if fused else {"cross_attention_kwargs": {"scale": 0.5}}))


def ip_adapter(scale: float = 0.7) -> tuple[Any, Run]:
    pipe, source = tiny_pipelines.stable_diffusion(), torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    cross = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    projections = {
        f"{2 * i + 1}.{name}.weight": noise(module.to_q.out_features, 16)
        for i, module in enumerate(cross)
        for name in ("to_k_ip", "to_v_ip")
    }
    image = {"proj.weight": noise(4 * 16, 8), "proj.bias": noise(4 * 16), "norm.weight": noise(16), "norm.bias": noise(16)}
    pipe.load_ip_adapter(
        {"image_proj": image, "ip_adapter": projections}, subfolder="", weight_name="", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(scale)
    embeds = [noise(2, 1, 8)]  # of no picture, and of one
    return pipe, lambda: draw(pipe, CALL, ip_adapter_image_embeds=embeds)


# -- offload, callbacks --------------------------------------------------------------------------------------------------


def offloaded(by: str) -> tuple[Any, Run]:
    """By accelerate's hooks, as enable_model_cpu_offload and enable_sequential_cpu_offload put them on, with the CPU as the accelerator."""
    import accelerate

    pipe, run = stable_diffusion()
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        if by == "model":
            accelerate.cpu_offload_with_hook(part, execution_device="cpu")
        else:
            accelerate.cpu_offload(part, execution_device="cpu")
    return pipe, run


def interrupted() -> tuple[Any, Run]:
    """Stopped by a callback after its second step, as documented; then drawn whole."""
    pipe, run = stable_diffusion()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    def both() -> Tensor:
        draw(pipe, CALL, callback_on_step_end=stop)
        return run()

    return pipe, both


def unguided_end() -> tuple[Any, Run]:
    """A callback that switches guidance off after the second step, as documented."""

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return stable_diffusion(callback_on_step_end=switch, callback_on_step_end_tensor_inputs=["prompt_embeds"])


CONDITIONS = {
    "negative prompt": Condition(lambda: stable_diffusion(negative_prompt="a dog"), like=embedded),
    "two pictures": Condition(two_pictures, like=one_by_one),
    "no guidance": Condition(lambda: stable_diffusion(guidance_scale=1.0), like=lambda: stable_diffusion(guidance_scale=0.0)),
    "rescaled guidance": Condition(lambda: stable_diffusion(guidance_rescale=0.7)),
    **{name: Condition(scheduled(name), passes) for name, passes in SCHEDULERS.items()},
    "img2img": Condition(
        from_parts("StableDiffusionImg2ImgPipeline", inside=True, **HALF),
        like=from_parts("StableDiffusionImg2ImgPipeline", own=True, **HALF),
    ),
    "img2img, SD3": Condition(of_sd3, like=lambda: of_sd3(own=True), case="SD3"),
    "img2img, Flux": Condition(of_flux, like=lambda: of_flux(own=True), case="Flux, two calls"),
    "inpaint": Condition(
        from_parts("StableDiffusionInpaintPipeline", **INPAINT),
        like=from_parts("StableDiffusionInpaintPipeline", own=True, **INPAINT),
    ),
    "ControlNet": Condition(from_parts("StableDiffusionControlNetPipeline", inside=True, image=PICTURE)),
    "ControlNet without weight": Condition(
        from_parts("StableDiffusionControlNetPipeline", image=PICTURE, controlnet_conditioning_scale=0.0), like=stable_diffusion
    ),
    "LoRA": Condition(lora, like=lambda: lora(fused=True)),
    "IP-Adapter": Condition(ip_adapter),
    "IP-Adapter without weight": Condition(lambda: ip_adapter(0.0), like=stable_diffusion),
    "model offload": Condition(lambda: offloaded("model"), like=stable_diffusion),
    "sequential offload": Condition(lambda: offloaded("layer"), like=stable_diffusion),
    "interrupted": Condition(interrupted, (2, 2, 1, 1), steps=STEPS + 2, like=stable_diffusion),
    "guidance switched off": Condition(unguided_end),
}
