"""The architecture matrix: every causal language model of transformers that builds from a small configuration, checked the same way.

    python tests/architectures.py               # runs all and writes docs/support.json and docs/support.md
    python tests/architectures.py llama gptj    # runs these anew (with the versions on record) and keeps the others' rows

`check` attaches, passes through bit-identically, applies one edit and compares it with the reference executor, and detaches.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import support_page
import torch
from reattend.hooks import Edits, Plan, attach, sites, steering
from reattend.interventions import ReattendWarning, Transfer, reference
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LARGEST = 30_000_000

SMALL = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_layer=2, n_head=4, n_embd=64, n_positions=64, d_model=64,
    ffn_dim=64, word_embed_proj_dim=64, n_shared_experts=1, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
    encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, n_inner=64, rotary_dim=8, shared_expert_intermediate_size=32,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
# a second and third try for configurations that the first does not fit: more layers for hybrids, one head size for latent attention
RETRIES = (
    {},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 8},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16},
    {"drop": ("head_dim", "v_head_dim")},
    {"num_hidden_layers": 4, "drop": ("layer_types",), "num_key_value_heads": 4},
)


def model_types() -> list[str]:
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def build(model_type: str) -> torch.nn.Module:
    """A random model of this type with small settings. Raises the last error if none of the settings fit."""
    error: Exception | None = None
    for retry in RETRIES:
        try:
            cls = CONFIG_MAPPING[model_type]
            known = cls()
            settings = {**SMALL, **{k: v for k, v in retry.items() if k != "drop"}}
            config = cls(**{k: v for k, v in settings.items() if hasattr(known, k) and k not in retry.get("drop", ())})
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} M parameters even with small settings")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                model(inputs())
            return model
        except Exception as caught:
            error = caught
    assert error is not None
    raise error


def inputs() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    # some models route tokens with random noise
    torch.manual_seed(0)
    with torch.no_grad():
        return model(inputs()).logits


def drop_first(call) -> Transfer:
    return Transfer(source=[0], strength=0.7)


def check(model: torch.nn.Module) -> dict:
    """What was found and verified on one model; raises AssertionError where a promise is broken."""
    table = sites(model)
    usable = table.where(lambda s: s.problem is None and s.stack == "decoder" and s.kind == "self")
    result = {
        "sites": len(table),
        "edited": len(usable),
        "problems": sorted({s.problem for s in table.problems}),
        "routes": sorted({s.route for s in usable}),
    }
    if not len(usable):
        return result
    before = logits(model)
    assert torch.equal(logits(model), before), "the model itself is not deterministic"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReattendWarning)
        with attach(model, [Plan("nothing", [Edits(usable, lambda call: None)])]):
            assert torch.equal(logits(model), before), "pass-through is not bit-identical"
    with attach(model, [Plan("edit", [Edits(usable, drop_first)])]) as session:
        edited = logits(model)
    assert set(session.stats["edit"]) == {s.name for s in usable}, "the edit did not act at every site"
    assert not torch.equal(edited, before), "the edit changed nothing"
    fused = steering.fused_as_it_is
    try:
        steering.fused_as_it_is = reference
        with attach(model, [Plan("edit", [Edits(usable, drop_first)])]):
            expected = logits(model)
    finally:
        steering.fused_as_it_is = fused
    torch.testing.assert_close(edited, expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(logits(model), before), "detaching did not restore the model"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks are left"
    return result


def record(chosen: list[str]) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for model_type in chosen:
        try:
            model = build(model_type)
        except Exception as error:
            first = str(error).strip().split("\n")[0][:120]
            rows[model_type] = {"status": "not built", "reason": f"{type(error).__name__}: {first}"}
            continue
        try:
            found = check(model)
            rows[model_type] = {"status": "verified" if found["edited"] else "refused", "class": type(model).__name__, **found}
        except Exception as error:
            first = str(error).strip().split("\n")[0][:160]
            rows[model_type] = {"status": "failed", "class": type(model).__name__, "reason": f"{type(error).__name__}: {first}"}
        print(model_type, rows[model_type]["status"], rows[model_type].get("reason", ""), file=sys.stderr, flush=True)
    return rows


def versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def main(chosen: list[str]) -> None:
    kept: dict[str, dict] = {}
    if chosen:
        before = json.loads(support_page.MODELS.read_text())
        if {name: before[name] for name in versions()} != versions():
            raise SystemExit("the record is of other versions: run all")
        kept = before["models"]
    rows = kept | record(chosen or model_types())
    support_page.MODELS.write_text(json.dumps({**versions(), "models": dict(sorted(rows.items()))}, indent=1) + "\n")
    support_page.write()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
