"""A profile that is kept for a model is an ordinary file: it is found again, and works for others who get a copy."""

from __future__ import annotations

import shutil

import pytest
import reattend
import torch
from reattend.interventions import ReattendError
from reattend.recipes import cached_profile
from tiny_language import language_model, tokenizer

FACTS = [
    (f"{'The house of Anna is ' * (1 + i % 2)}{a}. It is {b}. The house is ", [f"is {(a, b)[k]}."], (a, b)[k], [a, b])
    for i, (a, b) in enumerate(("xy", "qr"))
    for k in (0, 1)
]
MARKED = {"text": "red house"}
RECIPES = {
    "emphasise": (dict(layers=1, data=FACTS, occurrence=0), MARKED),
    "seka": (dict(pairs=2, experts=False), MARKED),
    "soft-injection": (dict(how="even", prompts=2, shots=2), {}),
}


@pytest.mark.parametrize("slug", RECIPES)
def test_a_kept_profile_is_found_again_and_can_be_passed_on(slug, tmp_path, monkeypatch):
    learning, using = RECIPES[slug]
    folder = tmp_path / "one user"
    monkeypatch.setattr("reattend.recipes.profile.cache_folder", lambda: folder)
    made = cached_profile(slug, language_model(), tokenizer(), **learning)
    (kept,) = (folder / "profiles" / slug).iterdir()
    copy = shutil.copy(kept, tmp_path / "shared.safetensors")
    model, x = language_model(), tokenizer()(["Anna has a red house."], return_tensors="pt")

    def logits(path):
        with reattend.apply(model, slug, profile_path=str(path), tokenizer=tokenizer(), **using) as session:
            found = model(**x).logits
        assert session.applied
        return found

    mine = logits("cached")
    assert not torch.equal(mine, model(**x).logits)
    folder = tmp_path / "another user"
    with pytest.raises(ReattendError, match=f"no profile of '{slug}' is kept"):
        logits("cached")
    assert torch.equal(logits(copy), mine)
    # put where the cache keeps it, the file is the kept profile there too, and is not made anew
    place = folder / kept.relative_to(tmp_path / "one user")
    place.parent.mkdir(parents=True)
    shutil.copy(copy, place)
    stamp = place.stat().st_mtime_ns
    assert cached_profile(slug, model, tokenizer(), **learning).facts == made.facts
    assert place.stat().st_mtime_ns == stamp and torch.equal(logits("cached"), mine)
