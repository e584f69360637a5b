"""Maps of words against the materialised matrix, and against those of DAAM's own code."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks import Capture, Edits, Guide, Plan, Words, attach
from reattend.interventions import Call, Clock, Gain, ReattendError, Site, TokenGrid, TokenMap, reference_with_weights
from reattend.recipes.kit.denoisers import text_sites
from reattend.recipes.kit.heat import Heat
from tiny_conditions import ip_adapter, stable_diffusion
from tiny_prompts import FAMILIES
from torch import Tensor

PROMPT = "a red circle and the sky"


@pytest.mark.parametrize("family", ["SD", "SD3", "AuraFlow"])
def test_maps_are_those_of_the_matrix(family: str) -> None:
    pipe, given = FAMILIES[family]()
    if family == "AuraFlow":
        given = {**given, "height": 64, "width": 64}
    table = text_sites(reattend.sites(pipe))
    heat, whole = Heat(table, Words("w", [["red", "sky"]])), {}

    def keep(call: Call, edits: Any) -> None:
        conditional = call.clock.branches.get("conditional")
        if conditional is None:
            return
        assert call.site is not None
        weights, column = reference_with_weights(call, list(edits))[1].mean(dim=1), call.columns("w.0")
        # unconditional, conditional, the guide's
        image = call.query_rows("image")[1]
        found = weights[1][image][:, column[1]].mean(dim=1)
        whole[call.site.name] = whole.get(call.site.name, 0) + found.view(*(math.isqrt(len(found)),) * 2)

    def strengthen(call: Call) -> Gain | None:
        rows = call.clock.rows("conditional", call.batch)
        return None if rows is None else Gain(columns=call.columns("w.0"), factor=2.0, rows=rows[:, None])

    plan = Plan("look", [*heat.steps, Edits(table, strengthen), Capture(table, keep), Guide("other", 1.0)])
    with attach(pipe, [plan]):
        for _ in range(2):  # maps are those of the last run
            whole.clear()
            pipe(prompt=PROMPT, num_inference_steps=2, output_type="latent", **given)
    size = max((tuple(map.shape) for map in whole.values()), key=lambda shape: shape[0])
    large = [
        torch.nn.functional.interpolate(m[None, None], size=size, mode="bicubic").clamp_min(0)[0, 0] for m in whole.values()
    ]
    found = heat.map("w.0")
    assert len(whole) == len(table) and found.shape == (1, *size) and found.min() >= 0
    # enlarging by heads leaves out what falls below 0 in each of them
    alike = [n for n, m in enumerate(whole.values()) if tuple(m.shape) == size]
    if len(alike) == len(whole):
        torch.testing.assert_close(found[0], torch.stack(large).sum(dim=0), atol=1e-5, rtol=1e-5)
    for name, map in whole.items():
        torch.testing.assert_close(heat.kept[name]["w.0"][0].mean(dim=0), map, atol=1e-5, rtol=1e-5)
    assert heat.map("w.1", (5, 7)).shape == (1, 5, 7)
    with pytest.raises(ReattendError, match="'fox' is no role of these words; they have: w, w.0, w.1"):
        heat.map("fox")


def test_the_pictures_of_an_image_prompt_are_no_words() -> None:
    maps = []
    for pipe, run in (ip_adapter(0.0), stable_diffusion()):
        heat = Heat(text_sites(reattend.sites(pipe)), Words("w", [["a"]]))
        with attach(pipe, [Plan("look", heat.steps)]):
            run()
        maps.append(heat.map("w.0"))
    torch.testing.assert_close(*maps)


def test_nothing_was_read() -> None:
    pipe, _ = FAMILIES["SD"]()
    with pytest.raises(ReattendError, match="no maps were read"):
        Heat(text_sites(reattend.sites(pipe)), Words("w", [["red"]])).map("w")


def test_the_maps_of_daam() -> None:
    """Its mean over layers and heads is our sum over sites by their number."""
    data, facts = golden_file("heat", "daam")
    words = Words("w", columns=[[[0], [1], [2], [3], [4], [1, 2]]])
    layers = json.loads(facts["layers"])
    sites = reattend.hooks.SiteTable(
        [Site(f"layer{n}", n, "denoiser.down", "cross", 2, 2, 7, False, "sdpa") for n in range(len(layers))], {}, "UNet"
    )
    heat, memory = Heat(sites, words), {}
    for n, (side, steps) in enumerate(layers):
        for step in range(steps):
            heat.read(daam_call(data[f"probs_layer{n}_step{step}"], sites[n], side, step, memory), [])
    size = (math.isqrt(int(facts["latent_hw"])),) * 2
    found = torch.stack([heat.map(f"w.{token}", size)[0] for token in range(5)]) / len(layers)
    torch.testing.assert_close(found, data["global_heat_maps"], atol=1e-5, rtol=0)
    # theirs enlarges each token's map by itself, and lets none of them fall below 0
    torch.testing.assert_close(heat.map("w.5", size)[0] / len(layers), data["word_heat_map_tokens_1_2"], atol=2e-3, rtol=0)


def daam_call(probs: Tensor, site: Site, side: int, step: int, memory: dict[Any, Any]) -> Call:
    """A call whose weights are these [2 * heads, places, columns], the first half of them unconditional; a last column has the rest."""
    weights = torch.cat([probs, 1 - probs.sum(dim=2, keepdim=True)], dim=2).unflatten(0, (2, -1))
    batch, heads, places, columns = weights.shape
    key = torch.eye(columns).expand(batch, heads, -1, -1)
    marks = {f"w.{token}": torch.zeros(batch, columns, dtype=torch.bool) for token in range(6)}
    for token in range(5):
        marks[f"w.{token}"][:, token] = True
    marks["w.5"][:, 1:3] = True
    marks["w"] = torch.stack(list(marks.values())).any(dim=0)
    image = TokenMap(batch, places, places, {"image": torch.ones(batch, places, dtype=torch.bool)})
    image.grids = [TokenGrid.of_image(row, torch.arange(places).view(side, side)) for row in range(batch)]
    branches = {"unconditional": torch.tensor([True, False]), "conditional": torch.tensor([False, True])}
    return Call(
        weights.log(), key, key, scale=1.0, site=site, clock=Clock("denoise", step, branches=branches), memory=memory,
        tokens=TokenMap(batch, columns, columns, marks), query_tokens=image,
    )  # fmt: skip


def test_two_in_one_plan_hold_the_last_run_each() -> None:
    pipe, given = FAMILIES["SD"]()
    table = text_sites(reattend.sites(pipe))
    both = [Heat(table, Words("w", [["red"]])), Heat(table, Words("v", [["sky"]]))]
    found = []
    with attach(pipe, [Plan("look", [step for heat in both for step in heat.steps])]):
        for _ in range(2):
            pipe(
                prompt=PROMPT, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0), **given
            )
            found.append([heat.map(f"{heat.words.name}.0") for heat in both])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
