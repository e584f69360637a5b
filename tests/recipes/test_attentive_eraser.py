"""attentive-eraser beyond the matrix: what the branch reads, the background of pictures in stock pipelines, the forms of a mask, bad input."""

from __future__ import annotations

import gc
import io
import weakref

import diffusers
import numpy as np
import pytest
import reattend
import tiny_pipelines
import torch
from PIL import Image
from reattend.hooks import Edits, Plan, attach
from reattend.interventions import Call, Clock, Keep, KeyBias, Site, TokenGrid, TokenMap, fused, reference
from reattend.recipes import attentive_eraser
from reattend.recipes.kit.denoisers import image_layers
from reattend.recipes.kit.registry import load_recipe, save_recipe
from reattend.recipes.kit.samplers import encoded, levels
from tiny_denoisers import build
from tiny_steps import draw_steps, scheduled
from torch import Tensor

BOX = [[0.25, 0.25, 0.75, 0.75]]
SELF = Site("up_blocks.1.attn1", 7, "denoiser.up", "self", 2, 2, 4, False, "sdpa")


def eraser(**parameters):
    return reattend.recipe("attentive-eraser", **{"boxes": BOX, **parameters})


def call_of(step: int = 0, side: int = 4, batch: int = 2) -> Call:
    """A call of which the last row is the branch's."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, side * side, 4)
    branch = torch.arange(batch) == batch - 1
    grids = [TokenGrid.of_image(row, torch.arange(side * side).view(side, side)) for row in range(batch)]
    tokens = TokenMap(batch, side**2, side**2, {"image": torch.ones(batch, side**2, dtype=torch.bool)}, grids)
    clock = Clock(
        "denoise", step, branches={"conditional": ~branch, "attentive-eraser": branch}, source=torch.zeros(batch).long()
    )
    return Call(q, k, v, site=SELF, clock=clock, tokens=tokens)


# -- the branch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [fused, reference])
def test_no_row_reads_the_mask_and_rows_in_it_read_evenly_at_factor_0(run):
    call = call_of()
    got = run(call, eraser(factor=0).weaken(None, call))
    inside = eraser().places(0, 1, 4, 4).flatten()
    assert inside.sum() == 4
    assert torch.equal(got[0], run(call, [])[0]), "the source keeps its bits"
    torch.testing.assert_close(got[1][:, inside], call.value[1][:, ~inside].mean(dim=1, keepdim=True).expand(-1, 4, -1))
    call.value[1][:, inside] = 1e9
    assert torch.equal(run(call, eraser(factor=0).weaken(None, call))[1], got[1]), "weights of exactly 0"


def test_after_its_steps_the_factor_is_not_there():
    early, late = (eraser(factor=0.1, steps=3).weaken(None, call_of(step)) for step in (2, 3))
    assert len(early) == 2 and len(late) == 1 and isinstance(late[0], KeyBias)
    assert [type(edit) for edit in eraser(factor=1).weaken(None, call_of())] == [KeyBias]


def test_a_layer_that_the_mask_fills_is_left_alone():
    assert eraser(boxes=[[0.01, 0.01, 0.99, 0.99]]).weaken(None, call_of(side=2)) == []
    assert eraser(boxes=[[0.01, 0.01, 0.99, 0.99]]).weaken(None, call_of(side=128, batch=2))


def test_scale_1_is_the_branch():
    model, inputs = build("UNet2DConditionModel")
    inputs = {key: value[:1] if value.dim() else value for key, value in inputs.items()}
    recipe = eraser(scale=1)
    with torch.no_grad(), reattend.apply(model, recipe):
        got = model(**inputs).sample
    inside = recipe.places(0, 1, 8, 8)

    def redirect(call: Call):
        side = int(call.num_keys**0.5)
        mask = torch.nn.functional.adaptive_max_pool2d(inside[None].float(), side)[0].flatten() > 0
        scaled = reattend.interventions.ScaleQuery(factor=0.3, rows=mask[None])
        return [] if mask.all() else [scaled, Keep(pattern=~mask[None, None, None])]

    table = reattend.sites(model).where(lambda site: site.stack == "denoiser.up" and site.kind == "self")
    with torch.no_grad(), attach(model, [Plan("by hand", [Edits(table, redirect)])]):
        wanted = model(**inputs).sample
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_its_layers_are_the_up_blocks_or_the_second_half():
    sites = reattend.sites(build("UNet2DConditionModel")[0])
    chosen = [image_layers(sites)[layer][0].stack for layer, _ in eraser().selection(sites)]
    assert chosen == ["denoiser.up"] * 2
    sites = reattend.sites(build("FluxTransformer2DModel")[0])
    assert eraser().selection(sites) == [(2, None), (3, None)]
    assert eraser(layers=[1]).selection(sites) == [(1, None)]


# -- pictures --------------------------------------------------------------------------------------------------------------


def photo(width: int = 16, height: int = 16) -> Image.Image:
    torch.manual_seed(5)
    return Image.fromarray((torch.rand(height, width, 3) * 255).byte().numpy())


def image_to_image(scheduler: str | None = None):
    pipe = tiny_pipelines.stable_diffusion_3() if scheduler == "flow" else tiny_pipelines.stable_diffusion()
    scheduled(pipe, None if scheduler == "flow" else scheduler)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **more) -> tuple[Tensor, list[Tensor]]:
    return draw_steps(pipe, **{"prompt": "", "guidance_scale": 1.0, **more})


@pytest.mark.parametrize("scheduler", [None, "EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "flow"])
def test_image_to_image_keeps_the_background(scheduler):
    pipe, recipe = image_to_image(scheduler), eraser(image=photo())
    call = {"image": photo(), "strength": 0.8}
    plain = draw(pipe, **call)[0]
    with reattend.apply(pipe, recipe) as session:
        got = draw(pipe, **call)[0]
        assert torch.equal(draw(pipe, **call)[0], got), "a second run is the first one again"
    assert session.stats["attentive-eraser"]["latents"] == 2 * 4
    clean = encoded(pipe, [photo()], got)
    inside = recipe.places(0, 1, 8, 8)
    assert torch.equal(got[..., ~inside], clean[..., ~inside]), "the end is the picture"
    assert not torch.equal(got[..., inside], clean[..., inside]) and not torch.equal(got[..., inside], plain[..., inside])
    assert torch.equal(draw(pipe, **call)[0], plain)


def test_the_noise_on_the_background_is_that_of_the_start():
    pipe = image_to_image()
    with reattend.apply(pipe, eraser(image=photo())):
        got, steps = draw(pipe, image=photo(), strength=0.8)
    clean, known = encoded(pipe, [photo()], got), levels(pipe.scheduler)[-len(steps) - 1 :]
    outside = ~eraser().places(0, 1, 8, 8)
    noise = [level.noise_of(x, clean)[..., outside] for level, x in zip(known[1:-1], steps[:-1], strict=True)]
    for other in noise[1:]:
        torch.testing.assert_close(other, noise[0], atol=1e-4, rtol=1e-4)
    assert 0.8 < noise[0].std() < 1.2


@pytest.mark.parametrize("build", [tiny_pipelines.stable_diffusion, tiny_pipelines.stable_diffusion_3])
def test_inversion_begins_with_the_noise_of_the_picture(build):
    """With next to no shift the run goes back to the picture, inside the mask too, as far as inversion is exact."""
    pipe = build()
    if build is tiny_pipelines.stable_diffusion:
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    call = {"num_inference_steps": 20, "height": 16, "width": 16}
    with reattend.apply(pipe, eraser(image=photo(), invert=True, scale=1e-6)):
        got, steps = draw(pipe, **call)
    clean = encoded(pipe, [photo()], got)
    outside = ~eraser().places(0, 1, 8, 8)
    assert torch.equal(got[..., outside], clean[..., outside])
    far = (draw(pipe, **call)[0] - clean).norm()
    assert (got - clean).norm() < 0.1 * far
    assert len(steps) == 20


@pytest.mark.parametrize("channels", [4, 9])
def test_an_inpainting_pipeline(channels):
    pipe = diffusers.AutoPipelineForInpainting.from_pipe(tiny_pipelines.stable_diffusion(channels))
    pipe.set_progress_bar_config(disable=True)
    mask = Image.fromarray((eraser().places(0, 1, 16, 16).numpy() * 255).astype("uint8"))
    call = {"image": photo(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.8}
    plain, got = draw(pipe, **call)[0], {}
    for name, more in {"without": {}, "with": {"image": photo()}}.items():
        with reattend.apply(pipe, "attentive-eraser", mask=mask, **more):
            got[name] = draw(pipe, **call)[0]
        assert got[name].isfinite().all() and not torch.equal(got[name], plain)


def test_every_prompt_has_a_mask_of_its_own():
    pipe, boxes, pictures = image_to_image(), [[[0, 0, 0.5, 0.5]], BOX], [photo(), photo().rotate(90)]
    call = {"prompt": ["", ""], "image": pictures, "strength": 0.8, "guidance_scale": 3.0}
    with reattend.apply(pipe, "attentive-eraser", boxes=boxes, image=pictures):
        both, _ = draw(pipe, **call, generator=[torch.Generator().manual_seed(n) for n in (1, 2)])
    for row in (0, 1):
        with reattend.apply(pipe, "attentive-eraser", boxes=boxes[row], image=pictures[row]):
            alone, _ = draw(
                pipe, **{**call, "prompt": "", "image": pictures[row]}, generator=torch.Generator().manual_seed(row + 1)
            )
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-3)


# -- masks -----------------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_same_in_every_form(tmp_path):
    held = torch.zeros(16, 32, dtype=torch.bool)
    held[3, 7:20] = True
    picture = Image.fromarray((held.numpy() * 255).astype("uint8"))
    picture.save(tmp_path / "mask.png")
    forms = [held, held.numpy(), held.long().tolist(), picture, str(tmp_path / "mask.png"), tmp_path / "mask.png"]
    for form in forms:
        recipe = reattend.recipe("attentive-eraser", mask=form)
        assert torch.equal(recipe.places(0, 1, 16, 32), held)
        # however thin: pooled, not averaged
        assert torch.equal(recipe.places(0, 1, 2, 4), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool())
        save_recipe(recipe, tmp_path / "recipe.yaml", overwrite=True)
        assert torch.equal(load_recipe(tmp_path / "recipe.yaml").places(0, 1, 16, 32), held)
    several = reattend.recipe("attentive-eraser", mask=[forms[4], ~held])
    assert torch.equal(several.places(1, 2, 16, 32), ~held) and torch.equal(several.places(1, 4, 16, 32), held)


def test_a_mask_is_read_once_for_every_raster_and_goes_with_its_recipe(monkeypatch):
    pipe, recipe, read = image_to_image(), eraser(image=photo()), []
    real = attentive_eraser.touched
    monkeypatch.setattr(attentive_eraser, "touched", lambda region, *more: read.append(more[:2]) or real(region, *more))
    with reattend.apply(pipe, recipe):
        draw(pipe, image=photo(), strength=0.8)
        draw(pipe, image=photo(), strength=0.8)
    assert len(read) == len(set(read)) > 0, "once, however many layers and steps there are"
    gone = weakref.ref(next(iter(recipe.rasters.values())))
    del recipe
    gc.collect()
    assert gone() is None


def test_boxes_in_every_form():
    box, other = (0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.5, 0.5)
    for form in (list(box), [box], torch.tensor([box]), np.array(box), [np.array(box)], [list(box)], [[box]]):
        assert eraser(boxes=form).regions == [[box]]
    assert eraser(boxes=[[box, other], [box]]).regions == [[box, other], [box]]
    assert eraser(boxes=torch.tensor([[box], [other]])).regions == [[box], [other]]


def test_masks_of_files_are_read_as_they_are(tmp_path):
    held = torch.zeros(16, 16, dtype=torch.bool)
    held[4:12, 4:12] = True
    white = Image.fromarray((held.numpy() * 255).astype("uint8"))
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 255))
    clear.putalpha(white)
    for name, picture in {
        "alpha.png": clear,
        "lossy.jpg": white,
        "16.png": Image.fromarray(held.numpy() * np.uint16(300)),
    }.items():
        picture.save(tmp_path / name)
        assert torch.equal(reattend.recipe("attentive-eraser", mask=tmp_path / name).places(0, 1, 16, 16), held), name


def test_boxes_hold_every_place_that_they_touch():
    recipe = eraser(boxes=[[0.25, 0, 0.5, 0.5], [0.9, 0.9, 1, 1]])
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[:2, 1], wanted[3, 3] = True, True
    assert torch.equal(recipe.places(0, 1, 4, 4), wanted)
    larger = recipe.model_copy(update={"grow": 0.25}).places(0, 1, 4, 4)
    assert larger.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert torch.equal(larger, reattend.recipe("attentive-eraser", mask=wanted, grow=0.25).places(0, 1, 4, 4))


def test_a_picture_in_the_recipe_is_data(tmp_path):
    recipe = eraser(image=photo())
    save_recipe(recipe, tmp_path / "recipe.yaml", overwrite=True)
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and isinstance(again.image, str)


def test_bad_input_is_an_error_before_the_first_step(tmp_path):
    pipe = image_to_image()
    Image.fromarray((eraser().places(0, 1, 12, 16).numpy() * 255).astype("uint8")).save(tmp_path / "low.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    for given, said in {
        "nowhere.png": "no picture for mask at", "black.png": "mask: the mask is empty", "white.png": "mask: it covers the whole picture",
        "text.png": "cannot be read as a picture",
    }.items():  # fmt: skip
        with pytest.raises(reattend.ReattendError, match=said):
            reattend.apply(pipe, "attentive-eraser", mask=tmp_path / given)
    with pytest.raises(reattend.ReattendError, match="mask: it covers the whole picture"):
        reattend.apply(pipe, "attentive-eraser", mask=torch.ones(8, 8).fill_diagonal_(0), grow=0.25)
    held = io.BytesIO()
    photo(64, 64).save(held, "PNG")
    for name in ("image", "mask"):  # opened, and not read yet
        broken = Image.open(io.BytesIO(held.getvalue()[:3000]))
        with pytest.raises(reattend.ReattendError, match=f"{name}: .*truncated"):
            eraser(**({"image": broken} if name == "image" else {"mask": broken, "boxes": None}))
    (tmp_path / "held.png").write_bytes(held.getvalue()[:3000])
    for given, said in {
        tmp_path / "text.png": "image: .*cannot be read",
        "data:image/png;base64,AAAA": "image: .*in the recipe",
    }.items():
        with pytest.raises(reattend.ReattendError, match=said):
            reattend.apply(pipe, "attentive-eraser", boxes=BOX, image=given)
    runs = [
        ({"mask": tmp_path / "low.png"}, "mask of 16 x 12 has other proportions than the picture"),
        ({"mask": tmp_path / "low.png", "image": photo()}, "mask of 16 x 12 has other proportions than the picture"),
        ({"boxes": BOX, "image": photo(16, 12)}, "image: a picture of 16 x 12 pixels has other proportions"),
        ({"boxes": BOX, "image": [photo()] * 2}, "image for 2 prompts, and 1 pictures"),
        ({"mask": [torch.eye(16)] * 3}, "mask for 3 prompts, and 1 pictures"),
        ({"boxes": [BOX, BOX]}, "boxes for 2 prompts, and 1 pictures"),
        ({"boxes": [[0, 0, 1, 0.97], [0, 0.98, 1, 1]], "image": photo()}, "boxes: it covers the whole picture"),
    ]
    for parameters, said in runs:
        with pytest.raises(reattend.ReattendError, match=said), reattend.apply(pipe, "attentive-eraser", **parameters):
            draw(pipe, image=photo(), callback_on_step_end=lambda *_: pytest.fail("a step was done"))
    with pytest.raises(reattend.ReattendError, match="apply the recipe to the pipeline"):
        reattend.apply(pipe.unet, "attentive-eraser", boxes=BOX, image=photo())
    flux = tiny_pipelines.flux()
    call = {"prompt_embeds": torch.zeros(1, 5, 8), "pooled_prompt_embeds": torch.zeros(1, 8), "height": 16, "width": 16}
    with (
        reattend.apply(flux, "attentive-eraser", boxes=BOX, image=photo()),
        pytest.raises(reattend.ReattendError, match="image: .*packed"),
    ):
        flux(**call)
