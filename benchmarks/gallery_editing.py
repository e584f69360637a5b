"""Rows of the gallery for methods that are given pictures: what is taken out, what is put in, and where things are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import reattend
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image
from reattend.evaluation.suites.composition import Composition, pasted
from reattend.evaluation.suites.given_pictures import mask_picture, touched
from reattend.evaluation.suites.masks import Masks, cut_out, found_by
from reattend.zoo.worlds.drawing import picture
from reattend.zoo.worlds.language import listing
from reattend.zoo.worlds.reading import read
from reattend.zoo.worlds.shapes import CLEAR

Rows = dict[str, list[Image.Image]]
# of the scenes, which no suite asks
SEED, SIDE = 77, 64
# masks of the first, second and third thing
INKS = ((255, 80, 80), (90, 220, 90), (110, 140, 255))


def noise(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def taken_out(slug: str, pipe: Any, before: list[Image.Image], steps: int, guidance: float, parameters: dict[str, Any]) -> Rows:
    """The largest thing of each picture, by its box, under an empty prompt."""
    boxes = []
    for one in before:
        box = next((seen.box for seen in read(one)), (one.width // 3, one.height // 3, one.width // 2, one.height // 2))
        shares = [(edge + reach) / one.width for edge, reach in zip(box, (-1, -1, 1, 1), strict=True)]
        boxes.append([tuple(min(max(share, 0.0), 1.0) for share in shares)])
    masks = [mask_picture(touched(own[0], SIDE)) for own in boxes]
    inpainting = quiet(AutoPipelineForInpainting.from_pipe(pipe))

    def fill() -> list[Image.Image]:
        return inpainting(
            [""] * len(before), image=before, mask_image=masks, height=SIDE, width=SIDE, strength=1.0, num_inference_steps=steps,
            guidance_scale=guidance, generator=noise(len(before)),
        ).images  # fmt: skip

    found = {"before": before, "inpainting pipeline": fill()}
    with reattend.apply(pipe, slug, boxes=boxes, **parameters):
        found[f"{slug} on it"] = fill()
    return found


def put_in(slug: str, pipe: Any, count: int, steps: int, guidance: float, parameters: dict[str, Any]) -> Rows:
    """A thing from a darker picture of its own, by a box."""
    suite = Composition()
    parts = [suite.parts(item) for item in suite.items(count, SEED)]
    backgrounds = [picture(rest, SIDE, CLEAR) for _, rest in parts]
    references = [suite.reference(thing, SIDE) for thing, _ in parts]
    prompts = [listing([thing, *rest.things]) for thing, rest in parts]
    inpainting = quiet(AutoPipelineForInpainting.from_pipe(pipe))
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    filled = inpainting(
        prompts, image=backgrounds, mask_image=[mask_picture(touched(thing.box, SIDE)) for thing, _ in parts], height=SIDE,
        width=SIDE, strength=1.0, generator=noise(count), **options,
    ).images  # fmt: skip
    told = {
        "background": backgrounds, "reference": [image for image, _ in references], "box": [thing.box for thing, _ in parts],
        "mask": [own.astype(int).tolist() for _, own in references],
    }  # fmt: skip
    with reattend.apply(pipe, slug, **told, **parameters):
        drawn = pipe(prompts, generator=noise(count), **options).images
    pasted_in = [
        pasted(background, thing, *own) for background, (thing, _), own in zip(backgrounds, parts, references, strict=True)
    ]
    return {
        "the thing": [image for image, _ in references], "the picture": backgrounds, "pasted in": pasted_in,
        "inpainting pipeline": filled, slug: drawn,
    }  # fmt: skip


def found_in(slug: str, pipe: Any, count: int, steps: int, guidance: float, parameters: dict[str, Any]) -> Rows:
    """Pictures with the masks of their things, in the order of their prompts: red, green, blue."""
    suite = Masks(steps=steps, guidance=guidance)
    scenes = [suite.scene(item) for item in suite.items(count, SEED)]
    given, words = [picture(scene, SIDE, CLEAR) for scene in scenes], [suite.words(scene) for scene in scenes]
    prompts = [listing(list(scene.things)) for scene in scenes]
    image_to_image = quiet(AutoPipelineForImage2Image.from_pipe(pipe))

    def run() -> None:
        image_to_image(
            prompts, image=given, strength=suite.strength, generator=noise(count), num_inference_steps=steps,
            guidance_scale=guidance, output_type="latent",
        )  # fmt: skip

    with found_by(image_to_image, words) as heat:
        run()
    cut = [cut_out(heat(number, (SIDE, SIDE)), suite.cut) for number in range(count)]
    recipe = reattend.recipe(slug, words=words, image=given, **parameters)
    with reattend.apply(image_to_image, recipe):
        run()
    masks = [one.masks((SIDE, SIDE), may_be_empty=True)[: len(own)] for one, own in zip(recipe.found, words, strict=True)]
    return {
        "picture": given,
        "where maps of words are high": [marked(*one) for one in zip(given, cut, strict=True)],
        slug: [marked(*one) for one in zip(given, masks, strict=True)],
    }


def marked(image: Image.Image, masks: torch.Tensor) -> Image.Image:
    """A picture in grey, with its masks in colours."""
    shown = np.asarray(image.convert("L").convert("RGB")).astype(float)
    for ink, mask in zip(INKS, masks.numpy(), strict=False):
        shown[mask] = 0.35 * shown[mask] + 0.65 * np.asarray(ink)
    return Image.fromarray(shown.astype(np.uint8))
