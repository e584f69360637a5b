"""The suites that give pictures to an image generator: what they ask, how what came of it is scored, and tiny pipelines through the runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from reattend.evaluation import evaluate
from reattend.evaluation.suites.composition import Composition, pasted
from reattend.evaluation.suites.given_pictures import touched
from reattend.evaluation.suites.masks import Masks, cut_out
from reattend.evaluation.suites.removal import Removal
from reattend.interventions import ReattendError
from reattend.zoo.worlds.drawing import mask, picture
from reattend.zoo.worlds.shapes import CLEAR, Scene, Thing

# -- what is taken out of pictures ---------------------------------------------------------------------------------------


def test_removal_asks_for_a_thing_whose_box_touches_no_other():
    one = Removal()
    items = one.items(30, 3)
    assert items == one.items(30, 3) == one.items(40, 3)[:30] and len({item.id for item in items}) == 30
    for item in items:
        scene, unwanted, rest = one.parts(item)
        assert 2 <= len(scene.things) <= 3 and {unwanted, *rest.things} == set(scene.things)
        held = one.mask(unwanted, 64)
        whole, without = (np.asarray(picture(s, 64, CLEAR)) for s in (scene, rest))
        assert np.array_equal(whole[~held], without[~held]) and not np.array_equal(whole[held], without[held])


def test_removal_is_scored_by_what_is_in_the_box_and_around_it():
    one = Removal()
    scene = Scene((Thing("star", "green", 0.25, 0.25, 0.15), Thing("ring", "purple", 0.7, 0.7, 0.15)))
    rest, star = Scene(scene.things[1:]), scene.things[0]
    before, held = picture(scene, 64, CLEAR), one.mask(star, 64)
    perfect = one.record((scene, star, rest), before, held, picture(rest, 64, CLEAR))
    assert {name: perfect[name] for name in one.shown} == {
        "right": 1, "empty": 1, "removed": 1, "rest": 1, "psnr": 100, "ssim": pytest.approx(1), "inside": 0,
    }  # fmt: skip
    untouched = one.record((scene, star, rest), before, held, before)
    assert (untouched["empty"], untouched["removed"], untouched["rest"]) == (0, 0, 1) and untouched["inside"] > 0.05
    other = Scene((Thing("circle", "orange", 0.25, 0.25, 0.15), Thing("ring", "cyan", 0.7, 0.7, 0.15)))
    replaced = one.record((scene, star, rest), before, held, picture(other, 64, CLEAR))
    assert (replaced["empty"], replaced["removed"], replaced["rest"]) == (0, 1, 0) and replaced["psnr"] < 40
    ruined = one.record((scene, star, rest), before, held, picture(Scene(()), 64, CLEAR))
    assert (ruined["empty"], ruined["right"]) == (1, 0)
    assert one.score([perfect, replaced])["right"] == 0.5


@pytest.mark.parametrize("suite", [Removal, Composition, Masks])
def test_counts_of_things_that_no_scene_has_are_refused(suite):
    for things in ((3, 2), (0, 0), (0, 2), (-1, 2), (2, 9)):
        with pytest.raises(ReattendError, match=r"things: must be \[fewest, most\], 1 <= fewest <= most <= 5"):
            suite(things=things)
    assert {len(item.data["things"]) for item in suite(things=(5, 5)).items(3, 1)} == {5}


def test_a_strength_that_makes_no_step_is_refused():
    for suite in (Removal, Masks):
        with pytest.raises(ReattendError, match="strength 0.3 of 3 steps is less than one step"):
            suite(strength=0.3, steps=3)
    assert Removal(by="text", strength=0.3, steps=3) and Masks(strength=0.34, steps=3)


@pytest.mark.parametrize("by", ["image", "inpaint", "text"])
def test_removal_runs_every_kind_of_pipeline(by):
    one, given = Removal(by=by, steps=2, strength=1.0), {"invert": True} if by == "text" else {}
    found = evaluate(tiny_pipelines.stable_diffusion(), one, ["none", ("attentive-eraser", given)], count=2, resamples=100)
    plain, steered = found.cells
    assert steered.applied > 0 and set(steered.metrics) == set(one.shown)
    assert [record["inside"] for record in plain.records] != [record["inside"] for record in steered.records]


# -- what is put into pictures, and where things are in them -----------------------------------------------------------------


def test_composition_puts_in_a_thing_whose_box_touches_no_other():
    one = Composition()
    items = one.items(30, 3)
    assert items == one.items(30, 3) == one.items(40, 3)[:30] and len({item.id for item in items}) == 30
    for item in items:
        thing, rest = one.parts(item)
        assert 1 <= len(rest.things) <= 2 and thing not in rest.things
        held = touched(thing.box, 64)
        whole, without = (np.asarray(picture(s, 64, CLEAR)) for s in (Scene((*rest.things, thing)), rest))
        assert np.array_equal(whole[~held], without[~held]) and not np.array_equal(whole[held], without[held])


def test_composition_is_scored_by_the_thing_in_its_box_and_what_is_around_it():
    one = Composition()
    star, ring = Thing("star", "green", 0.25, 0.25, 0.15), Thing("ring", "purple", 0.7, 0.7, 0.15)
    rest, held = Scene((ring,)), touched(star.box, 64)
    before = picture(rest, 64, CLEAR)

    def scored(*things):
        found = one.record((star, rest), before, held, picture(Scene(things), 64, CLEAR))
        return {name: found[name] for name in one.shown}

    assert scored(star, ring) == {"right": 1, "there": 1, "rest": 1, "psnr": 100, "ssim": pytest.approx(1), "inside": 0}
    assert (scored(ring)["there"], scored(ring)["rest"]) == (0, 1) and scored(ring)["inside"] > 0.05
    assert scored(replace(star, colour="blue"), ring)["there"] == 0, "another colour is another thing"
    elsewhere = scored(replace(star, x=0.25, y=0.75), ring)
    assert (elsewhere["there"], elsewhere["right"]) == (0, 0) and elsewhere["psnr"] < 40
    assert (scored(star)["there"], scored(star)["right"]) == (1, 0)
    # pasted in as it is, the thing is there and keeps the light of its own picture
    dark, mask_of_it = one.reference(star, 64)
    image = pasted(before, star, dark, mask_of_it)
    found = one.record((star, rest), before, held, image)
    assert found["there"] == found["rest"] == 1 and found["psnr"] == 100 and 0.03 < found["inside"] < scored(ring)["inside"]
    bright = one.model_copy(update={"light": 1.0})
    image = pasted(before, star, *bright.reference(star, 64))
    assert one.record((star, rest), before, held, image)["inside"] < 0.02


@pytest.mark.parametrize("by", ["text", "inpaint", "pasted"])
def test_composition_runs_every_way(by):
    one = Composition(by=by, steps=2)
    variants = ["none"] if by == "pasted" else ["none", "primecomposer"]
    plain, *steered = evaluate(tiny_pipelines.stable_diffusion(), one, variants, count=2, resamples=100).cells
    assert set(plain.metrics) == set(one.shown)
    for cell in steered:
        assert cell.applied > 0 and [r["inside"] for r in plain.records] != [r["inside"] for r in cell.records]


def test_masks_are_scored_by_their_overlap_with_the_known_ones():
    one = Masks()
    items = one.items(30, 3)
    assert items == one.items(30, 3) == one.items(40, 3)[:30] and {len(one.scene(i).things) for i in items} == {2, 3}
    scene = one.scene(items[0])
    known = np.stack([mask(thing, 64) for thing in scene.things])
    right = one.record(scene, known)
    assert (right["iou"], right["told"], right["rest"]) == (1, 1, 1)
    swapped, nothing = one.record(scene, np.roll(known, 1, axis=0)), one.record(scene, np.zeros_like(known))
    assert (swapped["iou"], swapped["told"], swapped["rest"]) == (0, 0, 1)
    assert (nothing["iou"], nothing["told"]) == (0, 0) and nothing["rest"] < 1
    assert one.words(scene) == scene.shapes and Masks(naming="things").words(scene) == [t.name for t in scene.things]


def test_maps_are_cut_out_where_they_are_high_and_lead():
    maps = torch.tensor([[[4.0, 3.0, 1.0], [0.0, 2.0, 0.0]], [[0.0, 3.5, 1.0], [0.5, 0.1, 2.0]]])
    wanted = [[[True, False, False], [False, True, False]], [[False, True, False], [False, False, True]]]
    assert cut_out(maps, 0.5).tolist() == wanted
    assert cut_out(maps[:1], 0.5).tolist() == [[[True, True, False], [False, True, False]]]


def test_masks_of_a_recipe_and_those_of_words_alone():
    one = Masks(steps=4, strength=0.5)
    variants = ["none", "attencraft", "pag"]
    found = evaluate(tiny_pipelines.stable_diffusion(), one, variants, count=2, resamples=100)
    plain, read, steered = found.cells
    assert set(plain.metrics) == set(one.shown) and len(read.records) == 2
    # what a recipe finds counts in place of the maps, which are read after the edits of one that finds nothing
    assert [r["iou"] for r in read.records] != [r["iou"] for r in plain.records]
    assert steered.applied > 0 and not found.notes, "a recipe that only reads need not act"
