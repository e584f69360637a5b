"""pag: the default layer of every denoiser."""

from types import SimpleNamespace

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks.doors.guide import away
from reattend.interventions import Call, Clock, Site, TokenMap

EXAMPLES = {"": Example("diffusion", {"scale": 3.0}, off={"scale": 0}, layers=1)}
BAD = [
    ({"adaptive": -0.1}, "adaptive"),
    ({"scope": "text"}, "scope"),
    ({"rescale": 1.5}, "rescale"),
    ({"layers": [1], "heads": [(0, 1)]}, "layers or heads, not both"),
    ({"layers": []}, "must not be empty"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
]

COMBINED = ("combine_cfg", "combine_nocfg", "combine_adaptive_clamped")
ATTENDED = ("unet_selfattn_cfg", "unet_selfattn_nocfg", "mmdit_joint_cfg", "mmdit_joint_nocfg")
GOLDEN = (*COMBINED, *ATTENDED, "identity_guided_diffusion")
SITES = {kind: Site(name, 0, "denoiser", kind, 2, 2, 4, False) for name, kind in (("attn1", "self"), ("attn", "joint"))}


def golden(name, run):
    """The formula of the official pipelines, or their processors' attention, whose last chunk of rows is perturbed."""
    data, facts = golden_file("pag", name)
    if name in COMBINED:
        chunks = data["noise_pred"].chunk(3 if facts["cfg"] == "True" else 2)
        recipe = reattend.recipe("pag", scale=float(facts["pag_scale"]), adaptive=float(facts["pag_adaptive_scale"]))
        scale = recipe.scale_at(Clock("denoise", scheduled=float(facts["t"])))
        x = chunks[-2] if len(chunks) == 2 else chunks[0] + float(facts["guidance_scale"]) * (chunks[1] - chunks[0])
        yield x + away(SimpleNamespace(scale=scale, conditional=chunks[-2], branch=chunks[-1])), data["guided"]
        return
    if name == "identity_guided_diffusion":
        parts = data["qkv"].unflatten(1, (int(facts["n_heads"]), 3, -1)).unbind(dim=2)
        q, k, v = (part.transpose(2, 3) for part in parts)
        output = perturbed(Call(q, k, v, site=SITES["self"]), 1, run)
        yield output.transpose(2, 3).flatten(1, 2), data["out_perturbed"]
        return

    def heads(x, weight):
        projected = torch.nn.functional.linear(x, data[f"w.{weight}.weight"], data.get(f"w.{weight}.bias"))
        return projected.unflatten(2, (int(facts["heads"]), -1)).transpose(1, 2)

    def back(x, weight):
        return torch.nn.functional.linear(x.transpose(1, 2).flatten(2), data[f"w.{weight}.weight"], data[f"w.{weight}.bias"])

    x, chunks = data["x"], int(facts["chunks"])
    parts = [heads(x, f"to_{part}") for part in "qkv"]
    if "ctx" not in data:
        call = Call(*parts, site=SITES["self"])
        yield back(perturbed(call, chunks, run), "to_out.0"), data["out"]
        yield back(run(call, []), "to_out.0"), data["out_plain"]
        return
    parts = [torch.cat([own, heads(data["ctx"], f"add_{part}_proj")], dim=2) for own, part in zip(parts, "qkv")]
    batch, image, total = len(x), x.shape[1], parts[0].shape[2]
    is_image = (torch.arange(total) < image).expand(batch, -1)
    tokens = TokenMap(batch, total, total, {"image": is_image, "text": ~is_image})
    output = perturbed(Call(*parts, site=SITES["joint"], tokens=tokens), chunks, run)
    yield back(output[:, :, :image], "to_out.0"), data["out_img"]
    yield back(output[:, :, image:], "to_add_out"), data["out_txt"]


def perturbed(call, chunks, run):
    branch = torch.arange(call.batch) >= call.batch - call.batch // chunks
    call.clock = Clock("denoise", branches={"pag": branch})
    return run(call, [reattend.recipe("pag").weaken(None, call)])


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"pictures": ["pag:scale=1", "pag", "pag:rescale=0.7", "pag:adaptive=0.006", "pag:layers=[8]"]}
GALLERY = {"parameters": {"scale": 2.0}, "look": "Whether shapes are whole, and have the colours of the prompt."}
