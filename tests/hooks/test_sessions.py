"""Sessions: who is steered, and that a model is afterwards what it was before."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings

import pytest
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import HeadGain, KeyBias, ReattendError, ReattendWarning, Transfer, UnsupportedError
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=63,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def drop_first(call):
    return Transfer(source=[0], strength=0.9)


def halve(call):
    return HeadGain(factor=0.5)


def session_of(model, intervention=drop_first, label="test", **options):
    return attach(model, [Plan(label, [Edits(sites(model), intervention)])], **options)


def snapshot(model) -> dict:
    """Everything a session might leave behind: hooks, attributes, configs, registries, parameters' identity, function modes."""
    return {
        "modules": [
            (
                name,
                id(m),
                sorted(m.__dict__),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._forward_hooks_always_called),
            )
            for name, m in model.named_modules()
        ],
        "parameters": [(name, id(p), p._version) for name, p in model.named_parameters()],
        "attention": {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")},
        "registered": sorted(AttentionInterface._global_mapping) + sorted(AttentionMaskInterface._global_mapping),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
    }


def test_steers_and_restores_bit_for_bit(model, ids):
    before, traces = logits(model, ids), snapshot(model)
    with session_of(model) as session:
        steered = logits(model, ids)
    assert (steered - before).abs().max() > 1e-3
    assert session.stats["test"] == {f"model.layers.{i}.self_attn": 1 for i in range(3)}
    assert torch.equal(logits(model, ids), before)
    assert snapshot(model) == traces


def test_a_session_without_edits_is_bit_identical(model, ids):
    before = logits(model, ids)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReattendWarning)
        with session_of(model, lambda call: None):
            assert torch.equal(logits(model, ids), before)
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)


def test_warns_when_a_recipe_never_acted(model, ids):
    session = session_of(model, lambda call: None, label="idle")
    logits(model, ids)
    with pytest.warns(ReattendWarning, match="'idle' never acted in 1 forward"):
        session.remove()


def test_composes_in_the_order_given(model, ids):
    before = logits(model, ids)

    def move(call):
        return Transfer(source=[0], target=[1], strength=1.0)

    def bring_back(call):
        return Transfer(source=[1], target=[0], strength=1.0)

    table = sites(model)
    forth = [Plan("move", [Edits(table, move)]), Plan("back", [Edits(table, bring_back)])]
    with attach(model, forth) as session:
        one = logits(model, ids)
    with attach(model, forth[::-1]):
        other = logits(model, ids)
    assert not torch.allclose(one, other) and not torch.allclose(one, before)
    assert set(session.stats) == {"move", "back"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_sessions_are_removed_in_any_order(model, ids, order):
    before, traces = logits(model, ids), snapshot(model)
    sessions = [
        session_of(model, f) for f in (drop_first, halve, lambda call: KeyBias(bias=torch.linspace(0, 1, call.num_keys)))
    ]
    all_on = logits(model, ids)
    assert not torch.equal(all_on, before)
    for position in order:
        sessions[position].remove()
        logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert snapshot(model) == traces


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restores_after_an_error_in_mid_forward(model, ids, error):
    before, traces = logits(model, ids), snapshot(model)

    def breaks(call):
        if call.site.layer == 1:
            raise error("in mid-forward")
        return HeadGain(factor=0.5)

    with pytest.raises(error), session_of(model, breaks):
        logits(model, ids)
    assert snapshot(model) == traces
    assert torch.equal(logits(model, ids), before)


def test_goes_on_after_an_error_in_mid_forward(model, ids):
    fail = [True]

    def sometimes(call):
        if fail[0] and call.site.layer == 1:
            raise KeyboardInterrupt
        return HeadGain(factor=0.5)

    with session_of(model, halve):
        expected = logits(model, ids)
    with session_of(model, sometimes):
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids)
        fail[0] = False
        assert torch.equal(logits(model, ids), expected)


def test_other_hooks_of_the_user_stay(model, ids):
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *a: seen.append(1))
    with session_of(model):
        logits(model, ids)
    logits(model, ids)
    assert len(seen) == 2
    handle.remove()


def test_active_for_every_thread_by_default(model, ids):
    before = logits(model, ids)
    result = {}

    def work():
        result["logits"] = logits(model, ids)

    with session_of(model):
        expected = logits(model, ids)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(result["logits"], expected) and not torch.equal(expected, before)


def test_streaming_generate_in_a_thread_is_steered(model, ids):
    from queue import Queue

    class Streamer:
        def __init__(self):
            self.queue: Queue = Queue()

        def put(self, value):
            self.queue.put(value)

        def end(self):
            self.queue.put(None)

    plain = model.generate(ids[1:], max_new_tokens=10, do_sample=False)
    with session_of(model, halve):
        expected = model.generate(ids[1:], max_new_tokens=10, do_sample=False)
        streamer = Streamer()
        thread = threading.Thread(
            target=model.generate, args=(ids[1:],), kwargs={"max_new_tokens": 10, "do_sample": False, "streamer": streamer}
        )
        thread.start()
        tokens = []
        while (piece := streamer.queue.get(timeout=60)) is not None:
            tokens += piece.flatten().tolist()
        thread.join()
    assert tokens == expected[0].tolist()
    assert expected.tolist() != plain.tolist()


def test_isolated_sessions_in_threads_at_the_same_time(model, ids):
    """One thread untouched, two under different recipes, all on one model at once: each equals its separate run."""
    expected = [model.generate(ids, max_new_tokens=24, do_sample=False)]
    for intervention in (drop_first, halve):
        with session_of(model, intervention):
            expected.append(model.generate(ids, max_new_tokens=24, do_sample=False))
    assert expected[0].tolist() != expected[1].tolist() != expected[2].tolist()
    barrier, results = threading.Barrier(3), [[] for _ in range(3)]

    def work(number, intervention):
        barrier.wait()
        for _ in range(3):
            if intervention is None:
                results[number].append((model.generate(ids, max_new_tokens=24, do_sample=False), logits(model, ids)))
            else:
                with session_of(model, intervention, isolated=True):
                    results[number].append((model.generate(ids, max_new_tokens=24, do_sample=False), None))

    before = logits(model, ids)
    traces = snapshot(model)
    threads = [threading.Thread(target=work, args=(i, f)) for i, f in enumerate((None, drop_first, halve))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for number in range(3):
        assert len(results[number]) == 3
        for generated, untouched in results[number]:
            assert torch.equal(generated, expected[number])
            assert untouched is None or torch.equal(untouched, before)
    assert snapshot(model) == traces


def test_isolated_follows_the_context_of_tasks(model, ids):
    before = logits(model, ids)

    async def steered():
        with session_of(model, isolated=True):
            await asyncio.sleep(0.01)
            return logits(model, ids)

    async def untouched():
        await asyncio.sleep(0.005)
        return logits(model, ids)

    async def both():
        return await asyncio.gather(steered(), untouched())

    one, other = asyncio.run(both())
    assert torch.equal(other, before) and not torch.equal(one, before)
    with session_of(model, isolated=True):
        copied = contextvars.copy_context()
        assert torch.equal(copied.run(logits, model, ids), one)


def test_two_models_from_one_config_do_not_mix(ids):
    first, second = tiny_llama(0), tiny_llama(0)
    second = LlamaForCausalLM(first.config).eval()
    before = logits(second, ids)
    with session_of(first):
        assert torch.equal(logits(second, ids), before)
    assert torch.equal(logits(second, ids), before)


def test_flash_and_other_kernels_are_refused_with_the_remedy(model):
    AttentionInterface.register("my_kernel", lambda *a, **k: None)
    try:
        model.config._attn_implementation_internal = "my_kernel"
        with pytest.raises(
            UnsupportedError, match=r'model.layers.0.self_attn runs .*"?my_kernel.*set_attn_implementation\("sdpa"\)'
        ):
            session_of(model)
        assert model.config._attn_implementation == "my_kernel"
    finally:
        del AttentionInterface._global_mapping["my_kernel"]
        model.config._attn_implementation_internal = "sdpa"


def test_a_head_that_does_not_exist_is_named(model, ids):
    message = "head 7 does not exist.*model.layers.0.self_attn.*heads 0 to 3"
    with pytest.raises(ReattendError, match=message), session_of(model, lambda call: HeadGain(factor=0.5, heads=[7])):
        logits(model, ids)


def test_training_with_dropout_is_refused(ids):
    model = tiny_llama(attention_dropout=0.1).train()
    with pytest.raises(ReattendError, match=r"model\.eval\(\)"), session_of(model):
        model(ids)
