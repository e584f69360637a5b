"""A profile that is kept for a model is an ordinary file: it is found again, and works for others who get a copy."""

from __future__ import annotations

import json
import shutil

import pytest
import reattend
import torch
from reattend.interventions import ReattendError
from reattend.recipes import Profile, cached_profile, recipe_class
from reattend.recipes.kit.profile import fingerprint
from safetensors.torch import save_file
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
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: folder)
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


SOFT = {"task_embedding": torch.ones(1, 2, 4, 8), "alpha": torch.full((2, 4), 0.5)}
TASK = {"tasks": ["a"]}


def applied(model, path, slug="retrieval-heads", **parameters):
    reattend.apply(model, slug, profile_path=str(path), **parameters).remove()


def written(path, model, tensors, slug="retrieval-heads", facts=None, metadata=None):
    made = {"recipe": slug, "model": json.dumps(fingerprint(model)), "facts": json.dumps(facts or {})}
    told = {"format": "reattend-profile-1", **made, **(metadata or {})}
    save_file(tensors, path, metadata={name: value for name, value in told.items() if value is not None})
    return path


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"recipe": None}, "tells no recipe"),
        ({"model": None}, "tells no model"),
        ({"facts": None}, "tells no facts"),
        ({"model": "{"}, "model of the profile .* is not valid JSON"),
        ({"model": "[1]"}, "its model is no JSON object"),
        ({"facts": "x"}, "facts of the profile .* is not valid JSON"),
        ({"facts": "[" * 3000 + "]" * 3000}, "facts"),
        ({"format": "other"}, "is not a reattend profile"),
    ],
)
def test_broken_metadata_is_one_error(metadata, words, tmp_path):
    model = language_model()
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    good = written(tmp_path / "good.safetensors", model, {"score": torch.rand(layers, heads)})
    applied(model, good, min_score=0)
    with pytest.raises(ReattendError, match=words):
        applied(model, written(tmp_path / "bad.safetensors", model, {"score": torch.rand(layers, heads)}, metadata=metadata))


@pytest.mark.parametrize(
    "slug, tensors, facts, words",
    [
        ("retrieval-heads", {"score": torch.zeros(0, 0)}, {}, r"'score' of shape \[0, 0\] instead of \[layers, heads\]"),
        ("retrieval-heads", {"score": torch.ones(1, 4)}, {}, r"layers = \d"),
        ("retrieval-heads", {"other": torch.ones(2, 4)}, {}, "no tensor 'score'"),
        ("retrieval-heads", {"score": "nan"}, {}, "NaN or infinity"),
        ("retrieval-heads", {"score": "int"}, {}, "int64 in tensor 'score', which must be floating-point"),
        ("emphasise", {"score": "ones"}, {"top": "many"}, "'many' as fact 'top', which must be a whole number"),
        ("act", {"x": torch.ones(2, 4)}, {}, "no tensor 'selected'"),
        ("act", {"selected": torch.tensor([1.5])}, {}, "'selected' of shape"),
        ("act", {"selected": torch.tensor([[1.5, 0]])}, {}, "whole numbers"),
        ("act", {"selected": torch.tensor([[-1, 0]])}, {}, "-1 in tensor 'selected', which must be at least 0"),
        ("seka", {"x": torch.ones(1)}, {}, r"no tensors '\*.relevant.vectors'"),
        ("seka", {"a.relevant.values": torch.ones(1)}, {}, "names a layer 'a'"),
        ("seka", {"0.relevant.values": torch.ones(1)}, {}, "no tensor '0.relevant.vectors'"),
        ("soft-injection", SOFT, {}, "no fact 'tasks'"),
        ("soft-injection", SOFT, {"tasks": [1]}, "must be a list of texts"),
        ("soft-injection", SOFT, {"tasks": ["a", "b"]}, "tasks = 2"),
        ("soft-injection", {"alpha": SOFT["alpha"]}, TASK, "no tensor 'task_embedding'"),
        ("soft-injection", {**SOFT, "alpha": torch.zeros(9, 9)}, TASK, "'task_embedding' of shape|'alpha' of shape"),
        ("soft-injection", {"task_embedding": "embedding", "alpha": "twos"}, TASK, "2 in tensor 'alpha', which must be at most 1"),
    ],
)  # fmt: skip
def test_what_a_recipe_says_its_profile_holds_is_checked(slug, tensors, facts, words, tmp_path):
    model = language_model()
    size = model.config.num_hidden_layers, model.config.num_attention_heads
    fills = {
        "nan": torch.full(size, float("nan")),
        "int": torch.ones(size, dtype=torch.long),
        "ones": torch.ones(size),
        "twos": torch.full(size, 2.0),
        "embedding": torch.ones(1, *size, model.config.hidden_size // size[1]),
    }
    tensors = {name: fills[value] if isinstance(value, str) else value for name, value in tensors.items()}
    path = written(tmp_path / "p.safetensors", model, tensors, slug, facts)
    with pytest.raises(ReattendError, match=words):
        applied(model, path, slug, **(MARKED if slug in ("emphasise", "seka") else {}), tokenizer=tokenizer())


def test_every_recipe_with_a_profiling_step_says_what_its_profile_holds():
    from reattend.recipes.kit.registry import registry

    for slug, cls in registry().items():
        assert bool(cls.contents.tensors) == bool(cls.info.profiling), slug


@pytest.mark.parametrize("data", [b"", b"123", b"\xff" * 200], ids=["empty", "short", "no header"])
def test_files_that_are_no_profiles(data, tmp_path):
    (tmp_path / "p.safetensors").write_bytes(data)
    with pytest.raises(ReattendError, match="is not a safetensors file"):
        applied(language_model(), tmp_path / "p.safetensors")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none", "no profile file at"), ("\0", "must be a path")):
        with pytest.raises(ReattendError, match=words):
            applied(language_model(), path)


def test_a_profile_is_saved_over_another_unless_told_not_to(tmp_path):
    profile, path = Profile("act", {}, {"selected": torch.zeros(1, 2)}), tmp_path / "new" / "p.safetensors"
    profile.save(path)
    profile.save(path)
    with pytest.raises(ReattendError, match="exists already.*overwrite=True"):
        profile.save(path, overwrite=False)
    for place, words in ((tmp_path, "is a folder"), (path / "x", "is a file, so nothing can be written into it")):
        with pytest.raises(ReattendError, match=words):
            profile.save(place)
    with pytest.raises(ReattendError, match="must be JSON values"):
        Profile("act", {}, {}, {"x": object()}).save(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "slug, options, words",
    [
        ("seka", {"pairs": "x"}, "pairs must be a whole number, got 'x'"),
        ("seka", {"pairs": 10**30}, "pairs must be a whole number"),
        ("seka", {"bogus": 1}, "bogus is no option of this profiling step; its options are: data, pairs"),
        ("seka", {"data": [["a", "b"]]}, "data must hold"),
        ("seka", {"data": "nowhere.json"}, "no data file at 'nowhere.json'"),
        ("emphasise", {"data": ["x"]}, "data must hold"),
        ("emphasise", {"layers": "x"}, "layers must be a whole number or None"),
        ("retrieval-heads", {"lengths": 3}, "lengths must be a list of whole numbers"),
        ("act", {"batch_size": "x"}, "batch_size must be a whole number"),
        ("soft-injection", {"lr": "x"}, "lr must be a number"),
    ],
)
def test_options_of_profiling_steps(slug, options, words):
    with pytest.raises(ReattendError, match=words):
        recipe_class(slug).profile(language_model(), tokenizer(), **options)
