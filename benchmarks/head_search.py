"""Headhunter's search on a picture generator of the zoo, with the zoo's judge as the objective; a profile for effects.py and `reattend eval`.

    python benchmarks/head_search.py                                # 6 prompts: about 250 pictures of shapes-sd, minutes on a small CPU
    python benchmarks/head_search.py --scenes 20 --rounds 2 --layers 6 7 8 9
    reattend eval -m zoo:shapes-sd -s binding -n 64 --seed 1 -r none -r headhunter:profile_path=FILE:strength=1:scale=2 \\
        -r headhunter:profile_path=FILE:strength=1:scale=2:random_heads=true

What was drawn is noted beside the profile: a search that was cut off goes on, and so does one that is asked for more rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reattend
import torch
from reattend.evaluation.suites.binding import Binding
from reattend.recipes import Profile, recipe_class
from reattend.zoo.worlds.language import listing
from reattend.zoo.worlds.reading import Seen, judge, read
from reattend.zoo.worlds.shapes import Thing

# the seed of scenes that profiles are learned from: neither those on which settings are chosen nor those on which they are confirmed
PROFILED_ON = 99
GUIDANCE = 2.0
BY = ("binding", "fit")


def drawn_scenes(count: int, by: Sequence[str] = BY) -> dict[str, Any]:
    """Options of the search: so many prompts of coloured shapes with their seeds, and what the judge says of their pictures.

    by: names of the judge's shares (binding, shapes, colours, whole, count), or "fit", whose mean is the score.
    """
    items = Binding().items(count, PROFILED_ON)
    asked = {listing(things): things for things in map(Binding.asked, items)}

    def objective(pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        scores = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            seen = read(picture)
            said = {**judge(asked[prompt], seen), "fit": fit(asked[prompt], seen)}
            scores.append(sum(said[name] for name in by) / len(by))
        return scores

    objective.__name__ = "+".join(by)
    return {
        "prompts": [listing(Binding.asked(item)) for item in items],
        "seeds": [item.data["noise"] for item in items],
        "objective": objective,
        "call": {"guidance_scale": GUIDANCE},
    }


def fit(asked: Sequence[Thing], seen: Sequence[Seen]) -> float:
    """Binding by degrees: how well the right shape of the right colour is drawn, 0 to 1, on average over what was asked for.

    Binding alone changes in steps, and a single head seldom makes one.
    """
    best = [max((s.fit for s in seen if s.name == thing.name), default=0.0) for thing in asked]
    return sum(max(0.0, value) for value in best) / len(best)


def told(profile: Profile) -> str:
    """What a search found, for people."""
    facts = profile.facts
    lines = [f"without guidance {facts['baseline']:.3f}, with all heads found {facts['score']:.3f}"]
    for number, part in enumerate(facts["rounds"]):
        known = profile.tensors["scores"][number].mean(-1)
        known = known[~known.isnan()]
        heads = ", ".join(f"{h['layer']}:{h['head']} {h['score']:.3f} +- {h['spread']:.3f}" for h in part)
        lines.append(
            f"round {number + 1}: {heads}; of {len(known)} heads the mean is {known.mean():.3f}, from {known.min():.3f} to {known.max():.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:shapes-sd")
    parser.add_argument("--scenes", type=int, default=6, help="prompts, each with a seed of its own")
    parser.add_argument("--by", nargs="+", default=BY, help="shares of the judge whose mean is the objective")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--screen-steps", type=int, default=None)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None, help="the profile; without it where effects.py looks for it")
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    model = given.pop("model").removeprefix("zoo:")
    out = given.pop("out") or Path(f"runs/effects/profiles/headhunter-{model}.safetensors")
    pipe = reattend.zoo.load(model)
    options = {**drawn_scenes(given.pop("scenes"), given.pop("by")), **given, "resume": str(out.with_suffix(".jsonl"))}
    profile = recipe_class("headhunter").profile(pipe, None, **options)
    print(told(profile))
    print("profile:", profile.save(out))


if __name__ == "__main__":
    main()
