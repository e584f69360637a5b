"""The suites over the world of shapes: what they ask, how answers are scored, and a tiny untrained model through the runner."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reattend
import torch
from reattend.evaluation import evaluate, suite
from reattend.evaluation.suites.chair import VOCABULARY, Chair
from reattend.evaluation.suites.layout import Layout, located
from reattend.evaluation.suites.negatives import Negatives
from reattend.evaluation.suites.pope import SPLITS, Pope
from reattend.evaluation.suites.questions import Questions, given
from reattend.evaluation.suites.shapes_world import frequencies, together
from reattend.zoo.worlds.drawing import picture
from reattend.zoo.worlds.reading import read
from reattend.zoo.worlds.shapes import CLEAR, HABITS, SHAPES, Scene, Thing
from text_pipelines import llama, text_pipe, tokenizer  # noqa: F401

LVLM = ("pope", "chair", "questions")


@pytest.mark.parametrize("name", LVLM)
def test_items_are_the_same_for_a_seed_and_more_scenes_only_add(name):
    one = suite(name)
    items = one.items(20, 3)
    assert items == one.items(20, 3) and items != one.items(20, 4)
    more = one.items(25, 3)
    assert more[: len(items)] == items and len({item.id for item in more}) == len(more)
    assert len({item.group for item in more}) == 25
    a, b = one.picture(items[0]), one.picture(items[0])
    assert np.array_equal(np.asarray(a), np.asarray(b)) and a.size == (48, 48)
    harder = suite(name, noise=1.5)
    assert harder.items(20, 3) == items, "noise changes the picture, not the scene"
    assert not np.array_equal(np.asarray(harder.picture(items[0])), np.asarray(a))


def test_pope_is_balanced_and_true():
    one = Pope(habits="kept")
    items = one.items(60, 0)
    for item in items:
        assert item.data["truth"] == (item.data["shape"] in one.scene_of(item).shapes)
    for split in SPLITS:
        truths = [item.data["truth"] for item in items if split in item.data["splits"]]
        assert 2 * sum(truths) == len(truths) > 100
    assert all(item.data["splits"] == list(SPLITS) for item in items if item.data["truth"])


def test_a_crowd_is_asked_for_each_shape_once_and_stays_balanced():
    one = Pope(crowded=True)
    items = one.items(60, 0)
    assert len({item.id for item in items}) == len(items)
    for split in SPLITS:
        truths = [item.data["truth"] for item in items if split in item.data["splits"]]
        assert 2 * sum(truths) == len(truths) > 100
    truths = [item.data["truth"] for item in Chair(crowded=True).items(60, 0)]
    assert all(len(set(truth)) == len(truth) for truth in truths)
    assert max(len(one.scene_of(item).things) for item in items) > 10
    assert Pope().items(20, 0) == Pope(crowded=False).items(20, 0) != one.items(20, 0)
    with pytest.raises(reattend.ReattendError, match="crowded"):
        Questions(crowded=True)  # "the star" is one thing


def test_the_splits_ask_for_what_they_say():
    one = Pope(pairs=1, habits="broken")
    assert together("circle")["square"] > 0.8 * frequencies()["circle"], "a habit of the world"
    companions = popular = asked = 0
    for number in range(80):
        scene = one.scene(0, number)
        absent = one.absent(scene, 1, np.random.default_rng(number))
        assert not {shape for these in absent.values() for shape in these} & set(scene.shapes)
        broken = {HABITS[shape] for shape in scene.shapes if shape in HABITS}
        asked += 1
        companions += absent["adversarial"][0] in broken
        best = max((s for s in SHAPES if s not in scene.shapes), key=lambda s: frequencies()[s])
        popular += absent["popular"][0] == best
    assert popular == asked and companions > 0.8 * asked
    # with one pair the random split is no copy of the others
    randoms = {one.absent(one.scene(0, 0), 1, np.random.default_rng(i))["random"][0] for i in range(30)}
    assert len(randoms) > 2


def test_pope_scores_by_split():
    one = Pope()
    records = [
        {"answer": "yes", "truth": True, "splits": list(SPLITS)},
        {"answer": "yes", "truth": False, "splits": ["adversarial", "popular"]},
        {"answer": "no", "truth": False, "splits": ["random"]},
    ]
    found = one.score(records)
    assert [found[f"accuracy/{split}"] for split in SPLITS] == [1, 0.5, 0.5]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["yes_ratio/random"] == 0.5 and found["f1/random"] == 1
    unsure = [{"answer": "perhaps", "truth": True, "splits": ["random"]}]
    assert one.score(unsure)["accuracy/random"] == 1 and one.score(unsure)["accuracy/popular"] == 0
    assert Pope(strict=True).score(unsure)["unknown/random"] == 1 and Pope(strict=True).score(unsure)["accuracy/random"] == 0


def test_chair_of_shapes():
    said = VOCABULARY.mentions("a red circle , two crosses and an orange star .")
    assert said == ["circle", "cross", "star"]
    records = [
        {"caption": "a red circle and a blue moon .", "truth": ["circle"]},
        {"caption": "a ring .", "truth": ["ring", "star"]},
    ]
    found = Chair().score(records)
    assert found["chair_i"] == pytest.approx(1 / 3) and found["chair_s"] == 0.5
    assert found["recall"] == pytest.approx(2 / 3) and found["length"] == 5.5


def test_questions_are_answered_by_the_first_word_that_could():
    assert given("count", "there are 3 shapes") == "three" and given("count", "many") is None
    assert given("colour", "the shape is Red , not blue") == "red"
    assert given("side", "to the left") == "left" and given("presence", "Yes, it is") == "yes"
    one = Questions()
    items = one.items(40, 0)
    kinds = [item.data["kind"] for item in items]
    assert kinds.count("presence") == kinds.count("colour") == kinds.count("count") == 40 > kinds.count("side") > 20
    right = [{**item.data, "answer": item.data["truth"]} for item in items]
    assert set(one.score(right).values()) == {1.0}
    assert set(one.score([{**record, "answer": "?"} for record in right]).values()) == {0.0}


@pytest.fixture(scope="module")
def untrained():
    from reattend.zoo.train.shapes_llava import build_model, build_processor
    from transformers import pipeline

    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.dim() == 2:
            parameter.data *= 4
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu")


def test_an_untrained_model_through_all_three(untrained):
    var = ("var", {"sink_dims": [1, 5], "tau": 1.0, "summ": 0.0, "rho": 1.0, "move": 0.9})
    suites = [Pope(), Chair(tokens=6), Questions()]
    one, two = (evaluate(untrained, suites, ["none", var], count=6, resamples=100) for _ in "12")
    assert [c.as_dict() | {"cost": 0} for c in one.cells] == [c.as_dict() | {"cost": 0} for c in two.cells]
    for name, key in (("pope", "answer"), ("chair", "caption"), ("questions", "answer")):
        plain, steered = (next(c for c in one.cells if c.suite.name == name and bool(c.recipes) == s) for s in (False, True))
        assert steered.applied > 0 and steered.groups == 6
        assert [r[key] for r in plain.records] != [r[key] for r in steered.records], "the edit shows in what is said"


def test_what_a_batch_says_is_what_each_item_says_alone(untrained):
    from reattend.evaluation import Subject

    one = Questions()
    items, subject = one.items(3, 0), Subject(untrained)
    together_ = [record["answer"] for record in one.answer(subject, items)]
    assert together_ == [one.answer(subject, [item])[0]["answer"] for item in items]


def test_a_language_model_does_not_fit(text_pipe):  # noqa: F811
    with pytest.raises(reattend.ReattendError, match="needs a model that reads pictures"):
        evaluate(text_pipe, "pope")


# -- what stays out of pictures ---------------------------------------------------------------------------------------


def test_negatives_name_one_thing_whose_colour_no_other_has():
    one = Negatives()
    items = one.items(30, 3)
    assert items == one.items(30, 3) == one.items(40, 3)[:30] and len({item.id for item in items}) == 30
    for item in items:
        asked, unwanted, others = one.parts(item)
        assert len(asked) == 3 and len(others) == 2 and unwanted in asked
        assert unwanted.colour not in {t.colour for t in others} and unwanted.shape not in {t.shape for t in others}
    assert {len(Negatives(things=4).parts(item)[2]) for item in Negatives(things=4).items(5, 0)} == {3}
    assert [Negatives(naming=naming).text(Thing("star", "green", 0, 0, 0)) for naming in ("thing", "shape", "colour")] == [
        "a green star", "star", "green",
    ]  # fmt: skip


def test_negatives_need_guidance_where_the_pipeline_is_told():
    with pytest.raises(reattend.ReattendError, match="guidance above 1"):
        Negatives(by="pipeline", guidance=1)
    assert Negatives(by="none", guidance=1).steps == 20


class Drawing:
    """A pipeline that draws a picture of what it is asked for, less what its negative prompts name."""

    components: dict = {}

    def __init__(self):
        self.told = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, negative_prompt=(), **more):
        self.told.append((list(negative_prompt), more))
        images = []
        for prompt, unwanted in zip(prompts, [*negative_prompt, *[""] * len(prompts)]):
            names = [part.split()[1:] for part in prompt.replace(" and ", " , ").split(" , ")]
            kept = [(colour, shape) for colour, shape in names if not {colour, shape} & set(unwanted.split())]
            things = tuple(Thing(shape, colour, 0.2 + 0.3 * i, 0.5, 0.13) for i, (colour, shape) in enumerate(kept))
            images.append(picture(Scene(things), 64, CLEAR))
        return SimpleNamespace(images=images)


class Listening:
    """Stands in for the recipes at work: keeps the texts that the suite names."""

    def __init__(self):
        self.heard = []

    @contextlib.contextmanager
    def marked(self, rows):
        self.heard.append(rows)
        yield

    def paused(self):
        return contextlib.nullcontext()


@pytest.mark.parametrize("naming", ["thing", "shape", "colour"])
def test_negatives_are_scored_by_what_is_in_the_picture(naming):
    for by, out in (("none", 0.0), ("pipeline", 1.0)):
        one, pipe, steering = Negatives(naming=naming, by=by, steps=7), Drawing(), Listening()
        subject = SimpleNamespace(source=pipe, marked=lambda s=steering, **rows: s.marked(rows), quiet=contextlib.nullcontext)
        items = one.items(6, 0)
        records = one.answer(subject, items)
        texts = [record["negative"] for record in records]
        assert steering.heard == [{"negative": texts}] and texts == [one.text(one.parts(item)[1]) for item in items]
        ((told, more),) = pipe.told
        assert told == (texts if by == "pipeline" else []) and more["num_inference_steps"] == 7
        found = one.score(records)
        assert found == {"right": out, "kept_out": out, "rest": 1.0, "count": out}


# -- what lies where in pictures --------------------------------------------------------------------------------------


def test_layouts_have_a_box_for_each_thing_in_an_order_that_says_nothing():
    one = Layout()
    items = one.items(40, 3)
    assert items == one.items(40, 3) == one.items(50, 3)[:40] and len({item.id for item in items}) == 40
    for item in items:
        asked = one.asked(item)
        assert len(asked) in (2, 3) and len({t.shape for t, _ in asked.values()}) == len(asked)
        for _, (left, top, right, bottom) in asked.values():
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    lefts = [[box[0] for _, box in one.asked(item).values()] for item in items]
    assert 5 < sum(each == sorted(each) for each in lefts) < 25
    assert {len(item.data["asked"]) for item in Layout(least=1, most=1).items(5, 0)} == {1}
    with pytest.raises(reattend.ReattendError, match="least 3 .* most 2"):
        Layout(least=3, most=2)


def test_layouts_are_scored_by_where_the_right_things_are():
    """A picture of the boxes, one with two things that have changed places, one with another colour, and an empty one."""
    one = Layout()
    things = [Thing("circle", "red", 0.25, 0.3, 0.15), Thing("square", "green", 0.7, 0.6, 0.15)]
    asked = [(t, t.box) for t in things]

    def found(*there):
        image = picture(Scene(there), 64, CLEAR)
        return located(asked, read(image), image.size)

    swapped = [Thing(t.shape, t.colour, other.x, other.y, t.size) for t, other in zip(things, things[::-1])]
    right = found(*things)
    assert right["placed"] == right["inside"] == 1 and right["iou"] > 0.8
    assert found(*swapped) == found() == {"placed": 0, "iou": 0, "inside": 0}
    half = found(things[0], Thing("square", "blue", 0.7, 0.6, 0.15))
    assert half["placed"] == half["inside"] == 0.5
    off = found(things[0], Thing("square", "green", 0.7, 0.72, 0.15))
    assert off["placed"] == 0.5 and off["inside"] == 1 and 0.5 < off["iou"] < 0.8
    # of two that are alike the one that fits counts
    assert found(*things, Thing("circle", "red", 0.8, 0.2, 0.12))["placed"] == 1

    steering, pipe = Listening(), Drawing()
    subject = SimpleNamespace(source=pipe, marked=lambda **rows: steering.marked(rows), quiet=contextlib.nullcontext)
    items = one.items(4, 0)
    records = one.answer(subject, items)
    names = [list(one.asked(item)) for item in items]
    (heard,) = steering.heard
    assert heard["words"] == names and [list(boxes) for boxes in heard["boxes"]] == names
    assert heard["boxes"][0][names[0][0]] == tuple(items[0].data["boxes"][0])
    for own, boxes in zip(heard["cells"], heard["boxes"], strict=True):
        masks = np.asarray(list(own.values()), dtype=bool)
        assert [text.split(" ", 1)[1] for text in own] == list(boxes) and (masks.sum(axis=0) == 1).all()
        for mask, (left, top, right, bottom) in zip(masks, boxes.values(), strict=True):
            assert mask[int((top + bottom) / 2 * len(mask)), int((left + right) / 2 * len(mask))]
    assert one.score(records)["binding"] == 1 and one.score(records)["extra"] == 0 and one.score(records)["placed"] < 1


def test_of_several_pictures_of_a_layout_the_one_that_fits_is_kept():
    one = Layout(pictures=3)
    (item,) = one.items(1, 0)
    things = [replace(t, x=(a + c) / 2, y=(b + d) / 2, size=(c - a) / 2) for t, (a, b, c, d) in one.asked(item).values()]
    drawn, noise = [Scene(tuple(things[:1])), Scene(tuple(things)), Scene(())], []

    def pipe(prompts, generator, **more):
        noise.append(generator[0].initial_seed())
        return SimpleNamespace(images=[picture(drawn[len(noise) - 1], 64, CLEAR)])

    subject = SimpleNamespace(source=pipe, marked=lambda **rows: contextlib.nullcontext(), quiet=contextlib.nullcontext)
    (record,) = one.answer(subject, [item])
    assert record["placed"] == record["binding"] == 1 and noise == [item.data["noise"] + turn for turn in range(3)]


# -- words of a picture's prompt ----------------------------------------------------------------------------------------


def test_binding_names_the_words_of_its_prompts_to_recipes():
    """A recipe that waits for words is given those of every prompt of a batch, colours and shapes as asked for."""
    told = []

    class Noting:
        def marked(self, rows):
            told.append(rows)
            return contextlib.nullcontext()

    for naming in ("both", "colours", "shapes"):
        one = suite("binding", steps=1, naming=naming)
        items = one.items(3, 0)
        asked = [item.data["asked"] for item in items]
        drawn_at = [one.words(item) for item in items]
        for pairs, words in zip(asked, drawn_at):
            wanted = {"both": sum(pairs, []), "colours": [c for c, _ in pairs], "shapes": [s for _, s in pairs]}[naming]
            assert words == list(dict.fromkeys(wanted))
        subject = SimpleNamespace(marked=lambda **rows: Noting().marked(rows), quiet=contextlib.nullcontext, source=blank)
        records = one.answer(subject, items)
        assert told[-1] == {"words": drawn_at} and len(records) == 3


def blank(prompts, generator, **more):
    from PIL import Image

    blank.prompts, blank.more = prompts, more
    return SimpleNamespace(images=[Image.new("RGB", (64, 64), "white") for _ in generator])


def test_words_said_twice_in_a_row():
    one = suite("binding", steps=1, naming="colours", prompting="repeated")
    item = next(item for item in one.items(20, 0) if len({c for c, _ in item.data["asked"]}) == len(item.data["asked"]))
    subject = SimpleNamespace(marked=lambda **_: contextlib.nullcontext(), quiet=contextlib.nullcontext, source=blank)
    one.answer(subject, [item])
    words = blank.prompts[0].split()
    for colour, shape in item.data["asked"]:
        assert words.count(colour) == 2 and words.count(shape) == 1 and words[words.index(colour) + 1] == colour


@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_the_embeddings_of_words_are_scaled_away_from_those_of_the_empty_prompt(name):
    from reattend.evaluation.suites.word_embeddings import scaled
    from tiny_prompts import FAMILIES

    pipe, _ = FAMILIES[name]()
    prompts = ["a red sky", "the sky"]
    same, more = (scaled(pipe, prompts, [["red"], ["the", "sky"]], factor) for factor in (1.0, 3.0))
    own, empty = (same[f"{kind}prompt_embeds"] for kind in ("", "negative_"))
    alone = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(own, alone[0])
    torch.testing.assert_close(empty, alone[1])
    moved = (more["prompt_embeds"] != own).any(dim=2)
    ids = pipe.tokenizer(prompts)["input_ids"]
    letters = [pipe.tokenizer.convert_ids_to_tokens(row) for row in ids]
    # of "a red sky" the three letters of "red", of "the sky" all but start and end
    assert moved[0].nonzero()[:, 0].tolist() == [2, 3, 4], letters
    assert moved[1].nonzero()[:, 0].tolist() == list(range(1, len(ids[1]) - 1))
    torch.testing.assert_close((more["prompt_embeds"] - empty)[moved], 3 * (own - empty)[moved])
    assert all(torch.equal(more[key], same[key]) for key in more if "pooled" in key)


def test_embeddings_are_not_scaled_where_a_t5_reads_the_prompt_too():
    from reattend.evaluation.suites.word_embeddings import scaled
    from tiny_prompts import FAMILIES

    for name in ("SD3", "PixArt"):
        pipe, _ = FAMILIES[name]()
        with pytest.raises(reattend.ReattendError, match="CLIP text encoders alone, and .* has others"):
            scaled(pipe, ["a red sky"], [["red"]], 2.0)


def test_recipes_with_words_are_measured_on_pictures():
    """prompt-reweight and attend-and-excite wait for the words of a batch, and act then."""
    import tiny_pipelines

    pipe = tiny_pipelines.stable_diffusion()
    one = suite("binding", steps=2, side=16, prompting="none")
    variants = ["none", "prompt-reweight:factor=4:stop=1", "attend-and-excite:resolution=4"]
    found = evaluate(pipe, [one], variants, count=2, progress=False, resamples=50)
    applied = {cell.recipe: cell.applied for cell in found.cells}
    assert [count > 0 for count in applied.values()] == [False, True, True], applied
