"""Encoders of images and texts: their sites, what their tokens are, and edits there, alone and inside vision-language models."""

from __future__ import annotations

import inspect
import threading

import pytest
import reattend
import tiny_encoders
import tiny_models
import torch
from reattend.hooks import Capture, Edits, Observe, Plan, attach, sites
from reattend.interventions import Gain, HeadGain, ReattendError, UnsupportedError
from tiny_encoders import ENCODERS, IDS, features, inputs_of, pixels
from tiny_llama import traces

ONE_ROLE = {
    "clip": ("text_encoder", "vision"),
    "siglip": ("text_encoder", "vision", "vision.pool"),
    "siglip_vision": ("vision", "vision.pool"),
}


def build(name):
    return ENCODERS[name][0]()


def seen_at(model, run, table=None):
    """{site name: the last call there} of run()."""
    table = sites(model).where(lambda site: site.supported) if table is None else table
    calls = {}
    with (
        attach(model, [Plan("look", [Capture(table, lambda call, edits: calls.update({call.site.name: call}))])]),
        torch.no_grad(),
    ):
        run()
    return calls


@pytest.mark.parametrize("name", ENCODERS)
def test_sites_and_tokens(name):
    model, prefix = build(name), ENCODERS[name][1]
    table = sites(model)
    assert {site.stack for site in table} == set(ONE_ROLE.get(name, ("vision",)))
    assert all((s.num_heads, s.num_kv_heads, s.head_dim) == (4, 4, 8) for s in table)
    assert len(table.stack("vision").kind("self")) == 4 and table.stack("vision").kind("self").refusal == ""
    assert all(site.causal == (name == "clip" and site.stack == "text_encoder") for site in table)
    calls = seen_at(model, lambda: features(model))
    for site in table.stack("vision").kind("self"):
        call, length = calls[site.name], len(prefix) + 16
        assert call.clock.phase == "encode" and call.tokens.length == call.num_keys == length and call.query_tokens is None
        for role in ("cls", "distillation", "register"):
            marked = torch.tensor([own == role for own in prefix] + [False] * 16)
            assert torch.equal(call.columns(role)[1], marked) if role in prefix else role not in call.tokens
        assert torch.equal(call.columns("patch"), call.query_rows("patch")) and int(call.columns("patch").sum()) == 32
        assert [grid.row for grid in call.tokens.grids] == [0, 1] and call.tokens.grids[1].shape == (1, 4, 4)


@pytest.mark.parametrize("name", ["vit", "deit", "siglip_vision", "dinov2_registers", "clip"])
def test_the_grid_is_where_the_patches_are(name):
    """A change of one patch's pixels changes that patch's token alone."""
    model = build(name)
    table, kept = sites(model).stack("vision").kind("self"), []
    inputs = inputs_of(model)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1, :, 6:12, 18:24] = 3.0
    with attach(model, [Plan("look", [Observe(table[:1], kept.append)])]):
        for given in (inputs, other):
            features(model, given)
    changed = (kept[0].hidden != kept[1].hidden).any(dim=-1)
    wanted = torch.zeros_like(changed)
    wanted[1, kept[0].tokens.grids[1].image[1, 3]] = True
    assert torch.equal(changed, wanted)


def test_pictures_that_are_not_square():
    model = build("vit")
    wide = {"pixel_values": pixels(2, 24, 48), "interpolate_pos_encoding": True}
    calls = seen_at(model, lambda: features(model, wide))
    assert all(call.tokens.grids[0].shape == (1, 4, 8) for call in calls.values())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts(name):
    model = build(name)
    table = sites(model).stack("text_encoder")
    for run in (lambda: features(model), lambda: model.get_text_features(input_ids=IDS)):
        calls = seen_at(model, run, table)
        tokens = calls[table[0].name].tokens
        assert tokens.roles["eos"].nonzero().tolist() == [[0, 5], [1, 3]] and tokens.roles["padding"].nonzero().tolist() == [
            [1, 4],
            [1, 5],
        ]
        assert tokens.roles["bos"].nonzero().tolist() == [[0, 0], [1, 0]] and calls[table[0].name].clock.phase == "encode"
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
    calls = seen_at(model, lambda: model.get_text_features(input_ids=IDS, attention_mask=mask), table)
    assert calls[table[0].name].tokens.roles["padding"].nonzero().tolist() == [[1, 5]], "a mask says more than the end"


def test_a_text_half_alone_and_one_whose_end_is_not_known():
    model = tiny_encoders.clip_text()
    calls = seen_at(model, lambda: model(input_ids=IDS))
    assert len(calls) == 4 and all(call.columns("eos").sum() == 2 for call in calls.values())
    model.config.eos_token_id = 77
    calls = seen_at(model, lambda: model(input_ids=IDS))
    with pytest.raises(ReattendError, match="no 'eos' tokens"):
        calls[sites(model)[0].name].columns("eos")


# -- SAM -----------------------------------------------------------------------------------------------------------------


def test_sam_in_windows_and_its_mask_decoder():
    model = tiny_encoders.sam()
    table = sites(model)
    assert {s.stack for s in table} == {"vision", "mask_decoder"} and table.refusal == ""
    assert [(s.kind, s.head_dim) for s in table.stack("mask_decoder")] == [
        *[("self", 8), ("cross", 4), ("cross", 4)] * 2,
        ("cross", 4),
    ]
    calls = seen_at(model, lambda: features(model))
    windows, whole = (calls[site.name] for site in table.stack("vision")[:2])
    # 8 x 8 patches of two pictures in windows of 3 x 3: the last window of a row has two columns, the last row two rows
    assert windows.batch == 18 and [g.shape[1:] for g in windows.tokens.grids[:9]] == [
        (3, 3), (3, 3), (3, 2), (3, 3), (3, 3), (3, 2), (2, 3), (2, 3), (2, 2),
    ]  # fmt: skip
    assert torch.equal(windows.columns("padding"), ~windows.columns("patch")) and int(windows.columns("patch").sum()) == 128
    assert whole.batch == 2 and [g.shape for g in whole.tokens.grids] == [(1, 8, 8)] * 2
    own, to_image, to_tokens = (calls[site.name] for site in table.stack("mask_decoder")[:3])
    for call in (own, to_tokens):  # two points of two pictures: a batch of four
        assert [int(call.columns(role)[3].sum()) for role in ("iou", "mask", "point")] == [1, 4, 2]
    assert int(to_image.columns("patch").sum()) == 4 * 64 and to_image.tokens.grids[3].shape == (1, 8, 8)
    assert torch.equal(to_image.query_rows("iou"), own.columns("iou"))
    assert torch.equal(to_tokens.query_rows("patch"), torch.ones(4, 64, dtype=torch.bool))


def test_what_windows_hold_is_what_the_grid_says():
    """What is padding in a window is zero before the projection, whatever the picture."""
    model, kept = tiny_encoders.sam(), {}
    first = sites(model).stack("vision")[:1]
    module = first.module(first[0])
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: kept.update(hidden=kwargs["hidden_states"]), with_kwargs=True
    )
    calls = seen_at(model, lambda: features(model), first)
    handle.remove()
    assert torch.equal((kept["hidden"] == 0).all(dim=-1).flatten(1), calls[first[0].name].columns("padding"))


# -- edits there ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODERS, "sam"])
def test_edits_act_and_leave_nothing(name):
    model = tiny_encoders.sam() if name == "sam" else build(name)
    table = sites(model).stack("vision").kind("self")
    base, before = features(model), traces(model)

    def first_row(call):
        return Gain(columns=call.columns("patch") & (call.columns("patch").cumsum(dim=1) <= 3), factor=9.0)

    with reattend.edit(model, first_row, sites=table[1:2]) as session:
        got = features(model)
    assert session.applied == 1 and (got - base).abs().max() > 1e-5
    assert traces(model) == before and torch.equal(features(model), base)
    with reattend.edit(model, first_row, sites=table[1:2]):
        single = {key: value[1:] for key, value in inputs_of(model).items()}
        alone = features(model, single)
    if name not in ("clip", "siglip"):  # those compare with all texts
        torch.testing.assert_close(alone[0], got[1], atol=1e-5, rtol=1e-4)


def test_a_site_that_nobody_selected_refuses_nothing():
    model = build("siglip_vision")
    table = sites(model)
    assert [s.name for s in table.problems] == ["head.attention"]
    with reattend.edit(model, HeadGain(heads=[0], factor=0.0)) as session:
        features(model)
    assert session.applied == 4
    with pytest.raises(UnsupportedError, match="head.attention cannot be intercepted"):
        attach(model, [Plan("x", [Edits(table.stack("vision.pool"), lambda call: HeadGain(factor=0.5))])])


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Stopped])
@pytest.mark.parametrize("name", ["vit", "clip", "llava"])
def test_after_an_error_within_an_encoder(name, error):
    """Whether it is an exception or an interrupt, which runs no hook: the next pass knows its own tokens, and nothing is left."""
    tiny = tiny_models.build("llava") if name == "llava" else None
    model = build(name) if tiny is None else tiny.model
    given = inputs_of(model) if tiny is None else {"pixel_values": pixels()}
    run = model if name == "vit" else model.get_image_features
    given = {"pixel_values": given["pixel_values"]}
    run(**given)  # transformers puts hooks of its own on, once
    before, calls = traces(model), []
    table = sites(model).stack("vision").kind("self")

    def fails(*_):
        raise error("stop")

    session = attach(model, [Plan("look", [Capture(table, lambda call, edits: calls.append(call.tokens.batch))])])
    broken = table.module(table[1]).register_forward_pre_hook(fails)
    with pytest.raises(error):
        run(**given)
    broken.remove()
    run(pixel_values=given["pixel_values"][:1])
    assert calls == [2, *[1] * len(table)]
    session.remove()
    assert traces(model) == before


def test_encoders_in_several_threads():
    model, found = build("clip"), {}
    table = sites(model).stack("vision").kind("self")
    gate = threading.Barrier(3)

    def read(call, edits):
        gate.wait(20)
        found.setdefault(threading.get_ident(), set()).add((call.tokens.batch, call.batch))

    def run(batch):
        with torch.no_grad():
            model.get_image_features(pixel_values=pixels(batch))

    with attach(model, [Plan("look", [Capture(table, read)])]):
        threads = [threading.Thread(target=run, args=(batch,)) for batch in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found.values(), key=min) == [{(1, 1)}, {(2, 2)}, {(3, 3)}]


# -- inside vision-language models ---------------------------------------------------------------------------------------

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, 9, "image", 10, 11, 12, "image", 13]]


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "paligemma"])
def test_towers_know_their_tokens_and_decoders_theirs(family):
    tiny = tiny_models.build(family)
    model, inputs = tiny.model, tiny.inputs(PROMPTS)
    table = sites(model)
    vision, decoder = table.stack("vision").kind("self"), table.stack("decoder").kind("self")
    class_tokens = int("llava" in family)
    for run in (lambda: model(**inputs), lambda: model.generate(**dict(inputs), max_new_tokens=1, do_sample=False)):
        calls = seen_at(model, run, vision + decoder)
        call = calls[vision[0].name]
        assert call.tokens.batch == call.batch and call.tokens.grids[0].shape == (1, 4, 4)
        assert ("cls" in call.tokens) == bool(class_tokens) and int(call.columns("patch")[0].sum()) == 16
        assert "image" in calls[decoder[0].name].tokens and "patch" not in calls[decoder[0].name].tokens


def test_one_pass_of_a_tower_has_one_memory():
    """Also before the model's own pass, where generate runs it; the next pass has another."""
    tiny = tiny_models.build("llava")
    model, found = tiny.model, []

    def count(call):
        call.memory["calls"] = call.memory.get("calls", 0) + 1
        found.append(call.memory["calls"])

    with reattend.edit(model, count, sites=sites(model).stack("vision").kind("self")):
        for _ in range(2):
            model.get_image_features(pixel_values=pixels())
    assert found == [1, 2, 1, 2]


@pytest.mark.parametrize("family", ["qwen2_vl", "pixtral", "internvl"])
def test_what_is_not_known_of_a_tower_is_said(family):
    tiny = tiny_models.build(family)
    model, inputs = tiny.model, tiny.inputs(PROMPTS)
    vision = sites(model).stack("vision").kind("self")
    if family == "internvl":
        assert "cls" in seen_at(model, lambda: model(**inputs), vision)[vision[0].name].tokens
        return
    with reattend.edit(model, HeadGain(heads=[0], factor=0.5), sites=vision) as session:
        model(**inputs)
    assert session.applied > 0
    with (
        pytest.raises(ReattendError, match="not known what the tokens of this vision stack are"),
        reattend.edit(model, lambda call: Gain(columns=call.columns("patch"), factor=2.0), sites=vision),
    ):
        model(**inputs)


def test_an_encoder_that_generate_runs_beforehand_has_an_end_of_its_own():
    tiny, met = tiny_models.build("llava"), []
    table, inputs = sites(tiny.model).stack("vision"), tiny.inputs([[1, "image", 5]])
    look = Capture(table, at_end=lambda kept, output: met.append((len(kept), type(output).__name__)))
    with attach(tiny.model, [Plan("look", [look])]):
        tiny.model(**inputs)
        tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    beforehand = "mm_encoder_outputs" in inspect.signature(type(tiny.model).forward).parameters
    of_model = (len(table), "LlavaCausalLMOutputWithPast")
    assert met == [of_model, (len(table), "BaseModelOutputWithPooling") if beforehand else of_model]
