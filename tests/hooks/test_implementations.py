"""Flash attention in transformers under sessions, over kernels that stand in for the real ones (see `flash_kernels`)."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asked_images
import pytest
import reattend
import torch
from flash_kernels import Kernels, installed, under
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.routes.implementations import FLEX, flash_call, flex_call, from_outside
from reattend.hooks.routes.interface import _lookup
from reattend.interventions import Call, Gain, HeadGain, KeyBias, ReattendError, Transfer, UnsupportedError
from tiny_llama import IDS, logits, session_of, tiny_llama, traces
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AutoModelForCausalLM, masking_utils
from transformers.masking_utils import AttentionMaskInterface

HUB = "kernels-community/flash-attn2"
WINDOW = 5


pytestmark = pytest.mark.filterwarnings("ignore:recipe 'test' never acted")


@pytest.fixture(params=["flash_attention_2", HUB])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(name: str) -> Iterator[Kernels]:
    registries = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(registry) for registry in registries]
    with installed(name) as found:
        yield found
    assert [dict(registry) for registry in registries] == before


def chosen(call: Call) -> Tensor:
    columns = torch.zeros(call.batch, call.num_keys, dtype=torch.bool)
    columns[:, -3:-1] = True
    return columns


EDITS: dict[str, Callable[[Call], Any]] = {
    "head gain": lambda call: HeadGain(factor=0.5, heads=[0]),
    "key bias": lambda call: KeyBias(bias=chosen(call).float()),
    "gain": lambda call: Gain(columns=chosen(call), factor=0.2),
    "transfer": lambda call: Transfer(source=chosen(call), strength=0.7, heads=[1, 2]),
}


def sliding(kind: str = "mistral") -> Any:
    from transformers import Gemma2Config, GptOssConfig, MistralConfig

    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63, "sliding_window": WINDOW,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "mistral":
        config: Any = MistralConfig(**sizes)
    elif kind == "gemma2":
        config = Gemma2Config(**sizes, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
    else:
        config = GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
    return AutoModelForCausalLM.from_config(config).eval()


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return {"input_ids": IDS * mask, "attention_mask": mask}


def real(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return output[inputs["attention_mask"].bool()]


def written(model: Any, inputs: dict[str, Tensor], count: int = 6, **options: Any) -> Tensor:
    """Logits of greedy tokens."""
    options |= {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, **options).logits)


def test_a_session_without_edits_is_the_users_kernel_bit_for_bit(kernels: Kernels, name: str) -> None:
    model = under(tiny_llama(), name)
    before, calls, left = logits(model), len(kernels.calls), traces(model)
    with session_of(model, lambda call: HeadGain(factor=1.0)) as session:
        assert torch.equal(logits(model), before) and len(kernels.calls) == 2 * calls == 6
        assert model.config._attn_implementation.endswith(f"_{name}") and session.forwards == 1
        with pytest.warns(reattend.ReattendWarning, match="never acted"):
            session.remove()
    assert torch.equal(logits(model), before) and traces(model) == left
    assert type(model.config._attn_implementation) is str


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_edits_equal_those_under_sdpa(kernels: Kernels, name: str, edit: str, side: str) -> None:
    model, inputs = tiny_llama(), padded(side)
    with session_of(model, EDITS[edit]), torch.no_grad():
        wanted = model(**inputs).logits
    under(model, name)
    before = model(**inputs).logits
    with session_of(model, EDITS[edit]) as session, torch.no_grad():
        found = model(**inputs).logits
        assert session.applied == 3
    torch.testing.assert_close(real(found, inputs), real(wanted, inputs), atol=1e-5, rtol=1e-4)
    assert not found.isnan().any() and not torch.equal(found, before)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("edit", ["gain", "head gain"])
def test_windows_caps_and_sinks(kernels: Kernels, name: str, kind: str, side: str, edit: str) -> None:
    """Prefill and decode, in windows shorter than the prompt."""
    model, inputs = sliding(kind), padded(side)
    reference = "eager" if kind != "mistral" else "sdpa"
    with session_of(under(model, reference), EDITS[edit]):
        wanted = written(model, inputs)
    plain = written(under(model, name), inputs)
    kernels.calls.clear()
    with session_of(model, EDITS[edit]):
        found = written(model, inputs)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[-1], plain[-1], atol=1e-6)
    if edit == "head gain":
        windows = {call["window_size"] for call in kernels.calls}
        assert (WINDOW - 1, WINDOW - 1) in windows and all(
            bool(call["softcap"]) == (kind == "gemma2") for call in kernels.calls
        )


def test_chunks_and_static_caches(kernels: Kernels, name: str) -> None:
    model, inputs = tiny_llama(), padded("left")
    found = {}
    for implementation in ("sdpa", name):
        under(model, implementation)
        with session_of(model, EDITS["gain"]):
            for options in ({"prefill_chunk_size": 5}, {"cache_implementation": "static"}):
                generated = model.generate(
                    **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
                )
                found.setdefault(str(options), []).append(torch.stack(generated.logits))
    for wanted, other in found.values():
        torch.testing.assert_close(other, wanted, atol=1e-4, rtol=1e-4)


def test_rows_and_heads_that_no_edit_names_keep_their_bits(kernels: Kernels, name: str) -> None:
    model, inputs = under(tiny_llama(), name), padded("left")
    seen: list[Tensor] = []
    first = model.model.layers[0].self_attn
    handle = first.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))

    def second_row(call: Call) -> Gain:
        rows = torch.tensor([[False], [True]]).expand(2, call.num_queries)
        return Gain(columns=chosen(call), factor=0.2, rows=rows, heads=[3])

    with torch.no_grad():
        model(**inputs)
        with session_of(model, second_row):
            model(**inputs)
    handle.remove()
    plain, edited = (x.unflatten(-1, (4, 16)) for x in seen)
    assert torch.equal(plain[0], edited[0]) and torch.equal(plain[1, :, :3], edited[1, :, :3])
    assert not torch.equal(plain[1, :, 3], edited[1, :, 3])


def test_layers_without_a_session_and_switches_inside_one(kernels: Kernels, name: str) -> None:
    model = tiny_llama()
    with session_of(model, EDITS["gain"]):
        wanted = logits(model)
    table = reattend.sites(model)
    with attach(model, [Plan("test", [Edits(table[:1], EDITS["gain"])])]):
        logits(model)
        assert not kernels.calls
        under(model, name)
        logits(model)
        assert len(kernels.calls) == 2, "two layers of three have no edit"
        under(model, "sdpa")
        logits(model)
        assert len(kernels.calls) == 2
        under(model, name)
    assert model.config._attn_implementation == name and type(model.config._attn_implementation) is str
    with session_of(model, EDITS["gain"]):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
        assert under(copy.deepcopy(model), "sdpa") is not model


@pytest.mark.parametrize("some", [False, True])
def test_a_compiled_model(kernels: Kernels, name: str, some: bool) -> None:
    """All layers are edited, or one is and the others call the user's kernel inside the graph."""
    model = under(tiny_llama(), name)
    before = logits(model)

    def session() -> Any:
        table = reattend.sites(model)
        return attach(model, [Plan("test", [Edits(table[:1] if some else table, EDITS["gain"])])])

    with session():
        wanted = logits(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(logits(model), before)
    with session() as one:
        torch.testing.assert_close(logits(model), wanted)
        assert one.applied == (1 if some else 3)
    torch.testing.assert_close(logits(model), before)


# -- flex attention ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Flex attention without its compiler: the masks are transformers' own, and attention on them is computed in float64."""
    masks: list[Any] = []

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        masks.append(attention_mask)
        shared = query.shape[1] // key.shape[1]
        q, k, v = query.double(), key.double().repeat_interleave(shared, 1), value.double().repeat_interleave(shared, 1)
        scores = q @ k.transpose(-1, -2) * scaling
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        mod = attention_mask.mask_mod
        seen = [[[bool(mod(torch.tensor(b), torch.tensor(0), i, j)) for j in columns] for i in rows] for b in range(q.shape[0])]
        scores = scores.masked_fill(~torch.tensor(seen)[:, None], float("-inf"))
        return (scores.softmax(-1).nan_to_num() @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, FLEX, attention)
    monkeypatch.setattr(masking_utils, "create_block_mask", functools.partial(_uncompiled, masking_utils.create_block_mask))
    _lookup.cache_clear()
    yield masks
    _lookup.cache_clear()


def _uncompiled(make: Callable[..., Any], **options: Any) -> Any:
    return make(**options | {"_compile": False})


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_flex_attention(flex: list[Any], kind: str, side: str) -> None:
    model, inputs = tiny_llama() if kind == "llama" else sliding(kind), padded(side)
    with session_of(under(model, "eager"), EDITS["gain"]):
        wanted = written(model, inputs, 3)
    plain = written(under(model, FLEX), inputs, 3)
    with session_of(model, lambda call: HeadGain(factor=1.0)):
        assert torch.equal(written(model, inputs, 3), plain)
    flex.clear()
    with session_of(model, EDITS["gain"]):
        found = written(model, inputs, 3)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not flex and torch.equal(written(model, inputs, 3), plain) and model.config._attn_implementation == FLEX


def test_numbers_added_by_flex_attention() -> None:
    module, states = tiny_llama().model.layers[0].self_attn, [torch.randn(2, 4, 3, 16) for _ in range(3)]
    added, bias = torch.randn(2, 1, 3, 8), torch.randn(1, 4, 3, 8)
    assert flex_call(FLEX, module, *states, None, {}).mask is None
    assert torch.equal(flex_call(FLEX, module, *states, added, {"position_bias": bias}).mask, (added + bias)[..., :3])
    block = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 3, 3, device="cpu")
    call = flex_call(FLEX, module, *states, block, {"position_bias": bias})
    assert torch.equal(call.mask.isinf()[0, 0], torch.ones(3, 3).triu(1).bool()) and not call.is_causal


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_packed_sequences_are_refused_where_they_are_edited(kernels: Kernels, name: str) -> None:
    model = under(tiny_llama(), name)

    @contextmanager
    def refused() -> Iterator[None]:
        session = session_of(model)
        with pytest.raises(ReattendError, match="several sequences are packed in one row.*sdpa"):
            yield
        with pytest.warns(reattend.ReattendWarning, match="never acted"):
            session.remove()

    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[*range(7), *range(5)]])}
    with torch.no_grad():
        before = model(**packed).logits
        with refused():
            model(**packed)
        lengths = torch.tensor([0, 7, 12], dtype=torch.int32)
        further = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
        with refused():
            model(**packed, **further)
        shifted = {"input_ids": IDS[:1], "position_ids": torch.arange(12)[None] + 3}
        with session_of(model):
            model(**shifted)
        assert torch.equal(model(**packed).logits, before)


def test_images_packed_in_one_row_are_refused_at_apply(kernels: Kernels, name: str) -> None:
    tiny = asked_images.build("qwen2_5_vl")
    under(tiny.model, name)
    table = reattend.sites(tiny.model)
    with pytest.raises(UnsupportedError, match=f"visual.*{name}.*packed in one row, which cannot be edited: call model.set"):
        attach(tiny.model, [Plan("test", [Edits(table.stack("vision"), EDITS["gain"])])])
    with attach(tiny.model, [Plan("test", [Edits(table.stack("decoder"), EDITS["gain"])])]):
        assert tiny.model.config.get_text_config()._attn_implementation.endswith(f"_{name}")


@pytest.mark.parametrize("other", ["paged|flash_attention_2", "my_flash_attention", "my_flex_attention"])
def test_other_implementations_keep_the_one_error(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "my_flash_attention", AttentionMaskInterface._global_mapping["sdpa"]
    )
    model = under(tiny_llama(), other)
    before = traces(model)
    with pytest.raises(
        UnsupportedError, match=r'self_attn runs .*cannot be edited: call model.set_attn_implementation\("sdpa"\)'
    ):
        session_of(model)
    assert traces(model) == before


def test_a_mask_of_another_form_is_an_error() -> None:
    module = tiny_llama().model.layers[0].self_attn
    states = [torch.randn(2, 4, 3, 16) for _ in range(3)]
    with pytest.raises(ReattendError, match=r"expected a mask \[batch, keys\] or none, got .*2, 1, 3, 3"):
        flash_call("flash_attention_2", module, *states, torch.ones(2, 1, 3, 3), {})


def test_layers_share_what_a_mask_leaves() -> None:
    module, states = tiny_llama().model.layers[0].self_attn, [torch.randn(2, 4, 3, 16) for _ in range(3)]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    first, again, window = (
        flash_call("flash_attention_2", module, *states, mask, {"sliding_window": w}).mask for w in (None, 8, 2)
    )
    assert first is again and window.shape == (2, 1, 3, 3)
    mask[1, 0] = 0
    assert not flash_call("flash_attention_2", module, *states, mask, {}).mask[1, 0, 0, 0]
    gone = weakref.ref(mask)
    del mask
    assert gone() is None


def test_states_in_float32_are_cast_as_flash_attention_casts_them() -> None:
    module = tiny_llama().bfloat16().model.layers[0].self_attn
    states = [torch.randn(2, 4, 3, 16) for _ in range(3)]
    assert flash_call("flash_attention_2", module, *states, None, {}).query.dtype == torch.bfloat16
    whole = tiny_llama().model.layers[0].self_attn
    assert flash_call("flash_attention_2", whole, *states, None, {}).query.dtype == torch.float32


def test_the_users_function_sees_the_module_as_outside_of_sessions() -> None:
    module = tiny_llama().model.layers[0].self_attn
    own = module.config._attn_implementation
    (seen,) = from_outside("flash_attention_2", lambda *given: given)(module)
    assert seen.config._attn_implementation == "flash_attention_2" and module.config._attn_implementation == own
    assert (
        seen.layer_idx == 0
        and seen.is_causal
        and seen.config.hidden_size == 64
        and list(seen.modules()) == list(module.modules())
    )
    assert from_outside("sdpa", logits) is logits
