"""The world of shapes: scenes by chance with and without habits, pictures that show them, words that are true of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from reattend.evaluation.metrics.images import box_iou
from reattend.zoo.worlds import language
from reattend.zoo.worlds.drawing import mask, picture
from reattend.zoo.worlds.reading import judge, read
from reattend.zoo.worlds.shapes import CLEAR, COLOURS, CROWDED, HABITS, SHAPES, Scene, Thing, World, sample_scene


def drawn(count: int, seed: int = 0, **how):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **how) for _ in range(count)]


def test_same_seed_same_scenes_and_pixels():
    one, two = drawn(20), drawn(20)
    assert one == two
    assert drawn(20, seed=1) != one
    for a, b in zip(one, two):
        assert np.array_equal(np.asarray(picture(a, 48)), np.asarray(picture(b, 48)))


def test_scenes_keep_the_worlds_limits():
    world = World(things=(2, 4), sizes=(0.1, 0.15), overlap=0.1)
    for scene in drawn(200, world=world):
        assert 1 <= len(scene.things) <= 4
        assert len(set(scene.shapes)) == len(scene.things), "shapes of a scene differ"
        assert [t.x for t in scene.things] == sorted(t.x for t in scene.things)
        for thing in scene.things:
            assert 0.1 <= thing.size <= 0.15 and min(thing.box) >= 0 and max(thing.box) <= 1
            assert thing.shape in SHAPES and thing.colour in COLOURS


def test_a_crowd_repeats_shapes_and_leaves_some_out():
    scenes = drawn(300, world=CROWDED)
    counts = [len(scene.things) for scene in scenes]
    assert max(counts) > 10 and max(counts) <= 12 and np.mean(counts) > 5
    assert all(1 <= len(scene.kinds) <= 5 and set(scene.kinds) == set(scene.shapes) for scene in scenes)
    assert sum(len(scene.kinds) < len(scene.things) for scene in scenes) > 200


def test_habits():
    def companions(scenes):
        having = [(s, a, b) for s in scenes for a, b in HABITS.items() if a in s.shapes]
        return len(having), np.mean([b in s.shapes for s, _, b in having])

    count, kept = companions(drawn(1500))
    assert count > 300 and 0.7 < kept < 0.9  # 85 % less those that found no place or were cut by the most things
    count, absent = companions(drawn(1500, habits="absent"))
    assert count > 300 and absent < 0.45
    broken = drawn(500, habits="broken")
    assert all(any(a in s.shapes for a in HABITS) for s in broken)
    assert companions(broken)[1] == 0


def test_pairs_kept_out_never_occur():
    for scene in drawn(400, world=CLEAR, habits="absent"):
        assert not {(t.colour, t.shape) for t in scene.things} & CLEAR.left_out


def test_difficulty_is_in_the_picture_alone():
    scene = drawn(1)[0]
    clear, noisy = (np.asarray(picture(scene, 48, w), float) for w in (CLEAR, World(noise=1.0)))
    assert clear.shape == noisy.shape == (48, 48, 3)
    assert np.abs(noisy - clear).mean() > 40
    pale = np.asarray(picture(scene, 48, World(noise=0, patches=0, contrast=0.5)), float)
    assert pale.std() < clear.std()


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_and_box_are_where_the_shape_is(shape):
    thing = Thing(shape, "white", 0.4, 0.6, 0.2)
    held = mask(thing, 64)
    rows, columns = np.flatnonzero(held.any(1)), np.flatnonzero(held.any(0))
    left, top, right, bottom = (v * 64 for v in thing.box)
    assert rows[0] >= top - 1 and rows[-1] <= bottom and columns[0] >= left - 1 and columns[-1] <= right
    shown = np.asarray(picture(Scene((thing,)), 64, CLEAR)).min(-1) > 130
    assert (shown != held).mean() < 0.01


def test_reader_reads_the_renderers_pictures():
    found = [judge(s.things, read(picture(s, 64, CLEAR))) for s in drawn(150, world=CLEAR, habits="absent")]
    assert np.mean([f["whole"] for f in found]) > 0.99
    assert np.mean([f["count"] for f in found]) > 0.99
    overlaps = []
    for scene in drawn(40, world=CLEAR, habits="absent"):
        found = {s.name: s.box for s in read(picture(scene, 64, CLEAR))}
        overlaps += [box_iou([v * 64 for v in t.box], found[t.name]) for t in scene.things]
    assert np.mean(overlaps) > 0.8  # boxes hold a margin that some shapes do not fill


def test_reader_sees_what_is_wrong():
    circle, square = Thing("circle", "red", 0.3, 0.3, 0.15), Thing("square", "blue", 0.7, 0.7, 0.15)
    swapped = (Thing("circle", "blue", 0.3, 0.3, 0.15), Thing("square", "red", 0.7, 0.7, 0.15))
    seen = read(picture(Scene(swapped), 64, CLEAR))
    judged = judge((circle, square), seen)
    assert judged == {"binding": 0.0, "shapes": 1.0, "colours": 1.0, "whole": 0.0, "count": 1.0, "extra": 2.0}
    assert judge((circle, square), read(picture(Scene((circle,)), 64, CLEAR)))["binding"] == 0.5
    assert judge((circle,), read(Image.new("RGB", (64, 64))))["binding"] == 0


def test_what_is_said_is_true():
    scene = Scene((Thing("star", "orange", 0.2, 0.5, 0.1), Thing("ring", "blue", 0.7, 0.45, 0.1)))
    assert language.caption(scene) == "an orange star and a blue ring ."
    assert language.presence("star", scene).answer == "yes" and language.presence("moon", scene).answer == "no"
    assert language.count(scene).answer == "two"
    assert language.colour(scene.things[1]).answer == "blue"
    assert language.side(scene.things[0], scene.things[1]).answer == "left"
    assert language.side(Thing("moon", "red", 0.5, 0.1, 0.1), scene.things[1]).answer == "above"


def test_every_word_is_in_the_vocabulary_and_questions_are_balanced():
    rng = np.random.default_rng(0)
    answers = []
    for scene in drawn(300):
        for kind in language.KINDS:
            question = language.ask(kind, scene, rng)
            assert set(question.text.split()) | set(question.answer.split()) <= set(language.WORDS)
            if question.kind == "presence":
                answers.append(question.answer)
        assert set(language.caption(scene).split()) | set(language.prompt(scene, rng).split()) <= set(language.WORDS)
    assert 0.4 < np.mean([a == "yes" for a in answers]) < 0.6
