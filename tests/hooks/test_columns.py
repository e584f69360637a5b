"""Where a call's key columns lie in the sequence, under every cache: column j holds the key of the token at key_start + j, the last one the
newest token's. Static caches hand out buffers that are longer than what is written, sliding ones the window alone, rolled when full.
"""

from __future__ import annotations

import pytest
import torch
from reattend.hooks import Capture, Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of, filled_columns
from reattend.interventions import Mix, TokenMap
from tiny_language import language_model
from transformers import DynamicCache, FalconConfig, FalconForCausalLM, StaticCache

KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Mistral, filling": {"sliding_window": 15},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Gemma2": {"sliding_window": 15, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "Falcon": {},  # it calls SDPA itself
}
CACHES = {
    "default": lambda model: {},
    "all keys": lambda model: {cache_name(model): DynamicCache()},
    "static": lambda model: {"cache_implementation": "static"},
    "static, longer": lambda model: {cache_name(model): StaticCache(config=model.config, max_cache_len=40)},
}
IDS = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0


class Watched:
    """Every call under a session that changes nothing: what it says of its columns, and its keys."""

    def __init__(self, model):
        self.calls, self.model = [], model

    def __enter__(self):
        self.session = attach(self.model, [Plan("watch", [Capture(sites(self.model).stack("decoder"), self.note)])])
        return self

    def __exit__(self, *_):
        self.session.remove()

    def note(self, call, edits):
        self.calls.append((call.site.layer, call.key_start, call.total, call.num_queries, call.key.clone(), call.mask))


def model_of(kind):
    if kind == "Falcon":
        torch.manual_seed(0)
        return FalconForCausalLM(
            FalconConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, bos_token_id=1,
                new_decoder_architecture=True, pad_token_id=0, eos_token_id=None,
            )
        ).eval()  # fmt: skip
    return language_model(kind.split(",")[0], **KINDS[kind])


def check(model, sequences, mask, calls, drafts=False):
    """drafts: all new tokens of a pass but its first may be refused, and then are not the sequence's."""
    prompt = mask.shape[1]
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    with Watched(model) as whole, torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        model(sequences, attention_mask=mask, position_ids=positions, use_cache=False)
    known = {layer: key for layer, _, _, _, key, _ in whole.calls}
    seen = set()
    for layer, start, total, queries, key, shown in calls:
        assert key.shape[2] == total - start and (shown is None or shown.shape[-1] == total - start)
        stop = total if not drafts else max(prompt, total - queries + 1)
        real = mask[:, start:stop].bool()
        mine, others = (x.transpose(1, 2)[real] for x in (key[:, :, : stop - start], known[layer][:, :, start:stop]))
        torch.testing.assert_close(mine, others, atol=2e-5, rtol=1e-4)
        seen.add((start > 0, total))
    return seen


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_the_tokens_from_key_start_on(kind, cache):
    model = model_of(kind)
    for options in ({}, {"prefill_chunk_size": 5}):
        with Watched(model) as watched:
            out = model.generate(
                IDS,
                attention_mask=PADDED,
                max_new_tokens=7,
                min_new_tokens=7,
                do_sample=False,
                **options,
                **CACHES[cache](model),
            )
        seen = check(model, out, PADDED, watched.calls)
        assert {total for _, total in seen} >= {12, 15, 16, 18}
        if "sliding_window" in KINDS[kind] and cache != "all keys":
            assert any(dropped for dropped, _ in seen), "the window has left tokens behind"


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mistral, filling", "Gemma3"])
def test_columns_while_tokens_are_drafted(kind):
    """Sliding caches keep more than their window then, until they know which drafts stay."""
    model = model_of(kind)
    with Watched(model) as watched:
        out = model.generate(
            IDS[:1],
            attention_mask=PADDED[:1],
            max_new_tokens=12,
            do_sample=False,
            assistant_model=language_model(num_hidden_layers=1),
        )
    assert any(1 < queries < 12 for _, _, _, queries, _, _ in watched.calls)
    check(model, out, PADDED[:1], watched.calls, drafts=True)


@pytest.mark.parametrize("kind", ["Llama", "Falcon"])
def test_a_buffer_without_a_token_map_is_read_from_its_mask(kind):
    """The inner model is called on its own: no prompt is known, but what nobody sees is no token."""
    model = model_of(kind)
    inner = model.transformer if kind == "Falcon" else model.model
    cache = StaticCache(config=model.config, max_cache_len=40)
    with Watched(model) as watched, torch.no_grad():
        for piece in (IDS[:, :7], IDS[:, 7:8], IDS[:, 8:11], IDS[:, 11:]):
            inner(piece, **{cache_name(inner): cache}, use_cache=True)
    assert [key.shape[2] for layer, *_, key, _ in watched.calls if layer == 0] == [7, 8, 11, 12]
    check(model, IDS, torch.ones_like(IDS), watched.calls)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma3"])
def test_each_row_meets_its_own_column(kind):
    """Half of each row's weight goes to its own token: the same with every cache, with a loop written by hand, and without any."""
    model = model_of(kind)

    def logits(cache, pieces):
        with (
            torch.no_grad(),
            attach(model, [Plan("own", [Edits(sites(model), lambda call: Mix(target="identity", strength=0.5))])]),
        ):
            parts, options = [], {} if cache is None else {cache_name(model): cache, "use_cache": True}
            for piece in pieces:
                out = model(piece, **options)
                parts.append(out.logits)
                if cache is not None:
                    assert cache_of(out) is cache
        return torch.cat(parts, dim=1)

    expected = logits(None, [IDS])
    pieces = IDS.split([4, 1, 3, 1, 1, 2], dim=1)
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=30)):
        torch.testing.assert_close(logits(cache, pieces), expected, atol=2e-5, rtol=1e-4)


def test_untouched_heads_keep_their_bits_in_a_buffer():
    """A kernel that gets fewer columns may sum in another order: heads without an edit take the model's own call."""
    model = language_model(num_hidden_layers=1)
    outputs = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: outputs.append(args[0].unflatten(2, (4, 8)))
    )

    def run():
        cache, outputs[:] = StaticCache(config=model.config, max_cache_len=300), []
        with torch.no_grad():
            for piece in IDS.split([6, 5, 1], dim=1):
                model(piece, **{cache_name(model): cache}, use_cache=True)
        return torch.cat(outputs, dim=1)

    plain = run()
    with attach(model, [Plan("one", [Edits(sites(model), lambda call: Mix(target="identity", strength=0.5, heads=[1]))])]):
        edited = run()
    handle.remove()
    assert torch.equal(plain[:, :, [0, 2, 3]], edited[:, :, [0, 2, 3]]) and not torch.equal(plain[:, :, 1], edited[:, :, 1])


def test_only_buffers_are_cut_to_the_tokens_that_are_known():
    """Virtual tokens of a prefix stand in a growing cache, too: such columns are more than the tokens, and none of them is empty."""
    query, key = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 9, 2)
    tokens = TokenMap(1, 4, 5)
    assert filled_columns(query, key, None, tokens, buffered=True) == 5
    assert filled_columns(query, key, None, tokens, buffered=False) == 9
