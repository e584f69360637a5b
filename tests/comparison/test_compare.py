"""compare on tiny models of every kind: the numbers it reports are those of two runs by hand."""

from __future__ import annotations

import json
import math
import re

import diffusers
import pytest
import reattend
import tiny_pipelines
import torch
from PIL import Image
from reattend.comparison import Report
from reattend.comparison.facts import model_name
from reattend.comparison.text import first_difference, kl_divergence, shared_kl
from tilt import Tilt

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
WINDOW = ("streaming", {"sinks": 1, "window": 3})


def run(pipe, ids, **kwargs):
    return pipe.model.generate(ids, output_logits=True, return_dict_in_generate=True, do_sample=False, **kwargs)


def test_text_equals_two_runs_by_hand(text_pipe, tokenizer):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=8, do_sample=False)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = run(text_pipe, ids, max_new_tokens=8)
    with reattend.apply(text_pipe, WINDOW) as session:
        steered = run(text_pipe, ids, max_new_tokens=8)
    a, b = plain.sequences[0, ids.shape[1] :].tolist(), steered.sequences[0, ids.shape[1] :].tolist()
    assert report.outputs == {
        "before": tokenizer.decode(a, skip_special_tokens=True),
        "after": tokenizer.decode(b, skip_special_tokens=True),
    }
    place = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
    assert report.first_difference == report.metrics["first_difference_token"] == place
    p, q = plain.logits[place][0].double().log_softmax(-1), steered.logits[place][0].double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    assert len(report.kl) == place + 1 and report.kl[place] == pytest.approx(expected, rel=1e-9) and expected > 0
    assert report.stats == session.stats and report.applied == 16
    assert "".join(report.before.tokens).split() == tokenizer.decode(a).split()


def test_attention_moves_as_the_recipe_says(text_pipe):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=4, do_sample=False)
    for side in (report.before, report.after):
        assert sum(side.mass.values()) == pytest.approx(1, abs=1e-5)
        assert set(side.mass_by_layer) == {0, 1}
    # the window of 3 holds at most 3 prompt tokens, the sink stays: the first token's share must grow
    assert report.after.mass["bos"] > report.before.mass["bos"]
    assert report.after.mass["prompt"] < report.before.mass["prompt"]
    assert report.before.cost.seconds > 0 and report.before.cost.steps == 4
    # the prompt in one pass, and each further token in one of its own
    costs = [(side.cost.passes, side.cost.tokens, side.cost.samples) for side in (report.before, report.after)]
    assert costs == [(4, 16 + 3, 4)] * 2


def test_a_recipe_that_does_nothing_is_said_to_do_nothing(text_pipe):
    with pytest.raises(reattend.ReattendWarning, match="never acted"):
        reattend.compare(text_pipe, "streaming", text=PROMPT, max_new_tokens=4, do_sample=False)
    with pytest.warns(reattend.ReattendWarning, match="never acted"):
        report = reattend.compare(text_pipe, "streaming", text=PROMPT, max_new_tokens=4, do_sample=False)
    assert report.metrics["identical"] and report.first_difference is None and report.kl == [0.0] * 4
    assert "never acted" in report.notes[0]


def test_no_folder_of_the_machine_in_a_report(text_pipe, tmp_path):
    folder = tmp_path / "my-model"
    text_pipe.model.config._name_or_path = str(folder)
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=2, do_sample=False)
    assert report.title == "streaming on my-model" and report.model["name"] == "my-model"
    assert str(tmp_path) not in report.json() and str(tmp_path) not in report._repr_html_()
    snapshot = "/home/me/.cache/huggingface/hub/models--owner--name/snapshots/12ab"
    names = [
        "owner/name",
        "gpt2",
        "SmolLM2-135M-Instruct",
        "",
        "./here/there",
        "a/b/c",
        "C:\\models\\mine",
        snapshot,
        str(tmp_path) + "/",
    ]
    expected = ["owner/name", "gpt2", "SmolLM2-135M-Instruct", "", "there", "c", "mine", "owner/name", tmp_path.name]
    assert [model_name(name) for name in names] == expected
    assert (
        model_name("/models/shapes-sd/unet", ("unet", "vae")) == "shapes-sd" and model_name("me/unet", ("unet",)) == "me/unet"
    )


def test_sampling_is_seeded(text_pipe):
    options = dict(text=PROMPT, max_new_tokens=6, do_sample=True, temperature=2.0)
    first, second = (reattend.compare(text_pipe, WINDOW, seed=3, **options) for _ in range(2))
    assert first.outputs == second.outputs and first.kl == second.kl
    assert reattend.compare(text_pipe, WINDOW, seed=4, **options).outputs != first.outputs
    tilt = reattend.compare(text_pipe, Tilt(strength=0.0), text=PROMPT, max_new_tokens=6, do_sample=True)
    assert tilt.metrics["identical"], "the same seed must give the same text where attention is unchanged"


def test_beams_are_compared_without_kl(text_pipe):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=4, num_beams=2, do_sample=False)
    assert report.kl == [] and "beam search" in report.notes[0]
    json.loads(report.json())


def test_bare_models_take_tensors_or_text(llama, tokenizer, text_pipe):
    by_pipe = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=5, do_sample=False)
    by_text = reattend.compare(llama, WINDOW, text=PROMPT, tokenizer=tokenizer, max_new_tokens=5, do_sample=False)
    assert by_text.outputs == by_pipe.outputs and by_text.kl == by_pipe.kl
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    by_ids = reattend.wrap(llama).compare(WINDOW, inputs={"input_ids": ids}, max_new_tokens=5, do_sample=False)
    assert by_ids.kl == by_pipe.kl
    assert [tokenizer.decode([int(i)]) for i in by_ids.before.tokens] == [t.strip() for t in by_pipe.before.tokens]
    assert by_ids.first_difference == by_pipe.first_difference


def test_recipe_parameters_and_generation_options_are_told_apart(text_pipe):
    wrapped = reattend.wrap(text_pipe)
    report = wrapped.compare("streaming", sinks=1, window=3, text=PROMPT, max_new_tokens=4, do_sample=False)
    assert report.recipes[0]["parameters"] == {"sinks": 1, "window": 3, "last_rows": 0, "start_layer": 0}
    assert report.recipes[0]["chosen"] == ["sinks", "window"]
    assert len(report.before.tokens) == 4


def test_chat_messages_need_a_template(text_pipe):
    with pytest.raises(reattend.ReattendError, match="no chat template"):
        reattend.compare(text_pipe, WINDOW, text=[{"role": "user", "content": "the dog"}])


def test_fill_mask(fill_pipe):
    text = "the red <mask> sat on a house"
    report = reattend.compare(fill_pipe, Tilt(), text=text)
    inputs = fill_pipe.preprocess(text)
    with torch.no_grad():
        logits = fill_pipe.model(**inputs).logits[0, 2]
    top = logits.softmax(-1).topk(5)
    assert [p for _, p in report.outputs["before"]] == pytest.approx(top.values.tolist(), abs=1e-6)
    assert [w for w, _ in report.outputs["before"]] == [fill_pipe.tokenizer.decode([i]) for i in top.indices.tolist()]
    assert report.metrics["kl"] > 0 and 0 < report.metrics["total_variation"] < 1
    assert report.applied == 2
    same = reattend.compare(fill_pipe, Tilt(strength=0.0), text=text)
    assert same.metrics["kl"] == pytest.approx(0, abs=1e-9) and same.metrics["same_top_prediction"]


def test_image_classification(class_pipe):
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    report = reattend.wrap(class_pipe).compare(Tilt(), image=picture)
    assert len(report.outputs["before"]) == 5 and report.outputs["before"][0][0].startswith("LABEL_")
    assert report.metrics["kl"] > 0 and report.applied == 2
    assert report.before.entropy is not None
    assert report.inputs == [picture]


def test_image_and_text(look_pipe):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    options = dict(max_new_tokens=5, do_sample=False)
    report = reattend.wrap(look_pipe).compare(WINDOW, image=picture, text="the red dog is on", **options)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "the red dog is on"}]}
    ]
    by_hand = look_pipe(text=messages, return_full_text=False, **options)[0]["generated_text"]
    assert report.outputs["before"].strip() == by_hand.strip()
    assert not report.metrics["identical"] and report.applied == 10
    assert report.request["prompt"].count("<image>") == 4 and report.inputs == [picture]
    assert report.before.mass["image"] > report.after.mass["image"], "the picture leaves the window"
    again = reattend.compare(look_pipe, WINDOW, text=messages, **options)
    assert again.outputs == report.outputs and again.inputs == [picture]


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.8, 1.0])
def test_image_to_image_that_does_a_part_of_its_steps(strength):
    """The runs that warm up and look at attention do the one step, or two, that they are for."""
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(tiny_pipelines.stable_diffusion())
    pipe.set_progress_bar_config(disable=True)
    counts = []
    hook = pipe.unet.register_forward_hook(lambda *_: counts.append(1))
    call = {"image": Image.new("RGB", (16, 16), (90, 20, 200)), "strength": strength, "num_inference_steps": 40}
    report = reattend.compare(pipe, "pag", prompt="a dog", attention=False, **call)
    hook.remove()
    done = int(40 * strength)
    assert report.before.cost.passes == report.after.cost.passes == done and len(counts) == 2 * (done + 1)
    assert reattend.compare(pipe, "pag", prompt="a dog", **call).metrics == report.metrics


def test_pictures_in_a_recipe_do_not_fill_the_report(capsys, tmp_path):
    scene = Image.fromarray(torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy())
    report = reattend.compare(
        tiny_pipelines.stable_diffusion(), ("attencraft", {"words": ["a"], "image": scene}), prompt="a", num_inference_steps=2
    )  # fmt: skip
    report.print()
    report.html(tmp_path / "report.html")
    for text in (capsys.readouterr().out, re.sub("<[^>]*>", "", (tmp_path / "report.html").read_text())):
        assert "picture " in text and "base64" not in text


def test_diffusion(image_pipe):
    options = dict(prompt="the red dog", num_inference_steps=3, height=8, width=8, guidance_scale=2.0)
    report = reattend.wrap(image_pipe).compare(Tilt(), seed=5, **options)
    by_hand = image_pipe(**options, generator=torch.Generator().manual_seed(5)).images[0]
    assert report.outputs["before"][0].tobytes() == by_hand.tobytes()
    assert not report.metrics["identical"] and report.metrics["ssim"] < 1 and report.metrics["psnr"] > 0
    assert report.applied > 0 and len(report.difference) == 1
    assert report.before.cost.steps == 3
    with pytest.raises(reattend.ReattendError, match="takes no 'max_new_tokens'"):
        reattend.compare(image_pipe, Tilt(), prompt="dog", max_new_tokens=3)


def test_the_model_is_untouched_afterwards(text_pipe):
    ids = torch.arange(5, 25)[None]
    before, keys = text_pipe.model(ids).logits, set(text_pipe.__dict__) | set(text_pipe.model.__dict__)
    reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=3)
    assert torch.equal(before, text_pipe.model(ids).logits)
    assert keys == set(text_pipe.__dict__) | set(text_pipe.model.__dict__)
    assert not text_pipe.model._forward_hooks and text_pipe.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "text= is missing"),
        ({"text": "a", "prompt": "b"}, "both name the input"),
        ({"text": 5}, "must be a string"),
        ({"text": "a dog", "window": 0}, "window"),
        ({"text": "a dog", "image": "cat.png"}, "no image at 'cat.png'"),
        ({"text": "a dog", "image": __file__}, "image: .* cannot be read as a picture"),
        ({"text": "a dog", "image": 3}, "image must be a picture or the path of one, got 3"),
        ({"text": "a dog", "image": Image.new("RGB", (4, 4))}, "takes no picture"),
        ({"text": "a dog", "seed": [1]}, r"seed must be a whole number, got \[1\]"),
        ({"text": "a dog", "seed": 10**30}, "seed must be a whole number"),
        ({"text": "a dog", "title": 3}, "title must be a text"),
        ({"text": "a dog", "attention": "no"}, "attention must be True or False"),
        ({"text": "a dog", "tokenizer": 3}, "tokenizer must be the model's tokenizer"),
        ({"text": "\ud800"}, "half of a letter"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(text_pipe, options, message, monkeypatch):
    monkeypatch.setattr(text_pipe.model, "generate", None)
    with pytest.raises(reattend.ReattendError, match=message):
        reattend.compare(text_pipe, "streaming", **options)


def test_bad_models_and_recipes(text_pipe, fill_pipe, llama):
    with pytest.raises(reattend.ReattendError, match="did you mean 'streaming'"):
        reattend.compare(text_pipe, "streeming", text="a dog")
    with pytest.raises(reattend.UnsupportedError, match="causal decoder"):
        reattend.compare(fill_pipe, "streaming", text="a <mask>")
    with pytest.raises(reattend.ReattendError, match="tokenizer="):
        reattend.compare(llama, "streaming", text="a dog")
    with pytest.raises(reattend.ReattendError, match="batch of 2"):
        reattend.compare(llama, "streaming", inputs=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(reattend.ReattendError, match="expected a transformers model"):
        reattend.compare(object(), "streaming", text="a dog")


def test_first_difference_and_kl():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    masked = torch.tensor([0.0, float("-inf")])
    assert kl_divergence(masked, masked) == 0
    assert len(shared_kl([p] * 4, [q] * 6, None)) == 4 and len(shared_kl([p] * 4, [q] * 6, 2)) == 3


def test_report_is_what_compare_returns(text_pipe):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=3, attention=False, title="A title")
    assert isinstance(report, Report) and report.title == "A title"
    assert report.before.mass == {} and report.before.entropy is None


def test_an_empty_prompt_is_refused(text_pipe):
    with pytest.raises(reattend.ReattendError, match="the prompt is empty"):
        reattend.compare(text_pipe, "streaming", text="  ")
