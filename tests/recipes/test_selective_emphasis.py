"""selective-emphasis: golden data of the official code, the layouts of vision encoders against the models' own, and whole models."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import reattend
import tiny_models
import torch
from asked_images import ONE, PROMPTS
from by_hand import attention_by_hand
from golden_files import golden_file
from reattend.hooks.tokens.images import add_images
from reattend.hooks.tokens.patches import lay_out
from reattend.hooks.trackers.caches import cache_of
from reattend.interventions import (
    Call,
    Clock,
    ReattendError,
    ReattendWarning,
    ScoreGain,
    Site,
    TokenGrid,
    TokenMap,
    fused,
    reference,
)
from reattend.interventions.families.visual_tokens import informed_tokens, outliers
from reattend.recipes import recipe

# what is said of prompts in pieces is tested in test_chunked_prompts.py
pytestmark = pytest.mark.filterwarnings("ignore:.*this prompt comes in pieces")


golden = functools.partial(golden_file, "selective-emphasis")


class Read:
    """A reader of the encoder that has these readings of one image."""

    def __init__(self, **readings):
        self.readings = readings

    def per_image(self, call, known):
        return [(grid, self.readings) for grid in call.tokens.grids if grid not in known]


def strengthened(call, start, count, readings, **parameters):
    """What the recipe asks for at a call whose image is the columns from start on."""
    places = torch.arange(call.num_keys)[None]
    grid = TokenGrid.of_image(0, torch.arange(start, start + count)[None])
    call.tokens = TokenMap(
        1, call.num_keys, call.num_keys, {"image": (places >= start) & (places < start + count)}, grids=[grid]
    )
    call.tokens.roles["padding"] = torch.zeros_like(places, dtype=torch.bool)
    call.clock = Clock("prefill" if call.num_queries > 1 else "decode")
    call.site = Site("decoder", 2, "decoder", "self", call.num_heads, call.num_heads, 8, True)
    return recipe("selective-emphasis", **parameters).strengthen(Read(**readings), call)


@pytest.mark.parametrize("name", ["select_basic", "select_no_outlier"])
def test_golden_choice_of_the_official_code(name):
    """The two sets of tokens, as the recipe's own gains on the columns of an image."""
    data, facts = golden(name)
    first, penultimate = (data[f"vit_attn_{layer}"][0, :, 0, 1:].sum(0) for layer in ("first", "penultimate"))
    count, states = len(first), torch.zeros(1, 1, len(first) + 3, 8)
    edit = strengthened(
        Call(states, states, states), 2, count, {"first": first[None], "penultimate": penultimate[None]}, alpha=0.5, beta=0.25,
        local_share=float(facts["local_token_ratio"]), spatial_share=0,
    )  # fmt: skip
    gain = edit.factor.expand(1, 1, count + 3)[0, 0, 2 : 2 + count]
    assert (gain == 0.5).nonzero()[:, 0].tolist() == data["local_tokens"].tolist()
    assert (gain == 0.25).nonzero()[:, 0].tolist() == data["summary_tokens"].tolist()
    assert edit.factor.count_nonzero() == gain.count_nonzero() == len(data["local_tokens"]) + len(data["summary_tokens"])
    assert edit.rows[0].nonzero()[:, 0].tolist() == [count + 2]


@pytest.mark.parametrize("execute", [fused, reference])
@pytest.mark.parametrize("name", ["attn_prefill", "attn_no_summary"])
def test_golden_attention_of_the_official_code(name, execute):
    """Readings that name the golden tokens, through the recipe's own edit, on the last row of a prompt and on a row after it."""
    data, facts = golden(name)
    start, count = int(facts["img_start"]), int(facts["img_end_exclusive"]) - int(facts["img_start"])
    summary = torch.zeros(count).index_fill(0, data["summary_tokens"], 1.0)
    local = torch.zeros(count).index_fill(0, data["local_tokens"], 1.0) + 2 * summary
    # the largest of the first layer that are no outliers of the other one: with so few tokens, as many as both sets have
    share = (len(data["local_tokens"]) + len(data["summary_tokens"]) + 0.5) / count
    settings = {
        "alpha": float(facts["alpha"]),
        "beta": float(facts["beta"]),
        "local_share": min(1.0, share),
        "spatial_share": 0,
    }
    readings = {"first": local[None], "penultimate": summary[None]}
    assert len(data["summary_tokens"]) < count / 4, "else they are no outliers"

    def output(call, edits):
        return execute(call, edits).transpose(1, 2).flatten(2) @ data["o_proj_weight"].T

    def call(rows=slice(None)):
        return Call(data["query_rot"][:, :, rows], data["key_rot"], data["value"], data["attention_mask"][:, :, rows])

    whole = call()
    found = output(whole, [strengthened(whole, start, count, readings, **settings)])
    torch.testing.assert_close(found, data["output_mod"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output(call(), []), data["output_plain"], atol=1e-6, rtol=1e-5)
    assert (data["output_mod"] - data["output_plain"]).abs().max() > 1e-2
    step = call(slice(-1, None))
    step.memory = whole.memory  # a row after the prompt, which has been read
    found = output(step, [strengthened(step, start, count, readings, **settings)])
    torch.testing.assert_close(found, data["output_mod"][:, -1:], atol=1e-6, rtol=1e-5)


def test_hidden_columns_stay_hidden_and_all_selected_scores_grow():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 4) for n in (1, 6, 6))
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., :2] = False
    gain = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.5, 0.0])
    for execute in (fused, reference):
        out = execute(Call(query, key, value, mask), [ScoreGain(factor=gain)])
        scores = (query @ key.transpose(2, 3)) / 2
        wanted = (scores + gain * scores.abs()).masked_fill(~mask, float("-inf")).softmax(-1) @ value
        torch.testing.assert_close(out, wanted)


def test_outliers():
    assert not outliers(torch.full((20,), 0.3)).any()
    values = torch.ones(20)
    values[[4, 9]] = 7.0
    assert outliers(values).nonzero()[:, 0].tolist() == [4, 9]
    local, summary = informed_tokens(values, values, 0.25)
    assert summary.sum() == 2 and local.sum() == 3
    # quartiles 1 and 2: the line is drawn 1.5 of their distance above the upper one, at 3.5, and what lies on it is none
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    for value, out in ((3.3, False), (3.5, False), (3.51, True), (4.0, True)):
        values[8] = value
        assert bool(outliers(values)[8]) is out, value


# -- from patches to tokens ------------------------------------------------------------------------------------------


def grids_of(tiny, prompts=PROMPTS):
    inputs = tiny.inputs(prompts)
    tokens = TokenMap(*inputs["input_ids"].shape, inputs["input_ids"].shape[1])
    add_images(tokens, tiny.model, inputs["input_ids"], inputs)
    return inputs, tokens.grids


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_become_tokens_as_the_model_packs_them(family):
    tiny = tiny_models.build(family)
    inputs, grids = grids_of(tiny)
    counts = [sum(bool(tile.any()) for tile in image) for image in inputs["pixel_values"]]
    values = [torch.rand(n, 16) for n in counts]
    packing = {"image_newline": torch.zeros(1)}
    if family == "llava_next":
        packing["vision_feature_select_strategy"] = "default"
    else:
        packing["vision_aspect_ratio"] = tiny.model.config.vision_aspect_ratio
    packed = tiny.model.model.pack_image_features([v[..., None] for v in values], inputs["image_sizes"], **packing)[0]
    wanted = torch.zeros(inputs["input_ids"].shape)
    wanted[inputs["input_ids"] == tiny_models.IMAGE] = torch.cat([p[:, 0] for p in packed])
    found = lay_out(tiny.model.config, [torch.cat(values)], grids)
    assert len(found) == len(grids) == 6
    for grid, value in zip(grids, found):
        torch.testing.assert_close(value, wanted[grid.row, grid.image])


def test_patches_become_tokens_as_other_models_merge_them():
    grid = [TokenGrid.of_image(0, torch.arange(4).view(2, 2))] * 3
    for family, shuffle in (("internvl", {"scale_factor": 0.5}), ("idefics3", {"scale_factor": 2})):
        tiny, values = tiny_models.build(family), torch.rand(3, 16)
        if family == "internvl":
            merged = tiny.model.model.pixel_shuffle(values.view(3, 4, 4, 1), **shuffle).sum(-1)
        else:
            merged = tiny.model.model.connector.pixel_shuffle(values[..., None], **shuffle).sum(-1).view(3, 2, 2)
        torch.testing.assert_close(torch.stack(lay_out(tiny.model.config, [values], grid)), merged)
    config, values = tiny_models.build("gemma3").model.config, torch.rand(3, 16)
    pooled = 4 * torch.nn.functional.avg_pool2d(values.view(3, 4, 4), 2)
    torch.testing.assert_close(torch.stack(lay_out(config, [values], grid)), pooled)
    mistral = tiny_models.build("mistral3")
    _, grids = grids_of(mistral)
    maps = [torch.rand(2 * r, 2 * c) for r, c in (g.image.shape for g in grids)]
    for value, whole in zip(lay_out(mistral.model.config, [torch.cat([m.flatten() for m in maps])[None]], grids), maps):
        torch.testing.assert_close(value, 4 * torch.nn.functional.avg_pool2d(whole[None], 2)[0])


def test_windows_come_back_in_order():
    """Qwen2.5-VL: values in the order of the encoder's own permutation."""
    from transformers.vision_utils import get_vision_window_index

    tiny = tiny_models.build("qwen2_5_vl")
    inputs, grids = grids_of(tiny)
    vision = tiny.model.config.vision_config
    order = get_vision_window_index(inputs["image_grid_thw"], 2, vision.window_size, vision.patch_size)[0]
    tokens = torch.rand(sum(g.index.numel() for g in grids))
    patches = (tokens / 4)[torch.as_tensor(order)].repeat_interleave(4)
    found = lay_out(tiny.model.config, [patches[:10][None], patches[10:][None]], grids)
    torch.testing.assert_close(torch.cat([v.flatten() for v in found]), tokens)
    assert lay_out(tiny.model.config, [patches[None, :-4]], grids) is None


# -- whole models ----------------------------------------------------------------------------------------------------


def steer(model, **parameters):
    return reattend.apply(model, "selective-emphasis", **{"first_layer": 1, **parameters})


def test_equals_a_naive_implementation():
    """LLaVA: the choice from the encoder's own attention maps, and the change on whole matrices of scores."""
    tiny = tiny_models.llava()
    inputs = tiny.inputs(PROMPTS)
    with steer(tiny.model, alpha=0.9, beta=0.5) as session, torch.no_grad():
        found = tiny.model(**inputs).logits[:, -1]
        assert session.applied == 3
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tiny.model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    received = [maps[i][:, :, 0, 1:].sum(1) for i in (0, -2)]
    images = (inputs["input_ids"] == tiny_models.IMAGE).nonzero().split(16)
    gain = torch.zeros(inputs["input_ids"].shape)
    for n, places in enumerate(images):
        local, summary = informed_tokens(received[0][n], received[1][n], 0.25)
        gain[places[:, 0], places[:, 1]] = 0.9 * local + 0.5 * summary
    assert (gain > 0).sum() >= 9

    def edited(layer, scores, visible):
        if layer >= 1:
            scores[:, :, -1] += gain[:, None] * scores[:, :, -1].abs()
        return scores

    with attention_by_hand(tiny.model, scores=edited), torch.no_grad():
        wanted = tiny.model(**inputs).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_one_strength_on_all_image_tokens_raises_their_scores_alike():
    """alpha = beta and every token chosen: the attention part of PAI."""
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    with steer(tiny.model, alpha=0.4, beta=0.4, local_share=1.0) as session, torch.no_grad():
        cache = cache_of(tiny.model(**inputs))
        gain = session.attachment.tracker.by_cache[cache].memory[session.plans[0].memory_key]["gain"]
    wanted = 0.4 * (inputs["input_ids"] == tiny_models.IMAGE)
    torch.testing.assert_close(gain, wanted)


def test_heads_in_proportion_to_their_image_share():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    seen = {}
    with torch.no_grad():
        tiny.model.set_attn_implementation("eager")
        maps = tiny.model(**inputs, output_attentions=True).attentions[3][0, :, -1]
        tiny.model.set_attn_implementation("sdpa")
        mass = maps[:, (inputs["input_ids"] == tiny_models.IMAGE)[0]].sum(-1)
        base = tiny.model(**inputs).logits
        with steer(tiny.model, by_head=True, first_layer=3) as session:
            recipe = session.plans[0].steps[-1].intervention
            session.plans[0].steps[-1].intervention = lambda call: seen.setdefault("edit", recipe(call))
            by_head = tiny.model(**inputs).logits
            assert session.applied == 1
        with steer(tiny.model, first_layer=3) as session:
            whole = session.plans[0].steps[-1].intervention
            session.plans[0].steps[-1].intervention = lambda call: seen.setdefault("plain", whole(call))
            alike = tiny.model(**inputs).logits
    plain = seen["plain"]
    (edit,) = seen["edit"]
    gain = edit.factor
    torch.testing.assert_close(
        (gain / gain.amax(dim=1, keepdim=True)).nanmean(dim=2)[0], mass / mass.max(), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(gain.amax(dim=1), plain.factor[:, 0])
    assert not torch.equal(by_head, alike) and not torch.equal(by_head, base)


def test_images_read_before_the_session_are_refused():
    tiny = tiny_models.llava()
    inputs = tiny.inputs([ONE])
    with torch.no_grad():
        features = tiny.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    outputs = {"image": SimpleNamespace(pooler_output=features)}
    with (
        pytest.warns(ReattendWarning, match="never acted"),
        steer(tiny.model),
        pytest.raises(ReattendError, match="before the session began"),
        torch.no_grad(),
    ):
        tiny.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], mm_encoder_outputs=outputs)
