"""What a recipe learns from generated tokens follows the rows of the cache: beams, selected and repeated rows, tokens taken back."""

import pickle

import pytest
import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import HeadGain, Memory, ReattendError, require_whole
from tiny_llama import tiny_llama

PROMPTS = torch.randint(2, 60, (2, 6), generator=torch.Generator().manual_seed(3))
NEW = torch.randint(2, 60, (2, 5), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def learning(model, per_token: bool = False):
    """Made up: the last layer's heads are scaled at the newest token by what the values of all generated tokens have added up to."""

    def scale(call):
        if call.clock.phase != "decode":
            return None
        new = call.value[:, :, -1].mean(dim=-1).repeat_interleave(2, dim=1)  # [B, H]
        if per_token:
            known = call.memory.get("seen")
            if known is None:
                require_whole(call.memory, "sums")
                known = new.new_zeros(call.batch, call.total - 1, call.num_heads)
            seen = call.memory["seen"] = torch.cat([known, new[:, None]], dim=1)
            total = seen.sum(dim=1)
        else:
            known = call.memory.get("sum")
            if known is None:
                require_whole(call.memory, "sums")
                known = torch.zeros_like(new)
            total = call.memory["sum"] = known + new
        rows = torch.zeros(call.batch, call.num_queries, dtype=torch.bool)
        rows[:, -1] = True
        return HeadGain(factor=1 + torch.tanh(30 * total), rows=rows)

    return attach(model, [Plan("sums", [Edits(sites(model)[-1:], scale)])])


def alone(model, prompt, tokens, **options):
    """[steps, V]: the logits after each token, read in a sequence of its own."""
    with torch.no_grad(), learning(model, **options):
        output = model(prompt[None])
        logits = [output.logits[0, -1]]
        for token in tokens:
            output = model(token.view(1, 1), **{cache_name(model): cache_of(output)})
            logits.append(output.logits[0, -1])
    return torch.stack(logits)


def read(model, ids, cache=None):
    with torch.no_grad():
        output = model(ids, **({} if cache is None else {cache_name(model): cache}))
    return output.logits[:, -1], cache_of(output)


def started(model, steps: int = 2):
    _, cache = read(model, PROMPTS)
    for step in range(steps):
        _, cache = read(model, NEW[:, step : step + 1], cache)
    return cache


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_keep_what_they_have_learned(model, use_cache: bool) -> None:
    with learning(model), torch.no_grad():
        found = model.generate(
            PROMPTS, max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False, use_cache=use_cache,
            output_logits=True, return_dict_in_generate=True, eos_token_id=None, attention_mask=torch.ones_like(PROMPTS),
        )  # fmt: skip
    moved = 0
    for row, (sequence, beams) in enumerate(zip(found.sequences, found.beam_indices)):
        expected = alone(model, PROMPTS[row // 3], sequence[6:-1])
        for step, beam in enumerate(beams[:5].tolist()):
            assert torch.allclose(found.logits[step][beam], expected[step], atol=1e-5), (row, step)
        moved += len(set((beams[1:5] - row // 3 * 3).tolist())) > 1
    assert moved, "no beam has changed its place, so that this says nothing"


def test_rows_that_change_places(model) -> None:
    expected = [alone(model, p, n) for p, n in zip(PROMPTS, NEW)]
    with learning(model):
        cache = started(model)
        cache.reorder_cache(torch.tensor([1, 0]))
        logits, _ = read(model, NEW.flip(0)[:, 2:3], cache)
    assert torch.allclose(logits, torch.stack([expected[1][3], expected[0][3]]), atol=1e-5)
    assert not torch.allclose(expected[0][3], expected[1][3], atol=1e-2)


def test_rows_that_are_selected_and_repeated(model) -> None:
    expected = [alone(model, p, n) for p, n in zip(PROMPTS, NEW)]
    with learning(model):
        cache = started(model)
        cache.batch_repeat_interleave(2)
        logits, cache = read(model, NEW.repeat_interleave(2, dim=0)[:, 2:3], cache)
        assert torch.allclose(logits, torch.stack([expected[i][3] for i in (0, 0, 1, 1)]), atol=1e-5)
        cache.batch_select_indices(torch.tensor([3, 1]))
        logits, cache = read(model, NEW.flip(0)[:, 3:4], cache)
        assert torch.allclose(logits, torch.stack([expected[1][4], expected[0][4]]), atol=1e-5)


def test_tokens_that_are_taken_back(model) -> None:
    expected = alone(model, PROMPTS[0], NEW[0], per_token=True)
    assert torch.allclose(expected, alone(model, PROMPTS[0], NEW[0]), atol=1e-5)
    with learning(model, per_token=True):
        cache = started(model)
        read(model, NEW.flip(0)[:, 2:3], cache)
        cache.crop(-1)
        logits, _ = read(model, NEW[:, 2:3], cache)
        assert torch.allclose(logits[0], expected[3], atol=1e-5)
    with learning(model):  # what was added up cannot be taken back, and that is said
        cache = started(model)
        cache.crop(-1)
        with pytest.raises(ReattendError, match="their cache was cut"):
            read(model, NEW[:, 1:2], cache)


def test_nothing_is_left_on_the_cache(model) -> None:
    with learning(model):
        cache = started(model)
        again = pickle.loads(pickle.dumps(cache))
        assert again.reorder_cache(torch.tensor([1, 0])) is None
        assert torch.equal(again.layers[0].keys, cache.layers[0].keys.flip(0))
    assert not {"reorder_cache", "batch_select_indices", "batch_repeat_interleave"} & vars(cache).keys()


def test_a_store_under_other_prompts_follows_as_a_whole_or_is_lost() -> None:
    index = torch.tensor([1, 0])
    memory = Memory()
    memory.update(gain=torch.tensor([[1.0], [2.0]]), answering=True)
    memory.move(index, 2, False, 9)
    assert memory["gain"].tolist() == [[2.0], [1.0]] and memory["answering"] and not memory.lost
    memory["learned"] = object()
    memory.move(index, 2, True, 9)  # rows that have the same prompt: what was learned from it holds
    assert memory["gain"].tolist() == [[1.0], [2.0]] and "learned" in memory
    memory.move(index, 2, False, 9)
    assert not memory and memory.lost == 9
