"""What every method for images owes to models and prompts where images are not where it expects them."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from asked_images import ASSISTANT, HOW, NONE, ONE, USER, WHAT, turn
from matrix_models import GREEDY, Case, cases, differs
from reattend.hooks import sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError, ReattendWarning, UnsupportedError
from reattend.recipes import recipe, recipe_class
from tiny_language import language_model

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore:var. no first token is a sink")]


def parametrize(condition: str, *models: str):
    return pytest.mark.parametrize(("name", "model", "kind"), cases(condition, lvlm=models))


@parametrize("mllama", "llava")
def test_images_in_cross_attention(name, model, kind):
    """Mllama's rows of text hold no image weights, and a row of cross-attention holds nothing else: the method acts there or says so."""
    case, tiny = Case(name, model, kind), tiny_models.mllama()
    case.model = tiny.model
    said = case.example.refusal("mllama")
    if said:
        with pytest.raises(UnsupportedError, match=said):
            case.apply([0])
        return
    if case.example.profile is not None:
        pytest.skip("its profile is that of another model")
    inputs = tiny.inputs([[1, USER, "image", *WHAT, ASSISTANT]])
    inputs["cross_attention_mask"] = torch.ones(*inputs["input_ids"].shape, 1, 1, dtype=torch.long)
    base = tiny.model.generate(**inputs, **GREEDY, max_new_tokens=3)
    with case.apply([0]) as session:
        got = tiny.model.generate(**inputs, **GREEDY, max_new_tokens=3)
    (counts,) = session.stats.values()
    assert max(counts.values()) == max(case.counts)
    assert (got.logits[0] - base.logits[0]).abs().max() > 1e-4


@parametrize("text alone", "llava")
def test_text_alone(name, model, kind):
    """No image anywhere: not a bit changes, and the session says that it never acted."""
    case = Case(name, model, kind)
    if case.example.text_too:
        pytest.skip(f"{name} changes text too")
    text = tiny_models.build("llava").inputs([NONE, NONE[:6]])
    with torch.no_grad():
        base = case.model(**text).logits
        session = case.apply()
        got = case.model(**text).logits
    if name == "opera":  # it acts on any answer, and its penalty is 0 where nothing was written yet
        assert differs(got[:, -1], base[:, -1]).max() == 0
        session.remove()
        return
    assert torch.equal(got, base)
    with pytest.warns(ReattendWarning, match="never acted"):
        session.remove()


@parametrize("embeddings", "llava")
def test_embeddings_are_refused_before_any_layer_runs(name, model, kind):
    case, ran = Case(name, model, kind), []
    handle = case.model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(ReattendError, match="input_ids"), case.apply([0]):
            case.model(inputs_embeds=torch.randn(1, 5, 32))
    finally:
        handle.remove()
    assert not ran


@parametrize("idefics2", "llava")
def test_resampled_images_have_no_places(name, model, kind):
    """Idefics 2 hands latents to its decoder: no places of the image. Who looks at heads or at text alone does not mind."""
    import transformers

    case = Case(name, model, kind)
    if case.example.profile is not None:
        pytest.skip("its profile is that of another model")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
    latents = {"n_latents": 4, "depth": 1, "n_heads": 2, "head_dim": 8}
    config = transformers.Idefics2Config(
        text_config={**tiny_models.TEXT, "model_type": "mistral"},
        vision_config={**vision, "patch_size": 6},
        perceiver_config={**{f"resampler_{k}": n for k, n in latents.items()}, "num_key_value_heads": 1},
        image_token_id=tiny_models.IMAGE,
    )
    with torch.device("meta"):
        resampled = transformers.Idefics2ForConditionalGeneration(config)
    slug, given = case.choice()
    support, said = recipe(slug, **given).supports(sites(resampled)), case.example.refusal("idefics2")
    assert said in support.reason if said else support.ok


@parametrize("windows", "gemma3")
def test_the_window_leaves_the_image(name, model, kind):
    """Gemma 3: where a sliding layer no longer holds an image token nothing is changed and nothing is counted."""
    case = Case(name, model, kind)
    if "image" not in recipe_class(case.slug).weighs:
        pytest.skip(f"{name} does not weigh image tokens")
    inputs = tiny_models.build("gemma3").inputs([[1, USER, "image", *WHAT, *range(20, 35), ASSISTANT]])
    with case.apply() as session:
        case.model.generate(**inputs, **GREEDY, max_new_tokens=3)
    (counts,) = session.stats.values()
    for place, count in counts.items():  # the prompt's own pass holds all keys at every layer; layers 0 and 2 slide
        assert count == (1 if place.endswith(("layers.0.self_attn", "layers.2.self_attn")) else 3)


@parametrize("no images", "llava")
def test_models_that_take_no_images(name, model, kind):
    case = Case(name, model, kind)
    if case.example.text_too and case.slug != "opera":
        pytest.skip(f"{name} changes text too")
    case.model = language_model()
    with pytest.raises(UnsupportedError, match="takes none|no image_token_id"):
        case.apply([0])


@parametrize("last row", "llava")
def test_only_the_last_row_of_a_prompt_changes(name, model, kind):
    """Methods that change the row from which the answer is read leave all others bit for bit."""
    case = Case(name, model, kind)
    if case.slug not in ("gift", "pai", "selective-emphasis"):
        pytest.skip(f"{name} changes rows inside a prompt")
    base, real = case.logits(), case.inputs()["attention_mask"].bool()
    real[:, -1] = False
    with case.apply():
        got = case.logits()
    assert torch.equal(got[real], base[real])
    assert torch.equal(got[2], base[2]) or case.slug == "selective-emphasis", "no image: only this one adds nothing instead"
    assert differs(got[:2, -1], base[:2, -1]).min() > 1e-5


# where each of them may act so that the keys of the first turn are those of a pass over both
TURNS = {
    "gift": {"enhance_layers": [3]},
    "pai": {"first_layer": 3, "gamma": 1.0},
    "var": {"first_layer": 3},
    "cmai": {},
    "selective-emphasis": {"first_layer": 3},
    "visual-token-exit": {},
}


@parametrize("turns", "llava")
@pytest.mark.filterwarnings("ignore:.*this prompt comes in pieces")
def test_the_next_turn_brings_an_image_and_a_question(name, model, kind):
    """Two turns on one cache equal one pass over both."""
    case = Case(name, model, kind)
    if case.slug not in TURNS:
        pytest.skip(f"{name} reads a prompt once, or text alone")
    tiny = tiny_models.build("llava")
    whole, first = tiny.inputs([[*ONE, 30, *turn("image", *HOW)]]), tiny.inputs([ONE])
    later = {"attention_mask": whole["attention_mask"], "pixel_values": whole["pixel_values"][1:]}
    with torch.no_grad():
        base = case.model(**whole).logits[:, -1]
        with case.apply([0], **TURNS[case.slug]) as session:
            expected = case.model(**whole).logits[:, -1]
            layers = session.applied
            later[cache_name(case.model)] = cache_of(case.model(**first))
            got = case.model(input_ids=whole["input_ids"][:, first["input_ids"].shape[1] :], **later).logits[:, -1]
            assert session.applied == 3 * layers
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 1e-4


@parametrize("videos", "qwen2_5_vl")
def test_videos_are_images(name, model, kind):
    case, frames, rows, cols = Case(name, model, kind), 2, 2, 3
    if case.example.text_too:
        pytest.skip(f"{name} changes text too")
    ids = torch.tensor([[1, USER, 12, 94, *[tiny_models.VIDEO] * (frames * rows * cols), 95, *WHAT, ASSISTANT]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(frames * 4 * rows * cols, 96, generator=torch.Generator().manual_seed(5)),
        "video_grid_thw": torch.tensor([[frames, 2 * rows, 2 * cols]]),
        "mm_token_type_ids": (ids == tiny_models.VIDEO).int() * 2,
    }

    def logits():
        return torch.stack(case.model.generate(**dict(inputs), **GREEDY, max_new_tokens=3).logits, dim=1)

    if case.refused("videos", logits):
        return
    base = logits()
    with case.apply([0]) as session:
        assert differs(logits(), base).max() > 1e-4 and session.applied
    assert torch.equal(logits(), base)
