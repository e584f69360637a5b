"""How diffusers' pipelines lay out classifier-free guidance, by the code that calls the denoiser: which part of a batch is which.

Nothing says it at run time, so it was read, pipeline by pipeline, and stands here; code that does not stand here is unknown. The tests
read every pipeline of the installed diffusers against this table (tests/hooks/test_halves.py) and run one of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Layout = tuple[str, ...]

PARTS = {"c": "conditional", "u": "unconditional", "-": ""}


@dataclass(frozen=True)
class Guidance:
    """How a pipeline guides.

    batch: the parts of its batch when it guides in one call ("c" the prompt's, "u" the negative prompt's, "-" neither), one entry for each
    way it does so; empty where it calls the denoiser once for each half, the conditional one first, or never guides. joined: the dimension
    along which a picture of each part's own follows the latents, so that only the first half of it repeats; None where all of it does.
    guider: a guider of diffusers runs it and says what each call is.
    """

    batch: tuple[str, ...] = ()
    joined: int | None = None
    guider: bool = False

    def layout(self, hidden: Tensor | list[Tensor], perturbed: bool) -> Layout | None:
        """The names of the equal parts of a guided batch, in order; None where it has none. perturbed: one more part is at the end."""
        for parts in self.batch:
            layout = tuple(PARTS[part] for part in parts + "-" * perturbed)
            if repeats(hidden, len(layout), self.joined):
                return layout
        return None


def repeats(hidden: Tensor | list[Tensor], parts: int, joined: int | None = None) -> bool:
    """Whether a batch holds the same latents this many times. joined: see `Guidance`."""
    if len(hidden) % parts:
        return False
    if isinstance(hidden, list):
        step = len(hidden) // parts
        return all(a.shape == b.shape and a.equal(b) for i, a in enumerate(hidden[:step]) for b in hidden[i + step :: step])
    if joined is not None:
        hidden = hidden.narrow(joined, 0, hidden.shape[joined] // 2)
    first, *others = hidden.chunk(parts)
    return all(first.equal(other) for other in others)


NEGATIVE_FIRST = Guidance(("uc",))
POSITIVE_FIRST = Guidance(("cu",))
# in two calls, the conditional half first; or without guidance, where all of a batch is the prompt's
IN_TURN = Guidance()
GUIDER = Guidance(guider=True)

# folders of diffusers.pipelines (those of diffusers.pipelines.deprecated too) of which every pipeline is of one kind
_FOLDERS: Mapping[Guidance, str] = {
    NEGATIVE_FIRST: """
        allegro alt_diffusion amused animatediff anyflow audioldm audioldm2 aura_flow blip_diffusion bria
        bria_fibo cogvideo cogview3 consisid controlnet controlnet_hunyuandit controlnet_sd3 controlnet_xs
        deepfloyd_if easyanimate ernie_image hidream_image hunyuandit i2vgen_xl kandinsky kandinsky2_2
        kandinsky3 kolors latent_diffusion latte ltx ltx2 mochi musicldm pag paint_by_example pia pixart_alpha
        prx sana sana_video shap_e stable_audio stable_audio_3 stable_diffusion stable_diffusion_3
        stable_diffusion_gligen stable_diffusion_ldm3d stable_diffusion_panorama stable_diffusion_xl t2i_adapter
        text_to_video_synthesis unclip versatile_diffusion vq_diffusion""",
    POSITIVE_FIRST: "ace_step dit lumina stable_cascade wuerstchen z_image",
    IN_TURN: """
        audio_diffusion bria_fibo2 chroma chronoedit cogview4 consistency_models dance_diffusion ddim ddpm flux
        flux2 glm_image helios hunyuan_video kandinsky5 kandinsky6 krea2 latent_consistency_models
        latent_diffusion_uncond longcat_audio_dit longcat_image lucy lumina2 marigold nucleusmoe_image
        ovis_image pndm qwenimage qwenimage21 repaint score_sde_ve skyreels_v2 stochastic_karras_ve visualcloze
        wan""",
    GUIDER: "hunyuan_image hunyuan_video1_5 motif_video",
}  # fmt: skip
# modules that are of another kind than their folder, or whose folder holds several kinds; None: unknown
_MODULES: Mapping[str, Guidance | None] = {
    # the text, the picture and neither: of three predictions
    "pipeline_stable_diffusion_instruct_pix2pix": Guidance(("c-u",), joined=1),
    "pipeline_stable_diffusion_xl_instruct_pix2pix": Guidance(("c-u",), joined=1),
    "pipeline_dreamlite": Guidance(("u-c", "uc"), joined=3),
    "pipeline_dreamlite_mobile": IN_TURN,
    "pipeline_omnigen": Guidance(("cu-", "cu")),
    "pipeline_stable_video_diffusion": Guidance(("uc",), joined=2),
    "pipeline_cosmos_text2world": IN_TURN,
    "pipeline_cosmos_video2world": IN_TURN,
    "pipeline_cosmos2_text2image": IN_TURN,
    "pipeline_cosmos2_video2world": IN_TURN,
    "pipeline_cosmos2_5_predict": IN_TURN,
    "pipeline_cosmos2_5_transfer": IN_TURN,
    "pipeline_joyimage_edit": IN_TURN,
    "pipeline_joyimage_edit_plus": NEGATIVE_FIRST,
    "pipeline_sana_wm": NEGATIVE_FIRST,
    "pipeline_stable_diffusion_inpaint_legacy": NEGATIVE_FIRST,
    "pipeline_stable_diffusion_model_editing": NEGATIVE_FIRST,
    # of one call it uses this half, of another that one
    "pipeline_stable_diffusion_gligen_text_image": None,
}
_BY_FOLDER = {folder: kind for kind, folders in _FOLDERS.items() for folder in folders.split()}


def guidance_of(module: str) -> Guidance | None:
    """How the pipeline guides whose code is in this module; None where it is not known."""
    package, _, rest = module.partition(".pipelines.")
    if package != "diffusers" or "." not in rest:
        return None
    folder, name = rest.split(".")[-2:]
    return _MODULES[name] if name in _MODULES else _BY_FOLDER.get(folder)
