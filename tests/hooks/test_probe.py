"""The probe door: a further pass before a prefill, which is read, edited by nobody, and leaves nothing behind."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
from reattend.hooks import Capture, Edits, Observe, Plan, Probe, attach, sites
from reattend.hooks.trackers.caches import cache_in
from reattend.interventions import HeadGain, ReattendError
from tiny_language import language_model


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture
def ids():
    return torch.tensor([[1, 5, 9, 33, 7], [1, 8, 4, 21, 6]])


def layers_run(model):
    """Counts the layers that run: (list that fills, handles)."""
    ran = []
    return ran, [layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(model.model.layers)]


def test_readers_see_the_plain_model_and_share_the_recipes_memory(model, ids):
    decoder = sites(model).stack("decoder")
    base = model(ids).logits
    plain = {}
    with attach(model, [Plan("look", [Capture(decoder, lambda call, _: plain.setdefault(call.site.layer, call.query))])]):
        model(ids)
    met = []

    def read(call, edits):
        assert list(edits) == []
        call.memory.setdefault("queries", []).append(call.query)

    def act(call):
        met.append((call.clock.phase, len(call.memory["queries"])))
        return HeadGain(factor=0.5)

    plan = Plan("probe", [Probe([Capture(decoder, read)]), Edits(decoder, act)])
    other = Plan("other", [Edits(decoder, lambda call: HeadGain(factor=3.0))])
    with attach(model, [other]), attach(model, [plan]) as session:
        edited = model(ids).logits
        assert session.forwards == 1 and session.stats == {"probe": {s.name: 1 for s in decoder}}
        first = list(met)
        model(ids)
    assert first == [("prefill", 4)] * 4 and len(met) == 8
    assert not torch.allclose(edited, base)
    seen = []
    probe = Probe([Capture(decoder, lambda call, _: seen.append(call.query))])
    with attach(model, [other]), attach(model, [Plan("probe", [probe])]):
        model(ids)
    assert all(torch.equal(a, plain[n]) for n, a in enumerate(seen)) and len(seen) == 4
    assert torch.equal(model(ids).logits, base)


def test_a_probe_without_acts_changes_nothing_and_runs_at_prefill_alone(model, ids):
    decoder = sites(model).stack("decoder")
    options = {"max_new_tokens": 4, "do_sample": True}
    torch.manual_seed(0)
    base = model.generate(ids, **options)
    tapped, captured = [], []
    steps = [
        Observe(decoder.layers(0, 1), lambda seen: tapped.append(seen.hidden.shape)),
        Capture(decoder.layers(0, 2), lambda call, _: captured.append(call.tokens.length)),
    ]
    ran, handles = layers_run(model)
    with attach(model, [Plan("probe", [Probe(steps)])]):
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, **options), base)
    for handle in handles:
        handle.remove()
    assert tapped == [(2, 5, 32)] * 2 and captured == [5] * 3
    assert ran == [0, 1, 2] + [0, 1, 2, 3] * 4, "the probe stops after layer 2"
    assert not model._forward_pre_hooks and not model.model.layers[0]._forward_pre_hooks


def test_runs_to_the_end_when_asked(model, ids):
    ran, handles = layers_run(model)
    step = Probe([Capture(sites(model).layers(0, 0), lambda *_: None)], early_exit=False)
    with attach(model, [Plan("probe", [step])]):
        model(ids)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3] * 2


def test_changed_inputs_have_a_map_of_their_own(model, ids):
    decoder = sites(model).stack("decoder")
    seen = []

    def shorter(prompt):
        assert cache_in(prompt.arguments) is None
        prompt.memory["rows"] = prompt.tokens.batch
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        return {"input_ids": prompt.arguments["input_ids"][:, :3], "attention_mask": mask}

    def read(call, edits):
        seen.append((call.num_queries, call.columns("padding").tolist(), call.memory["rows"]))

    with attach(model, [Plan("probe", [Probe([Capture(decoder.layers(0, 0), read)], shorter)])]):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert seen == [(3, [[False] * 3, [False, False, True]], 2)]

    with attach(model, [Plan("probe", [Probe([Capture(decoder, read)], lambda prompt: None)])]):
        model(ids)
    assert len(seen) == 1


def test_inputs_changed_in_the_prompt_itself_have_a_map_of_their_own_too(model, ids):
    seen = []

    def longer(prompt):
        prompt.arguments["input_ids"] = torch.cat([ids, ids], dim=1)
        return prompt.arguments

    read = Capture(sites(model)[:1], lambda call, _: seen.append((call.num_keys, call.tokens.length)))
    mine = {"input_ids": ids}
    with attach(model, [Plan("probe", [Probe([read], longer), Probe([read], lambda prompt: mine)])]):
        model(ids)
    assert seen == [(10, 10), (5, 5)] and list(mine) == ["input_ids"]
    for answer in (5, {}, {"input_ids": ids[:, :0]}, {"input_ids": [1]}):
        with pytest.raises(ReattendError, match="what a probe reads is a mapping of all arguments"):  # noqa: SIM117
            with attach(model, [Plan("probe", [Probe([read], lambda prompt, answer=answer: answer)])]):
                model(ids)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_reader_leaves_nothing(model, ids, error):
    base = model(ids).logits

    def read(call, edits):
        raise error("stop")

    with attach(model, [Plan("probe", [Probe([Capture(sites(model), read)])])]) as session:
        with pytest.raises(error):
            model(ids)
        session.actions.clear()
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, base)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_threads_probe_side_by_side(model, ids):
    seen = {}

    def read(call, edits):
        call.memory["length"] = call.num_queries

    def act(call):
        seen.setdefault(threading.get_ident(), set()).add((call.memory["length"], call.tokens.prompt_length))

    decoder = sites(model)
    with attach(model, [Plan("probe", [Probe([Capture(decoder, read)]), Edits(decoder, act)])]) as session:
        threads = [threading.Thread(target=lambda n=n: [model(ids[:, :n]) for _ in range(5)]) for n in (3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session.counts.clear()
    assert sorted(pair for pairs in seen.values() for pair in pairs) == [(3, 3), (5, 5)]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma", "mllama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_vision_models_probe_their_own_inputs(family, cache):
    tiny = tiny_models.mllama() if family == "mllama" else tiny_models.build(family)
    inputs = tiny.inputs([[1, 5, "image", 7, 8], [1, "image", 6]])
    if family == "mllama":
        mask = torch.ones(2, inputs["input_ids"].shape[1], 1, 1, dtype=torch.long)
        inputs["cross_attention_mask"] = mask
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache and family != "mllama":
        options |= {"cache_implementation": cache, "disable_compile": True}
    base = torch.stack(tiny.model.generate(**inputs, **options).logits)
    decoder = sites(tiny.model).stack("decoder").kind("self")
    probed, real = {}, {}

    def keep(store):
        return lambda call, _: store.setdefault(call.site.layer, (call.query, call.value, call.tokens.length))

    steps = [Probe([Capture(decoder, keep(probed))]), Capture(decoder, keep(real))]
    with attach(tiny.model, [Plan("probe", steps)]):
        assert torch.equal(torch.stack(tiny.model.generate(**inputs, **options).logits), base)
    assert probed.keys() == real.keys() and len(probed) == len(decoder)
    for layer, (query, value, length) in probed.items():
        real_rows = inputs["attention_mask"].bool()
        assert length == real[layer][2]
        for row in range(2):
            chosen = real_rows[row]
            torch.testing.assert_close(query[row][:, chosen], real[layer][0][row][:, chosen], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                value[row][:, chosen], real[layer][1][row][:, : len(chosen)][:, chosen], atol=1e-5, rtol=1e-4
            )


def test_refused():
    with pytest.raises(ReattendError, match="at least one reader"):
        Probe([])
