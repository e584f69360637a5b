"""From words to variants and suites."""

from __future__ import annotations

import pytest
from PIL import Image
from reattend import ReattendError, recipe
from reattend.evaluation.variants import read_spec, split_composed, split_list, suites_of, variants_of
from reattend.recipes.kit.registry import registry


def test_words_are_split_outside_brackets():
    assert split_list("none, var:sink_dims=[1,2]:move=0.5,act:heads={3: [1,2]}") == [
        "none",
        "var:sink_dims=[1,2]:move=0.5",
        "act:heads={3: [1,2]}",
    ]
    assert read_spec("var:sink_dims=[1,2]:move=5e-1") == ("var", {"sink_dims": [1, 2], "move": "5e-1"})
    assert read_spec("emphasise:text='Answer: in French'") == ("emphasise", {"text": "Answer: in French"})
    assert split_composed("vhr+ var:move=1e+0 +./my.yaml+emphasise:text='a+b'") == [
        "vhr",
        "var:move=1e+0",
        "./my.yaml",
        "emphasise:text='a+b'",
    ]
    assert read_spec("C:folder.yaml") == ("C:folder.yaml", {})


def test_settings_hold_unless_the_words_say_otherwise():
    settings = {"streaming": {"window": 8, "sinks": 2}}
    labels = [v.label for v in variants_of("none,streaming,streaming:window=9,streaming+act:heads=all", settings)]
    assert labels == [
        "none",
        "streaming(window=8, sinks=2)",
        "streaming(window=9, sinks=2)",
        'streaming(window=8, sinks=2) + act(heads="all")',
    ]


def test_the_same_recipe_however_it_is_named_is_one_variant(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: streaming\nwindow: 8\n")
    given = [
        "streaming:window=8",
        recipe("streaming", window=8),
        ("streaming", {"window": 8, "sinks": 4}),
        str(file),
        {"name": "streaming", "window": 8},
    ]
    (variant,) = variants_of(given)
    assert variant.label == "streaming(window=8)" and variant.facts[0]["parameters"]["sinks"] == 4


def test_a_changed_file_is_another_variant(tmp_path):
    file = tmp_path / "profile.safetensors"
    file.write_bytes(b"one")
    first = variants_of([("var", {"profile_path": str(file)})])[0].key()
    assert variants_of([("var", {"profile_path": str(file)})])[0].key() == first
    file.write_bytes(b"two")
    (changed,) = variants_of([("var", {"profile_path": str(file)})])
    assert changed.key() != first and changed.label == 'var(profile_path="profile.safetensors")'


def test_a_recipe_that_waits_for_passages():
    (variant,) = variants_of("emphasise:alpha=0.1")
    assert variant.label == "emphasise(alpha=0.1)" and variant.choices == (("emphasise", {"alpha": 0.1}),)
    assert "text" not in variant.facts[0]["parameters"]


@pytest.mark.parametrize(
    "words, problem",
    [
        ("streeming", "did you mean 'streaming'"),
        ("streaming:window=0", "window"),
        ("streaming:windw=3", "not a parameter"),
        ("streaming:window=[1", "not a YAML value"),
        ("none:a=1", "no parameters"),
        ("gone.yaml", "no recipe file"),
        (" , ", "name what to compare"),
    ],
)
def test_words_that_say_nothing(words, problem):
    with pytest.raises(ReattendError, match=problem):
        variants_of(words)


def test_suites_by_name():
    with pytest.raises(ReattendError, match="unknown suite"):
        suites_of("pop,nowhere")
    with pytest.raises(ReattendError, match="at least one suite"):
        suites_of("")
    found = suites_of("pope,pope:noise=0.9,pope", {"pope": {"pairs": 1}})
    assert [(one.name, one.noise, one.pairs) for one in found] == [("pope", 0.5, 1), ("pope", 0.9, 1)]


def test_one_thing_alone_is_a_list_of_one():
    for one in (
        {"name": "streaming", "window": 8},
        ("streaming", {"window": 8}),
        recipe("streaming", window=8),
        "streaming:window=8",
    ):
        assert [variant.label for variant in variants_of(one)] == ["streaming(window=8)"]
    assert [variant.label for variant in variants_of(None)] == ["none"]


def test_a_changed_picture_is_another_variant_and_pictures_are_told_apart_in_labels(tmp_path):
    given = {"boxes": [[0, 0, 0.5, 0.5]], "image": str(tmp_path / "scene.png")}
    keys = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "scene.png")
        keys += [
            variants_of([("attentive-eraser", {**given, "image": one})])[0].key() for one in (given["image"], [given["image"]])
        ]
    assert all(one != other for place, one in enumerate(keys) for other in keys[:place])
    labels = [
        variants_of([("attentive-eraser", {"boxes": [[0, 0, 0.5, 0.5]], "image": Image.new("RGB", (8, 8), colour)})])[0].label
        for colour in ("red", "blue")
    ]
    assert labels[0] != labels[1] and all("base64" not in label and 'image="picture ' in label for label in labels)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("attencraft", {"columns": [[1]]}),
        ("attend-and-excite", {"columns": [[1], [2]]}),
        ("attentive-eraser", {"mask": ("10", "00")}),
    ],
)
def test_what_is_said_otherwise_is_not_awaited(name, given):
    for choice in ((name, given), recipe(name, **given)):
        (variant,) = variants_of([choice])
        assert {field: variant.facts[0]["given"][field] for field in given} == {
            field: recipe(name, **given).model_dump(mode="json")[field] for field in given
        }
    assert {"words", "boxes"} & set(dict(registry()[name].lacking({}).values())), "and is, where it is not said"
    with pytest.raises(ReattendError, match="strangely"):
        variants_of([(name, {**given, "strangely": 1})])
