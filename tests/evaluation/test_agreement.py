"""The suite for encoders of images: what it says of the plain model, of a changed one, and of models of other kinds."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import reattend
import tiny_encoders
import torch
from reattend.evaluation import evaluate
from reattend.evaluation.subject import Subject
from reattend.evaluation.suites import suite
from reattend.evaluation.suites.base import Item
from reattend.interventions import HeadGain, ReattendError
from text_pipelines import llama, text_pipe, tokenizer  # noqa: F401


@pytest.mark.parametrize("build", [tiny_encoders.vit, tiny_encoders.siglip_vision, tiny_encoders.dinov2])
def test_a_plain_encoder_agrees_with_itself(build):
    result = evaluate(build(), ["agreement:side=24"], ["none"], count=6, batch=3, resamples=20, progress=False)
    found = {name: metric for name, metric in result.cells[0].metrics.items()}
    assert float(found["found"].value) == 1.0 and abs(float(found["distance"].value)) < 1e-6
    assert float(found["class"].value) == (1.0 if build is tiny_encoders.vit else 0.0)


def test_a_changed_encoder_is_further_away():
    """Beside what it says while the recipe rests."""
    model = tiny_encoders.vit()
    asked, items = suite("agreement", side=24), suite("agreement", side=24).items(4, 1)
    subject, session = Subject(model), reattend.edit(model, HeadGain(factor=0.0))

    @contextlib.contextmanager
    def paused():
        session.remove()
        yield
        session.attach()

    subject.steering = SimpleNamespace(paused=paused)
    records = asked.answer(subject, items)
    session.remove()
    distances = [record["distance"] for record in records]
    assert min(distances) > 5e-5, distances
    features, classes = subject.seen([_picture(item) for item in items])
    assert features.shape == (4, 32) and classes.shape == (4,)


def _picture(item: Item):
    import numpy as np
    from reattend.zoo.worlds.drawing import picture
    from reattend.zoo.worlds.shapes import World, sample_scene

    return picture(sample_scene(np.random.default_rng(item.data["scene"]), World(), habits="kept"), 24)


def test_prepared_as_without_a_processor():
    """A processor of the encoder's own size, mean and deviation 0.5 makes the same pixels, up to how it shrinks."""
    from transformers import ViTImageProcessor

    model, items = tiny_encoders.vit(), suite("agreement").items(2, 0)
    pictures = [_picture(item) for item in items]
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.testing.assert_close(
        Subject(model).seen(pictures)[0], Subject(model, processor).seen(pictures)[0], atol=1e-4, rtol=1e-4
    )


def test_recipes_beside_a_processor_of_images():
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": 24, "width": 24})
    pipe = pipeline("image-classification", model=tiny_encoders.vit(), image_processor=processor)
    asked = ["none", "evit:keep=0.5"]
    result = evaluate(reattend.wrap(pipe), ["agreement:side=24"], asked, count=4, batch=2, resamples=20, progress=False)
    plain, steered = (cell.metrics["distance"].value for cell in result.cells)
    assert abs(float(plain)) < 1e-6 < float(steered)


def test_refused_for_other_kinds_of_models(text_pipe):  # noqa: F811
    with pytest.raises(ReattendError, match="needs an encoder of images"):
        evaluate(text_pipe, ["agreement"], ["none"], count=2)
    with pytest.raises(ReattendError, match="needs a language model"):
        evaluate(tiny_encoders.vit(), ["perplexity"], ["none"], count=2)


def test_on_the_command_line(call, tmp_path):
    from transformers import ViTImageProcessor

    model = tiny_encoders.vit()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    shown = json.loads(call("sites", str(tmp_path), "--json").stdout)["sites"]
    assert {site["stack"] for site in shown} == {"vision"} and len(shown) == 4
    said = json.loads(call("list", "--kind", "vision", "--json").stdout)
    assert all("vision" in item["kinds"] for item in said)
