"""Perturbed-attention guidance (PAG; Ahn et al., ECCV 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance").

Fixes: weak structure in generated images, also of an empty prompt and without classifier-free guidance. A further branch of the denoiser
runs with the attention of chosen layers replaced by the identity, so that each place sees itself alone; the prediction is pushed away.
Acts on: self (UNet, cross-attention DiT, also the linear one of Sana) or joint attention (MM-DiT) of the branch alone, all heads of a
layer; the conditional and unconditional rows are computed as without the recipe. The layer's output there is its values: no queries, keys
or softmax. In a joint stream image tokens still see all of the text and text tokens stay as they are, as in diffusers' PAG pipeline for
SD3 (`scope` "masked", the default); "image" cuts the text off too, "all" does this to every token.
Conventions: scale counts as `pag_scale` of diffusers does, eps + scale (eps - eps_branch); the authors' own code counts one more. `adaptive`
is its `pag_adaptive_scale`. Layers are numbers: of SD 1.5 "mid" is 6, "down.block_2.attentions_0" is 4, of SD3, PixArt, HunyuanDiT or Sana
"blocks.13" is 13, of SDXL "mid" is 24 to 33 (one per transformer block). diffusers' own patterns are searched for in names, so that
"blocks.1" there means 1 and 10 to 19.
Ours: the default layer of models other than UNets, and the way in which adaptive counts where a scheduler calls the denoiser twice a step:
both calls count as the step's. Too large a scale greys or over-saturates: `rescale`, or the pipeline's own guidance_rescale, helps.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..interventions import Call, Clock, Edit, ReattendError
from .kit.base import Info
from .kit.guidance import IdentityGuidance


class PAG(IdentityGuidance):
    slug = "pag"
    info = Info(
        does="Pushes an image away from a copy in whose chosen layers each place saw only itself: clearer structure.",
        paper="Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
        year=2024,
        arxiv="2403.17377",
        families=("guidance",),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture lacks structure and detail",),
        try_first={"scale": 3.0},
        sweep={"scale": (1.0, 2.0, 3.0, 5.0)},
        code="cvlab-kaist/Perturbed-Attention-Guidance",
    )

    adaptive: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much the scale falls with each of the 1000 timesteps of training that are over: 0.003 takes a scale of 3 to 0 at "
        "the end, 0.006 half way; 0 = it stays",
    )
    scope: Literal["image", "all", "masked"] = Field(
        "masked",
        description="rows weakened where image and text share a stream: image tokens that still see the text, as diffusers' SD3 PAG "
        'pipeline has it ("masked"), image tokens that see themselves alone ("image"), or all tokens alone ("all")',
    )

    @property
    def neutral(self) -> bool:
        return False

    def scale_at(self, clock: Clock) -> float:
        """p_t = max(0, p - a (1000 - t)), t the scheduler's timestep."""
        if self.adaptive == 0:
            return self.scale
        if clock.scheduled is None:
            raise ReattendError(
                "pag: adaptive needs the scheduler's timestep, and no schedule is known here (a bare denoiser has none): apply the recipe to "
                "the pipeline, or leave adaptive at 0"
            )
        return max(0.0, self.scale - self.adaptive * (1000 - clock.scheduled))

    def perturbed(self, call: Call, heads: list[int] | None, rows: Tensor) -> Edit:
        """A' = I."""
        return self.towards_itself(call, 1.0, heads, rows)
