"""Maps of words: where a picture looks for the words of its prompt, before and after, as numbers and as a picture."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import reattend
import tiny_pipelines
import torch
from reattend.hooks import Plan, Words, attach
from reattend.interventions import ReattendError
from reattend.recipes.kit.denoisers import text_sites
from reattend.recipes.kit.heat import Heat
from text_pipelines import llama, text_pipe, tokenizer  # noqa: F401

PROMPT, CALL = "a red sky", {"num_inference_steps": 2, "progress": False}
PIPES = {"SD": tiny_pipelines.stable_diffusion, "SD3": tiny_pipelines.stable_diffusion_3}
SMALL = {"height": 16, "width": 16}


def compared(pipe: Any, prompt: Any = PROMPT, **more: Any) -> Any:
    return reattend.compare(
        pipe, ("prompt-reweight", {"words": "sky", "factor": 3.0, "stop": 1.0}), prompt=prompt, **CALL, **more
    )


@pytest.mark.parametrize("name", PIPES)
def test_maps_are_those_of_the_runs_that_were_compared(name):
    pipe = PIPES[name]()
    report = compared(pipe, **SMALL)
    maps = report.word_maps(["red", "sky"])
    heat = Heat(text_sites(reattend.sites(pipe)), Words("w", [["red", "sky"]]))
    drawn = []
    with attach(pipe, [Plan("look", heat.steps)]):
        drawn.append(pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **SMALL).images[0])
    assert drawn[0].tobytes() == report.before.pictures[0].tobytes()
    for n, word in enumerate(("red", "sky")):
        assert torch.equal(maps["before"][word], heat.map(f"w.{n}")[0])
    ratio = maps["after"]["sky"].mean() / maps["before"]["sky"].mean()
    assert 2.5 < ratio < 3.5 and 0.8 < maps["after"]["red"].mean() / maps["before"]["red"].mean() < 1.2
    again = report.word_maps(["red", "sky"])
    assert all(torch.equal(again[side][word], maps[side][word]) for side in maps for word in maps[side])
    assert not reattend.hooks.running(pipe)


def test_the_picture_has_a_column_for_each_word():
    report = compared(tiny_pipelines.stable_diffusion())
    sheets = [report.words(given) for given in (None, "sky", ["sky"], ["a", "red", "sky"])]
    # by default the words with content: of "a red sky" two
    assert sheets[0].width > sheets[1].width and sheets[3].width > sheets[0].width
    assert sheets[1].tobytes() == sheets[2].tobytes() and len({sheet.height for sheet in sheets}) == 1
    assert list(report.word_maps()["after"]) == ["red", "sky"]


def test_words_after_what_the_text_encoders_read_are_left_out_unless_asked_for():
    report = compared(tiny_pipelines.stable_diffusion(), "a red sky and " * 20 + "one map")
    maps = report.word_maps()
    assert list(maps["before"]) == list(maps["after"]) == ["red", "sky"]
    with pytest.raises(ReattendError, match="'map' is not in prompt 0"):
        report.word_maps("map")


def test_a_prompt_without_content():
    report = reattend.compare(tiny_pipelines.stable_diffusion(), ("pag", {"scale": 3.0}), prompt="of the", **CALL)
    with pytest.raises(ReattendError, match="words must be given for this prompt, which has no words with content"):
        report.words()
    assert list(report.word_maps("the")["after"]) == ["the"]


def test_maps_beside_regions_are_those_of_the_regions():
    """At base_ratio 0 places of a region give the prompt nothing."""
    regional = ("regional", {"regions": {"a dog": [0, 0, 0.5, 1]}, "base_ratio": 0.0})
    report = reattend.compare(tiny_pipelines.stable_diffusion(), regional, prompt=PROMPT, **CALL)
    found = report.word_maps("sky")["after"]["sky"]
    assert not found[:, :3].any() and found[:, 5:].all()


def test_each_picture_of_each_prompt_has_its_own():
    pipe = tiny_pipelines.stable_diffusion()
    report = compared(pipe, [PROMPT, "sky and sea"], num_images_per_prompt=2)
    assert report.before.shown == [0, 1, 2, 3]
    maps = [report.word_maps("sky", picture=n)["before"]["sky"] for n in range(4)]
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 4
    assert list(report.word_maps(picture=3)["before"]) == ["sky", "sea"]
    with pytest.raises(ReattendError, match="'sea' is not in prompt 0"):
        report.words("sea", picture=1)
    with pytest.raises(ReattendError, match="picture must be 0 to 3, got 4"):
        report.words(picture=4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("wolf", "'wolf' is not in prompt 0"),
        ([], "words must be a word or passage of the prompt"),
        (3, "words must be a word or passage of the prompt"),
        ([" "], "words must be a word or passage of the prompt"),
    ],
)
def test_words_that_are_not_there(words, said):
    pipe = tiny_pipelines.stable_diffusion()
    report = compared(pipe)
    with pytest.raises(ReattendError, match=said):
        report.words(words)
    assert not reattend.hooks.running(pipe)


def test_a_prompt_that_was_encoded_before(text_pipe):  # noqa: F811
    pipe = tiny_pipelines.stable_diffusion()
    encoded = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPT, "cpu", 1, True), strict=True))
    report = reattend.compare(pipe, ("pag", {"scale": 2.0}), **encoded, **CALL)
    with pytest.raises(ReattendError, match="need the prompt as a text"):
        report.words("sky")
    text = reattend.compare(
        text_pipe, ("streaming", {"window": 2, "sinks": 1}), text="the red dog sat on", max_new_tokens=3, progress=False
    )
    with pytest.raises(ReattendError, match="of pictures that a diffusers pipeline has drawn"):
        text.words()


def test_a_report_keeps_no_pipeline_alive():
    pipe = tiny_pipelines.stable_diffusion()
    report = compared(pipe)
    with pytest.raises(ReattendError, match="this report holds none"):
        pickle.loads(pickle.dumps(report)).words()
    del pipe
    gc.collect()
    with pytest.raises(ReattendError, match="the pipeline of this report is gone"):
        report.words()


def test_generators_of_the_user_begin_every_run_where_they_stand():
    """One, or one for each picture: the source of an edit is the same before and after, and its maps are those of the run compared."""
    pipe = tiny_pipelines.stable_diffusion()
    edit = ("prompt-reweight", {"edit": "replace", "stop": 1.0, "self_stop": 1.0})
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    states = [one.get_state() for one in noise]
    report = reattend.compare(pipe, edit, prompt=[PROMPT, "a sad sky"], generator=noise, **CALL)
    before, after = (side.pictures for side in (report.before, report.after))
    assert before[0].tobytes() == after[0].tobytes() and before[1].tobytes() != after[1].tobytes()
    assert all(torch.equal(one.get_state(), state) for one, state in zip(noise, states, strict=True))
    maps = [report.word_maps("sky", picture=n) for n in (0, 1)]
    assert torch.equal(maps[0]["before"]["sky"], maps[0]["after"]["sky"])
    # the edited picture's maps are the source's, where these were taken
    taken, own = ((maps[1][side]["sky"] - maps[0][side]["sky"]).abs().max() for side in ("after", "before"))
    assert taken < 1e-6 < 1e-3 < own
    alone = reattend.compare(
        pipe, ("prompt-reweight", {"words": "sky", "factor": 1.0}), prompt=PROMPT, generator=noise[0], **CALL
    )
    assert alone.metrics["identical"]
