"""attend-and-excite: pipelines with a UNet alone; the official runs whole, with the losses on their way."""

import json

import diffusers
import reattend
import tiny_pipelines
import torch
from example import Example
from golden_files import golden_file
from reattend.recipes.attend_and_excite import AttendAndExcite
from tiny_denoisers import DENOISERS

NO_UNET = "reads a UNet's cross-attention"
REFUSED = {
    **{
        name: NO_UNET
        for name in (*DENOISERS, "SD3", "SD3, two images, no guidance", "Flux, two calls", "Flux, no guidance", "PixArt")
    },
    "UNet2DConditionModel": "",
    "UNet2DConditionModel, UNet2DConditionModel": "apply the recipe to the pipeline",
    "UNetMotionModel": "denoises videos",
    **dict.fromkeys(("ControlNet", "ControlNet without weight"), "belongs to another pipeline"),
}
EXAMPLES = {
    "": Example(
        "diffusion",
        {"columns": [[2, 4]], "resolution": 8, "thresholds": {1: 0.5}, "tries": 3},
        off={"scale": 0},
        layers=1,
        refused=REFUSED,
    ),
    "words": Example(
        "diffusion",
        {"words": ["a"], "resolution": 4, "scale": 50, "each": True},
        off={"scale": 0},
        layers=1,
        refused=REFUSED,
    ),
}
BAD = [
    ({}, "give words that must show, or columns"),
    ({"words": ["red"], "columns": [[1]]}, "give words that must show, or columns"),
    (
        {"words": 3},
        "^recipe 'attend-and-excite': words: a value of another type is meant, got 3; words: the words that must show",
    ),
    ({"words": ["red", ["sky"]]}, r"^[^;]* words: a value of another type is meant, got \['sky'\]; [^;]*$"),
    ({"words": ["red", " "]}, "words must not hold an empty word"),
    ({"words": [[]]}, "at least one entry per prompt"),
    ({"words": ["red"], "length": 5}, "length, which goes with these alone"),
    ({"columns": [[]]}, "at least one entry per prompt"),
    ({"columns": [[1]], "thresholds": {0: 2}}, "number from 0 to 1"),
    ({"columns": [[1]], "normalize_eot": True}, "columns with normalize_eot need length"),
    ({"words": ["red"], "resolution": 1}, "resolution.*greater than or equal to 2"),
    ({"columns": [[0]]}, "columns count from 1"),
    (
        {"columns": [[4]], "normalize_eot": True, "length": 5},
        "columns count from 1.*to 3, the last one before the end token; got 4",
    ),
    ({"columns": [[1]], "scale": 51}, "scale.*less than or equal to 50"),
]

GOLDEN = ("loss", "run_updates", "run_refine")


def official_losses(own, threshold):
    """The official code evaluates a step's first loss twice, and the last one after its tries too."""
    first, *rest = own
    return [first, first, *rest, rest[-1]] if threshold is not None and first > 1 - threshold else [first, first]


def loss_of_maps(data, facts):
    """The loss of given maps, each word's own, and where they lead."""
    side, indices = int(facts["res"]), json.loads(facts["indices"])
    maps = data["probs"].mean(dim=(0, 1)).unflatten(0, (side, side))
    yield maps, data["aggregated"]
    count = maps.shape[2]
    compared = (torch.arange(count) > 0) & (torch.arange(count) < count - 1)

    def loss(maps, columns):
        method = AttendAndExcite(columns=[columns])
        words = [torch.arange(count)[None] == column for column in columns]
        return method.neglect(maps[None], compared[None], words)

    maps.requires_grad_()
    yield loss(maps, indices).detach(), data["loss"]
    each = [1 - loss(maps, [column]).detach() for column in indices]
    yield torch.cat(each), data["max_per_index"]
    (slope,) = torch.autograd.grad(loss(maps, indices).sum(), maps)
    yield slope / data["grad_aggregated"].abs().max(), data["grad_aggregated"] / data["grad_aggregated"].abs().max()


def golden(name, run):
    """Latents after every step, in shares of the largest, and the losses of the steps that are changed."""
    data, facts = golden_file("attend-and-excite", name)
    if name == "loss":
        yield from loss_of_maps(data, facts)
        return
    unet = diffusers.UNet2DConditionModel(**json.loads(facts["config"])).eval()
    unet.load_state_dict({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        tiny_pipelines.vae(3), None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    # building a pipeline warns of this one, and changes it
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    thresholds = {int(step): least for step, least in json.loads(facts["thresholds"]).items()}
    count, losses, evaluate = int(facts["max_iter_to_alter"]), {}, AttendAndExcite.evaluate

    def noting(self, table, at, x):
        loss, slope = evaluate(self, table, at, x)
        losses.setdefault(at.clock.step, []).append(float(loss))
        return loss, slope

    def draw():
        after = []
        pipe(
            prompt_embeds=data["prompt_embeds"][1:], negative_prompt_embeds=data["prompt_embeds"][:1], latents=data["latents"],
            num_inference_steps=int(facts["steps"]), guidance_scale=float(facts["guidance_scale"]), output_type="latent",
            callback_on_step_end=lambda _, step, t, given: after.append(given["latents"][0]) or given,
        )  # fmt: skip
        return torch.stack(after)

    scale, resolution = float(facts["scale_factor"]), int(facts["attention_res"])
    parameters = {"scale": scale, "resolution": resolution, "steps": count, "thresholds": thresholds}
    AttendAndExcite.evaluate = noting
    try:
        with reattend.apply(pipe, "attend-and-excite", columns=[json.loads(facts["indices"])], **parameters):
            got = draw()
    finally:
        AttendAndExcite.evaluate = evaluate
    largest = data["latents_after_step"].abs().max()
    yield got / largest, data["latents_after_step"] / largest
    found = [loss for step in range(count) for loss in official_losses(losses[step], thresholds.get(step))]
    yield torch.tensor(found), data["losses"][: len(found)]
    yield draw() / largest, data["latents_plain"] / largest


# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"attend-and-excite, half of the steps": {"words": [["circle", "square"]], "steps": 2, "tries": 0}}
FLOORS = {"attend-and-excite, half of the steps": ("a pass of the prompt's row with gradients before 2 of 4 steps", "")}
TRIED = {
    "words": [
        "attend-and-excite:scale=10", "attend-and-excite", "attend-and-excite:scale=40", "attend-and-excite:tries=0",
    ]
}  # fmt: skip
GALLERY = {"words": "shapes", "parameters": {"scale": 10.0}, "look": "Whether all shapes of the prompt come."}
