"""One prompt, twice: as the model draws it, and with its attention guided away from a weakened copy of itself (SoftPAG).

python examples/image_generation.py --prompt "a fox reading a map" --out images
python examples/image_generation.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --scale 3
python examples/image_generation.py --model tiny --steps 4 --device cpu     # random weights, nothing is downloaded
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reattend
import torch


def load(model: str, device: str) -> Any:
    if model == "tiny":
        from tiny_pipelines import stable_diffusion

        return stable_diffusion().to(device)
    from diffusers import AutoPipelineForText2Image

    dtype = torch.float32 if device == "cpu" else torch.float16
    # diffusers before 0.40 says torch_dtype
    return AutoPipelineForText2Image.from_pretrained(model, dtype=dtype).to(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-3-medium-diffusers", help='Hub id, folder, or "tiny"')
    parser.add_argument("--prompt", default="a photo of a fox reading a map in a library")
    parser.add_argument("--strength", type=float, default=0.5, help="how far the chosen heads are weakened in the copy")
    parser.add_argument("--scale", type=float, default=3.0, help="how far the image is pushed away from the copy")
    parser.add_argument("--layers", type=int, nargs="*", help="layers to weaken; default: what the recipe finds suitable")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args(arguments)

    pipe = load(given.model, given.device)

    def draw() -> Any:
        generator = torch.Generator("cpu").manual_seed(given.seed)
        return pipe(given.prompt, num_inference_steps=given.steps, generator=generator).images[0]

    before = draw()
    with reattend.apply(pipe, "softpag", strength=given.strength, scale=given.scale, layers=given.layers) as session:
        after = draw()

    given.out.mkdir(parents=True, exist_ok=True)
    before.save(given.out / "before.png")
    after.save(given.out / "after.png")
    for site, count in session.stats["softpag"].items():
        print(f"{site}: weakened in {count} denoiser calls")
    print(f"saved {given.out / 'before.png'} and {given.out / 'after.png'}")


if __name__ == "__main__":
    main()
