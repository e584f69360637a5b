"""What users write for recipes - names, pairs, dicts, YAML files, parameters - is right, or one short ReattendError before any work."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import reattend
import torch
from example import modules
from PIL import Image
from reattend.interventions import ReattendError
from reattend.recipes import load_recipe, recipe, save_recipe
from reattend.recipes.kit.checks import abridged
from reattend.recipes.kit.registry import registry
from tiny_language import language_model, tokenizer

BOMB = "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9) if a else ','.join('x' * 9)}]\n" for a, b in zip(["", *"abcdef"], "abcdefg")
)
WEIRD = [
    None, True, 3, -1, 10**30, -(10**30), 1.5, float("nan"), float("inf"), "", "x", "\0", "/tmp", [], [0], [[0]], [[0, 0]], [[[0, 0]]],
    {}, {"a": 1}, {0: [0]}, {0: 0}, (), [1.5], ["a"], [["a"], ["b", "c"]], [None], object(), b"x", {1, 2}, [-1], [10**30], [[0, 10**30]],
    range(3), torch.ones(2), 1j, type, "all", "last0", [[]], [""],
]  # fmt: skip


@pytest.mark.parametrize(
    "data, words",
    [
        ("name: streaming\n".encode("utf-16"), "is not UTF-8 text; it looks like UTF-16"),
        (bytes(range(256)), "is not UTF-8 text"),
        (b"", "must be a mapping"),
        (b"- 3", "must be a mapping"),
        (b"name: [streaming]", "must be a mapping with a `name`"),
        (b"name: streaming\n3: 4\n", "3 names no parameter"),
        (b"name: streaming\nself: 3\n", "self is not a parameter"),
        (b"name: streaming\nwindow: " + b"[" * 2000 + b"]" * 2000, "nested more than"),
        (BOMB.encode() + b"name: streaming\nwindow: *g\n", "with its aliases written out"),
        (b"name: streaming\nwindow: &a [*a]\n", "a value refers to itself"),
        (b"name: streaming\nwindow: 3\nwindow: 4\n", "it names 'window' twice"),
        (b"name: streaming\nversion: 9\n", "version 9 of recipe 'streaming' is not known"),
        (b"name: streaming\nwindow: !!python/name:os.system x\n", "is not valid YAML"),
    ],
)
def test_broken_recipe_files(data, words, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    for read in (load_recipe, lambda p: reattend.apply(language_model(), str(p))):
        with pytest.raises(ReattendError, match=words) as found:
            read(path)
        assert len(str(found.value)) < 1000


@pytest.mark.parametrize(
    "name, parameters, words",
    [
        ("softpag", {"heads": [[1]]}, r"heads\.0\.1 is missing, got \[1\]; heads: single heads as \[layer, head\] pairs"),
        ("pag", {"scale": float("nan")}, "scale: must be a finite number, got nan"),
        ("prompt-reweight", {"columns": [([2], float("nan"))]}, "columns: must be a finite number"),
        ("nag", {"negative": b"x"}, "negative: must be no bytes; give a text as str, got b'x'"),
        ("vsf", {"negative": ["a", b"x"]}, "negative: must be no bytes"),
        (
            "prompt-reweight",
            {"words": {"r\ud800d": 2.0}},
            "words: holds half of a letter .a lone surrogate., which no tokenizer reads",
        ),
        ("regional", {"regions": {"r\ud800d": [0, 0, 1, 1]}}, "regions: holds half of a letter"),
    ],
)
def test_values_of_which_the_message_says_what_would_be_right(name, parameters, words):
    with pytest.raises(ReattendError, match=words):
        recipe(name, **parameters)


def test_aliases_of_a_person_s_size_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffname: act\nheads:\n  - &pair [0, 1]\n  - [1, 1]\n".encode())
    assert load_recipe(path).heads == ((0, 1), (1, 1))  # type: ignore[attr-defined]
    path.write_text("name: emphasise\ntext: &t in French\nranges: null\n")
    assert load_recipe(path).text == "in French"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "choice, words",
    [
        (None, "a recipe must be a name"),
        (3, "got 3"),
        (["streaming"], r"apply\(model, \*recipes\)"),
        (("streaming",), "pair"),
        (("streaming", [1]), "pair"),
        ((3, {}), "named by a text"),
        (("streaming", {3: 4}), "3 names no parameter|go with one recipe name"),
        (type(recipe("streaming")), "give its name 'streaming'"),
        ({}, "must be a mapping with a `name`"),
        (Path("nowhere.yaml"), "no recipe file at 'nowhere.yaml'"),
        (Path("tests"), "is a folder"),
        ("", "unknown recipe ''"),
        ("x" * 5000, "unknown recipe 'xxx"),
    ],
)
def test_what_apply_takes(choice, words):
    for more in ({}, {"window": 3}):
        with pytest.raises(ReattendError, match=words) as found:
            reattend.apply(language_model(), choice, **more)
        assert len(str(found.value)) < 1000


@pytest.mark.parametrize(
    ("slug", "parameters", "words"),
    [(slug, *bad) for slug, module in modules().items() for bad in getattr(module, "BAD", ())],
)
def test_bad_parameters_of_methods(slug, parameters, words):
    """`BAD` of a method's example file: pairs (parameters, what the error says)."""
    with pytest.raises(ReattendError, match=words):
        recipe(slug, **parameters)


@pytest.mark.parametrize("layers", [3, [[0]], [], [-1], [True], ["a"], "last0", {}, None])
def test_layers_of_seka(layers):
    with pytest.raises(ReattendError, match="layers must be 'all', 'firstN', 'lastN' or a list"):
        recipe("seka", text="x", layers=layers)


@pytest.mark.parametrize("slug", registry())
def test_no_parameter_takes_what_overflows_later(slug):
    for name in registry()[slug].model_fields:
        for value in (10**30, -(10**30), [10**30], [[0, 10**30]]):
            with pytest.raises(ReattendError, match=name):
                recipe(slug, **{name: value})


@pytest.mark.parametrize("slug", registry())
def test_any_value_of_any_parameter_is_taken_or_named(slug):
    """And what is taken by a language recipe runs, or is refused as well."""
    fields, model, words = registry()[slug].model_fields, language_model(), tokenizer()
    x = words(["Anna has a red house."], return_tensors="pt")
    for name in fields:
        for value in WEIRD:
            more = {"text": "red house"} if "text" in fields and name not in ("text", "ranges") else {}
            if slug in ("act", "retrieval-heads") and name not in ("heads", "profile_path"):
                more = {"heads": [[0, 0]]}
            try:
                made = recipe(slug, **{name: value, **more})
                if "llm" in made.info.kinds:
                    with warnings.catch_warnings(), torch.no_grad():
                        warnings.simplefilter("ignore", reattend.ReattendWarning)  # nothing to do is right too
                        with reattend.apply(model, made, tokenizer=words):
                            model(**x)
            except ReattendError as error:
                assert len(str(error)) < 1500


def test_a_truth_value_is_no_number():
    with pytest.raises(ReattendError, match="window: must be no truth value, got True"):
        recipe("streaming", window=True)


def test_recipe_files_are_not_overwritten_unasked(tmp_path):
    path = save_recipe(recipe("streaming", window=3), tmp_path / "new" / "mine.yaml")
    with pytest.raises(ReattendError, match="exists already.*overwrite=True"):
        save_recipe(recipe("streaming", window=4), path)
    assert load_recipe(path).window == 3  # type: ignore[attr-defined]
    save_recipe(recipe("streaming", window=4), path, overwrite=True)
    assert load_recipe(path).window == 4  # type: ignore[attr-defined]
    with pytest.raises(ReattendError, match="is a folder"):
        save_recipe(recipe("streaming"), tmp_path)
    with pytest.raises(ReattendError, match="takes a Recipe object"):
        save_recipe("streaming", path)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [[(1.5, 3)], [(1, 3.7)], [(True, 1)], {1: [2.5]}, [(1, None)]])
@pytest.mark.parametrize("slug", ["emphasise", "act", "retrieval-heads"])
def test_heads_are_whole_numbers(slug, heads):
    text = {"text": "x"} if slug == "emphasise" else {}
    with pytest.raises(ReattendError, match="heads"):
        recipe(slug, heads=heads, **text)


@pytest.mark.parametrize("heads", [[], {}, ()])
def test_no_heads_are_no_request(heads):
    with pytest.raises(ReattendError, match="heads is empty"):
        recipe("emphasise", text="x", heads=heads)
    # whose card calls an empty list the identity
    assert recipe("retrieval-heads", heads=heads).heads == ()


def test_a_copy_with_other_parameters_keeps_nothing_that_was_worked_out_from_the_old_ones():
    first = recipe("attentive-eraser", boxes=[[0.1, 0.1, 0.4, 0.4]])
    assert first.regions == [[(0.1, 0.1, 0.4, 0.4)]] and first.serial
    other = [(0.5, 0.5, 0.9, 0.9)]
    for copied in (first.model_copy(update={"boxes": other}), first.model_copy(update={"boxes": other}, deep=True)):
        assert copied.regions == [other] and copied.serial != first.serial
    assert copy.deepcopy(first) == copy.copy(first) == first


def test_pictures_and_masks_are_shown_by_what_tells_them_apart():
    scene, mask = Image.new("RGB", (64, 64), "red"), torch.eye(64)
    shown = repr(recipe("attentive-eraser", mask=[mask, mask.T.flip(0)], image=scene, scale=3))
    assert len(shown) < 500 and "image='picture " in shown and "scale=3.0" in shown and shown.count("of 64 x 64'") == 2
    assert len({part.split()[1] for part in shown.split("'") if part.startswith("mask ")}) == 2
    assert "mask=('10', '01')" in repr(recipe("attentive-eraser", mask=torch.eye(2))), "a small one is written out"
    words = {"words": [["a", "10"], ["b"]], "columns": None}
    assert abridged(words) == words and abridged([]) == [] and abridged("data") == "data"
