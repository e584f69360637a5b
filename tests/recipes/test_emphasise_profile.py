"""The head search of emphasise: what its scores mean, what it finds, and how the recipe uses its file."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.interventions import ReattendError
from reattend.recipes import Profile, cached_profile, recipe, recipe_class
from reattend.recipes.profiling.material.question_pairs import conflicts
from tiny_language import language_model, tokenizer

# the tiny tokenizer begins every unknown word with a space of its own, so the prompts end with it
DATA = [
    (f"{'The house of Anna is ' * (1 + i % 2)}{a}. It is {b}. The house is ", [f"is {(a, b)[k]}."], (a, b)[k], [a, b])
    for i, (a, b) in enumerate(("xy", "qr", "vw", "kz"))
    for k in (0, 1)
]


def lead(model, data, **parameters):
    """The mean lead of the right answer when every prompt is run alone."""
    chars, total = tokenizer(), 0.0
    for prompt, passages, right, words in data:
        ids = [chars(word, add_special_tokens=False)["input_ids"][0] for word in words]
        x = chars(prompt, return_tensors="pt")
        if parameters:
            with reattend.apply(model, "emphasise", text=passages, occurrence=0, tokenizer=chars, **parameters) as session:
                logits = model(**x).logits[0, -1]
            assert session.applied > 0
        else:
            logits = model(**x).logits[0, -1]
        own = words.index(right)
        total += float(logits[ids[own]] - logits[ids[1 - own]])
    return total / len(data)


def test_scores_are_leads_under_the_recipe_and_the_best_layers_are_searched(tmp_path):
    model = language_model()
    x = tokenizer()("Answer in French.", return_tensors="pt")
    before = model(**x).logits
    profile = recipe_class("emphasise").profile(model, tokenizer(), data=DATA, layers=2, alpha=0.05, batch_size=3, occurrence=0)
    score, tried, layers = (profile.tensors[name] for name in ("score", "tried", "layer_score"))
    search, check = DATA[:4], DATA[4:]
    plain = lead(model, search)
    assert profile.facts["baseline"] == pytest.approx(plain, abs=1e-4)
    for layer in range(4):
        assert float(layers[layer]) == pytest.approx(lead(model, search, heads=[layer], alpha=0.05) - plain, abs=1e-4)
    best = sorted(range(4), key=lambda layer: -float(layers[layer]))[:2]
    assert {int(layer) for layer in tried.any(dim=1).nonzero()[:, 0]} == set(best) and tried.sum() == 8 == profile.facts[
        "searched"
    ]
    for layer, head in tried.nonzero().tolist():
        expected = lead(model, search, heads=[(layer, head)], alpha=0.05) - plain
        assert float(score[layer, head]) == pytest.approx(expected, abs=1e-4)
    assert not score[~tried].any() and score.abs().max() > 1e-3
    # the advice: so many of the best heads as lead most on the other half
    order = [divmod(i, 4) for i in score.flatten().argsort(descending=True, stable=True).tolist()]
    for count, value in profile.facts["together"].items():
        expected = lead(model, check, heads=order[: int(count)], alpha=0.05) - lead(model, check)
        assert value == pytest.approx(expected, abs=1e-4)
    top = profile.facts["top"]
    assert profile.facts["together"][str(top)] == max(profile.facts["together"].values())
    path = str(profile.save(tmp_path / "heads.safetensors"))
    logits = []
    for parameters in (dict(profile_path=path), dict(heads=order[:top])):
        with reattend.apply(model, "emphasise", text="Answer", tokenizer=tokenizer(), **parameters):
            logits.append(model(**x).logits)
    assert torch.equal(*logits) and not torch.equal(logits[0], before)
    assert torch.equal(model(**x).logits, before)
    assert Profile.load(path).facts == profile.facts


def test_the_kept_profile_is_named_by_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    model = language_model()
    with pytest.raises(ReattendError, match="reattend profile emphasise"):
        reattend.apply(model, "emphasise", text="a", profile_path="cached")
    made = cached_profile("emphasise", model, tokenizer(), data=DATA[:2], layers=1, occurrence=0)
    x = tokenizer()("Answer in French.", return_tensors="pt")
    with reattend.apply(model, "emphasise", text="Answer", profile_path="cached", tokenizer=tokenizer()) as session:
        model(**x)
    assert 0 < session.applied <= made.facts["top"]
    # without the word nothing in the cache changes what the recipe does
    assert recipe("emphasise", text="a").factor == 0.3


def test_the_made_up_task_marks_each_fact_once():
    from reattend.recipes.profiling.emphasise import _made_up

    made = list(_made_up(3, seed=2))
    assert len(made) == 6
    for (prompt, one, right, words), (again, two, other, same), conflict in zip(made[::2], made[1::2], conflicts(3, seed=2)):
        assert prompt == again == conflict.prompt and words == same == [right, other]
        assert prompt.count(one[0]) == prompt.count(two[0]) == 1 and right.strip() in one[0] and other.strip() in two[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(data=DATA[:1]), "at least two"),
        (dict(pairs=0), "pairs"),
        (dict(layers=0), "layers"),
        (dict(data=[("a b", ["a"], "c", ["d", "e"])] * 2), "must be one of"),
        (dict(data=DATA, alpha=-1), "alpha"),
    ],
)
def test_what_the_search_refuses(options, message):
    with pytest.raises(ReattendError, match=message):
        recipe_class("emphasise").profile(language_model(), tokenizer(), **options)
