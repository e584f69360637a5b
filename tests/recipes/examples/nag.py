"""nag: the text sites of every denoiser, with a negative text given as tensors, or encoded by the pipeline."""

import json
import tempfile
from pathlib import Path

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks import SecondText
from reattend.interventions import Call, Clock, Site, TokenMap
from reattend.interventions.edits.second import extrapolated
from reattend.recipes.kit.second_texts import text_sites
from safetensors.torch import save_file
from tiny_denoisers import DENOISERS, TEXT


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


FOLDER = tempfile.TemporaryDirectory()


def saved(name, tensors):
    """The file of a negative text."""
    path = str(Path(FOLDER.name) / f"{name}.safetensors")
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


TOKENS = saved("tokens", {"prompt_embeds": noise(1, TEXT, 8)})
POOLED = saved("pooled", {"prompt_embeds": noise(1, TEXT, 8), "pooled_prompt_embeds": noise(1, 8)})
WITH_POOLED = (
    "SD3Transformer2DModel",
    "SD3Transformer2DModel (3.5)",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
)
WITHOUT = (
    "Lumina2Transformer2DModel", "AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "QwenImageTransformer2DModel",
)  # fmt: skip
NEVER = {
    "HunyuanDiT2DModel": "joins its text from several inputs",
    "MochiTransformer3DModel": "attends for each sample alone",
}
# the tiny pipelines of Stable Diffusion have texts of another width, those of Flux and PixArt no text encoders
ENCODING = ("SD", "SD, two images each", "SD, no guidance", "SD3", "SD3, two images, no guidance")
ENCODED = dict.fromkeys(ENCODING, "wide, those of the prompt")
BY_TENSORS = dict.fromkeys(("Flux, two calls", "Flux, no guidance", "PixArt"), "has no text encoder")
BARE = "is a bare denoiser and encodes no text"


def layers(sites):
    return len(text_sites(sites))


STRONG = {"scale": 8.0, "limit": 10.0, "strength": 1.0}
OFF = {"scale": 1}
EXAMPLES = {
    "": Example(
        "diffusion",
        {"negative": "a dog", **STRONG},
        off=OFF,
        layers=layers,
        refused={**dict.fromkeys(DENOISERS, BARE), **BY_TENSORS, **dict.fromkeys(ENCODING, "")},
    ),
    "tensors": Example(
        "diffusion",
        {"tensors": TOKENS, **STRONG},
        off=OFF,
        layers=layers,
        refused={**NEVER, **ENCODED, **dict.fromkeys(WITH_POOLED, "reads a pooled text beside the tokens"), **dict.fromkeys(
            ("Flux, two calls", "Flux, no guidance"), "reads a pooled text beside the tokens"
        )},
    ),
    "pooled": Example(
        "diffusion",
        {"tensors": POOLED, **STRONG},
        off=OFF,
        layers=layers,
        refused={**NEVER, **ENCODED, **dict.fromkeys(WITHOUT, "reads no pooled text")},
    ),
}  # fmt: skip
BAD = [
    ({"scale": 0.5}, "scale"),
    ({"strength": 1.5}, "strength"),
    ({"norm": "l3"}, "norm"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
    ({"negative": "a dog", "tensors": POOLED}, "negative or as tensors, not both"),
    ({"tensors": "nowhere.safetensors"}, "tensors must be a safetensors file"),
]

GOLDEN = ("formula_l1", "cross_no_cfg", "cross_cfg", "sd3_joint_cfg", "flux_double", "flux_single", "flux_model")


def method(facts):
    return reattend.recipe(
        "nag", **{name: float(facts[f"nag_{given}"]) for name, given in (("scale", "scale"), ("limit", "tau"), ("strength", "alpha"))},
        norm=f"l{facts['norm_p']}",
    )  # fmt: skip


def rows_of(names, count):
    """{name: bool [rows]} of a batch of these parts, `count` rows each."""
    return {name: torch.tensor([part == name for part in names]).repeat_interleave(count) for name in names}


def joined(output):
    return output.transpose(1, 2).flatten(2)


def golden(name, run):
    """The formula, one call of attention at a time, and a whole model."""
    data, facts = golden_file("nag", name)
    nag = method(facts)
    if name == "formula_l1":
        positive, negative = (data[which].unflatten(2, (3, 8)).transpose(1, 2) for which in ("z_positive", "z_negative"))
        yield joined(extrapolated(positive, negative, nag.scale, nag.limit, nag.strength, nag.norm)), data["out"]
    elif facts["kind"] == "cross":
        yield from cross(nag, data, int(facts["origin_batch"]), run)
    elif name == "flux_model":
        yield from model(nag, data, json.loads(facts["config"]))
    else:
        yield from joint(nag, data, facts, run)


def cross(nag, data, count, run):
    """Rows [(unconditional,) positive, nag]: the last part is but keys and values here."""
    parts = ("unconditional", "conditional")[2 - (len(data["query"]) // count - 1) :]
    query, key, value = (data[which][:-count] for which in ("query", "key", "value"))
    second = [data[which][-count:].repeat(len(parts), 1, 1, 1) for which in ("key", "value")]
    call = Call(query, key, value, site=site("cross"), clock=Clock("denoise", branches=rows_of(parts, count)))
    edits = nag.push(call, SecondText(*second), nag.scale, nag.strength)
    yield joined(run(call, edits)), data["before_to_out"]


def joint(nag, data, facts, run):
    """Rows [(unconditional,) positive, nag], with image tokens first or last."""
    if "query" in data:
        query, key, value = (data[which] for which in ("query", "key", "value"))
    else:
        query, key, value = (
            torch.cat([data[f"{which}_{half}"] for half in ("positive", "negative")]) for which in ("query", "key", "value")
        )
    parts, n = ("unconditional", "conditional", "nag")[3 - len(query) :], query.shape[2]
    image = torch.zeros(len(query), n, dtype=torch.bool)
    image[:, slice(int(facts["image_length"])) if "image_length" in facts else slice(int(facts["text_length"]), None)] = True
    partner = torch.arange(len(query))
    partner[-2:] = partner[-2:].flip(0)
    clock, tokens = Clock("denoise", branches=rows_of(parts, 1)), TokenMap(len(query), n, n, {"image": image, "text": ~image})
    call = Call(query, key, value, site=site("joint"), clock=clock, tokens=tokens)
    text = SecondText(rows=clock.branches["nag"], partner=partner)
    found = joined(run(call, nag.push(call, text, nag.scale, nag.strength)))
    if "out" in data:
        yield found, data["out"]
        return
    pictures, texts = found[image].view(len(query), -1, found.shape[2]), found[~image].view(len(query), -1, found.shape[2])
    yield pictures[:-1], data["image_before_to_out"]
    yield texts, data["text_before_to_add_out"]


@torch.no_grad()
def model(nag, data, config):
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(**config).eval()
    flux.load_state_dict({name[2:]: value for name, value in data.items() if name.startswith("w.")})
    inputs = {
        "hidden_states": data["latents"], "encoder_hidden_states": data["prompt_embeds"][:1], "pooled_projections": data["pooled"][:1],
        "timestep": data["timestep"][:1], "img_ids": data["img_ids"], "txt_ids": data["txt_ids"],
    }  # fmt: skip
    yield flux(**inputs)[0], data["output_plain"]
    for row, wanted in ((1, "output_nag"), (0, "output_plain")):
        negative = {"prompt_embeds": data["prompt_embeds"][row, None], "pooled_prompt_embeds": data["pooled"][row, None]}
        with reattend.apply(flux, nag.model_copy(update={"tensors": saved(wanted, negative)})):
            yield flux(**inputs)[0], data[wanted]


def site(kind):
    return Site("attn", 0, "denoiser", kind, 2, 2, 8, False, "sdpa")


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"negatives": ["nag", "nag:scale=6", "nag:scale=6:limit=5:strength=1"]}
PAPER = {
    "negatives": "as recalled, not read again: Flux-schnell on COCO-5K, CLIP 31.4 to 32.0, FID 25.5 to 24.5, ImageReward 1.03 to 1.10"
}
GALLERY = {
    "model": "shapes-turbo", "steps": 4, "guidance": 1.0, "parameters": {"scale": 6.0},
    "look": "Whether the thing that the negative text names stays away, and the others stay. With limit 5 and strength 1 as well, more "
    "stays away, but no picture is left.",
}  # fmt: skip
