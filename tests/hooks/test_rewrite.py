"""The rewrite door: what a look reads, what the changed request gives, and that no request passes by unchanged in silence."""

from __future__ import annotations

import threading

import pytest
import tiny_denoisers
import torch
from reattend.hooks import Capture, Edits, Plan, Rewrite, attach, sites
from reattend.interventions import HeadGain, ReattendError, UnsupportedError
from tiny_language import language_model
from tiny_models import build
from transformers import BartConfig, BartForConditionalGeneration

IDS = torch.tensor([[0, 0, 1, 5, 9, 33, 7], [1, 8, 4, 21, 6, 17, 90]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
GREEDY = dict(max_new_tokens=3, do_sample=False)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return language_model()


def longer(request):
    """Two tokens more at the end."""
    more = torch.full((len(request.arguments["input_ids"]), 2), 11)
    ids = torch.cat([request.arguments["input_ids"], more], dim=1)
    mask = torch.cat([request.arguments["attention_mask"], torch.ones_like(more)], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def norm(call, edits):
    call.memory["norm"] = call.query.flatten(1).norm(dim=1)


def test_generates_from_the_changed_request(model):
    wanted = {"input_ids": torch.cat([IDS, torch.full((2, 2), 11)], dim=1)}
    wanted["attention_mask"] = (wanted["input_ids"] != 0).long()
    for options in ({}, {"num_beams": 2}, {"do_sample": False, "num_return_sequences": 2, "num_beams": 2}):
        with attach(model, [Plan("longer", [Rewrite(longer)])]) as session:
            inputs = session.rewrite(INPUTS)
            found = model.generate(**inputs, **{**GREEDY, **options})
        assert session.stats == {"longer": {"requests": 1}} and torch.equal(inputs["input_ids"], wanted["input_ids"])
        assert torch.equal(found, model.generate(**wanted, **{**GREEDY, **options}))
    assert torch.equal(INPUTS["input_ids"], IDS)  # the caller's own are as they were


def test_a_look_reads_the_plain_model_and_tells_the_real_pass(model):
    plain, met, layers = {}, [], []
    first = sites(model)[:1]
    with attach(model, [Plan("look", [Capture(first, lambda call, _: plain.update(norm=call.query.flatten(1).norm(dim=1)))])]):
        model(**INPUTS)

    def change(request):
        assert request.tokens.positions("padding", 0, 7).tolist() == (IDS == 0).tolist()
        request.memory.update(request.look())
        other = request.look({"input_ids": IDS[:, 3:]})
        assert not torch.equal(other["norm"], request.memory["norm"])
        return longer(request)

    def edit(call):
        met.append(call.memory["norm"])
        return HeadGain(factor=0.5)

    plan = Plan("told", [Rewrite(change, look=[Capture(first, norm)]), Edits(first, edit)])
    other = Plan("other", [Edits(sites(model), lambda call: HeadGain(factor=3.0))])
    handles = [layer.register_forward_pre_hook(lambda *_, n=n: layers.append(n)) for n, layer in enumerate(model.model.layers)]
    with attach(model, [other]), attach(model, [plan]) as session:
        inputs = session.rewrite(INPUTS)
        assert layers == [0, 0]  # two looks, which stop after what they read
        model(**inputs)
    [handle.remove() for handle in handles]
    assert session.forwards == 1 and len(met) == 1 and torch.equal(met[0], plain["norm"])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_image_is_added(family):
    tiny = build(family)
    one, two = tiny.inputs([[1, "image", 5, 6]]), tiny.inputs([[1, "image", 7, "image", 5, 6]])
    read = []
    look = Capture(sites(tiny.model).stack("decoder")[:1], lambda call, _: read.append(call.columns("image").sum()))

    def change(request):
        assert request.images == ["a picture"] and request.text == ["what?"]
        request.look()
        return two

    with attach(tiny.model, [Plan("crop", [Rewrite(change, look=[look])])]) as session:
        inputs = session.rewrite(one, images=["a picture"], text=["what?"])
        found = tiny.model.generate(**inputs, **GREEDY)
    assert torch.equal(found, tiny.model.generate(**two, **GREEDY))
    assert read == [sum((one["input_ids"] == tiny.model.config.image_token_id).flatten())]


def test_a_request_that_stays_is_known_too(model):
    with attach(model, [Plan("stays", [Rewrite(lambda request: None)])]) as session, pytest.warns(match="never acted"):
        model(**session.rewrite(INPUTS))
        session.remove()


def test_a_prompt_that_was_not_rewritten_is_refused(model):
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with attach(model, [Plan("longer", [Rewrite(longer)])]) as session:
        session.rewrite(INPUTS)
        with pytest.raises(ReattendError, match=r"inputs = session.rewrite\(inputs\)"):
            model.generate(**INPUTS, **GREEDY)
    handle.remove()
    assert not ran


@pytest.mark.parametrize("generate", [False, True])
def test_images_tell_requests_of_the_same_tokens_apart(generate):
    tiny = build("llava")
    one = tiny.inputs([[1, "image", 5, 6]])
    other, met = {**one, "pixel_values": one["pixel_values"] + 1.5}, []
    decoder = sites(tiny.model).stack("decoder")

    def read(call, edits):
        call.memory["norm"] = call.query.norm().item()

    def edit(call):
        met.append(call.memory["norm"])
        return HeadGain(factor=0.5)

    def run(inputs):
        return tiny.model.generate(**inputs, max_new_tokens=1, do_sample=False) if generate else tiny.model(**inputs)

    look = Rewrite(lambda request: request.memory.update(request.look()), look=[Capture(decoder.layers(2, 2), read)])
    with attach(tiny.model, [Plan("look", [look, Edits(decoder[:1], edit)])]) as session:
        for inputs in (one, other):
            run(session.rewrite(inputs))
        wanted = met.copy()
        assert wanted[0] != wanted[1]
        for inputs in (one, other, one):  # known by now, also by their features
            run(inputs)
        assert met == [*wanted, *wanted, wanted[0]]
        third = {**one, "pixel_values": one["pixel_values"] - 2.0}
        with pytest.raises(ReattendError, match="has not been through it"):
            run(third)
        if generate:  # two that no pass has begun with
            session.rewrite(third), session.rewrite({**one, "pixel_values": one["pixel_values"] * 3})
            with pytest.raises(ReattendError, match="which one it is: rewrite each just before"):
                run(third)


def test_threads_know_their_own_requests_of_the_same_tokens():
    tiny, met = build("llava"), {n: [] for n in range(4)}

    def change(request):
        request.memory["first"] = float(request.arguments["pixel_values"].flatten()[0])

    def edit(call):
        met[int(threading.current_thread().name)].append(call.memory["first"])
        return HeadGain(factor=0.5)

    def run(session, inputs):
        with torch.no_grad():
            for _ in range(5):
                tiny.model.generate(**session.rewrite(inputs), max_new_tokens=1, do_sample=False)

    one = tiny.inputs([[1, "image", 5, 6]])
    several = [{**one, "pixel_values": one["pixel_values"] + n} for n in met]
    plan = Plan("x", [Rewrite(change), Edits(sites(tiny.model).stack("decoder")[:1], edit)])
    with attach(tiny.model, [plan]) as session:
        threads = [threading.Thread(target=run, args=(session, several[n]), name=str(n)) for n in met]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert met == {n: [float(several[n]["pixel_values"].flatten()[0])] * 5 for n in met}


def test_chunks_embeddings_and_beams_are_known(model):
    """A prompt that comes in parts or as embeddings; what is remembered of rows goes to their beams, and is not shared by two runs."""
    met = []

    def change(request):
        request.memory["row"], request.memory["list"] = torch.arange(2), []

    def edit(call):
        call.memory["list"].append(1)
        met.append((call.memory["row"].tolist(), len(call.memory["list"])))
        return HeadGain(factor=0.5)

    embeds = {"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": INPUTS["attention_mask"]}
    with attach(model, [Plan("x", [Rewrite(change), Edits(sites(model)[:1], edit)])]) as session:
        for inputs in (INPUTS, embeds):
            model.generate(**session.rewrite(inputs), **GREEDY)
            for _ in range(2):
                met.clear()
                model.generate(**inputs, max_new_tokens=1, num_beams=2, do_sample=False)
                assert met == [([0, 0, 1, 1], 1)]
        model.generate(**INPUTS, **GREEDY, prefill_chunk_size=3)
        with pytest.raises(ReattendError, match="has not been through it"):
            model(IDS[:, :3])
        with pytest.raises(ReattendError, match="arguments of the model by name, got NoneType"):
            session.rewrite(None)
        with pytest.raises(ReattendError, match=r"with input_ids or inputs_embeds .*; got \['attention_mask'\]"):
            session.rewrite({"attention_mask": IDS})


def test_several_change_it_in_their_order(model):
    def shorter(request):
        return {name: value[:, 3:] for name, value in request.arguments.items()}

    with attach(model, [Plan("longer", [Rewrite(longer)]), Plan("shorter", [Rewrite(shorter)])]) as session:
        inputs = session.rewrite(INPUTS)
        model(**inputs)
    assert inputs["input_ids"].shape == (2, 6)
    assert session.stats == {"longer": {"requests": 1}, "shorter": {"requests": 1}}


def test_a_failed_look_leaves_nothing(model):
    before = model(**INPUTS).logits

    def fail(call, edits):
        raise KeyboardInterrupt

    def change(request):
        return request.look()

    with attach(model, [Plan("fails", [Rewrite(change, look=[Capture(sites(model)[:1], fail)])])]) as session:
        with pytest.raises(KeyboardInterrupt):
            session.rewrite(INPUTS)
        assert not len(session.attachment.in_flight) and session.attachment.tracker.probing() is None
        session.counts["fails"]["tried"] += 1
    assert torch.equal(model(**INPUTS).logits, before)


def test_refused(model):
    with (
        pytest.raises(ReattendError, match="changed to a mapping"),
        attach(model, [Plan("wrong", [Rewrite(lambda request: {"text": "a"})])]) as session,
    ):
        session.rewrite(INPUTS)
    with (
        pytest.raises(ReattendError, match="needs readers"),
        attach(model, [Plan("blind", [Rewrite(lambda request: request.look())])]) as session,
    ):
        session.rewrite(INPUTS)
    with (
        pytest.raises(ReattendError, match="tokenizer=processor"),
        attach(model, [Plan("images", [Rewrite(lambda request: request.process(text="a"))])]) as session,
    ):
        session.rewrite(INPUTS)
    with pytest.raises(ReattendError, match="not at work here"):
        session.rewrite(INPUTS)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=32, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes))
    with pytest.raises(UnsupportedError, match="BartForConditionalGeneration reads it in an encoder"):
        attach(bart, [Plan("e", [Rewrite(longer)])])
    net, _ = tiny_denoisers.build("SD3Transformer2DModel")
    with pytest.raises(UnsupportedError, match="reads no tokens"):
        attach(net, [Plan("e", [Rewrite(longer)])])
