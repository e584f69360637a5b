"""A tiny language model, and what a session might leave behind on it."""

from __future__ import annotations

import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import HeadGain, Transfer
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

IDS = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def tiny_llama(config: LlamaConfig | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=63,
    )  # fmt: skip
    return LlamaForCausalLM(config or made).eval()


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def halve(call):
    return HeadGain(factor=0.5)


def drop_first(call):
    return Transfer(source=[0], strength=0.9)


def session_of(model, intervention=halve, label="test", **options):
    return attach(model, [Plan(label, [Edits(sites(model), intervention)])], **options)


def registered() -> list[str]:
    return sorted(AttentionInterface._global_mapping) + sorted(AttentionMaskInterface._global_mapping)


def hooks_on(model) -> int:
    """Entries in all the dicts that torch keeps of a module's forward hooks."""
    names = (
        "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )  # fmt: skip
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def traces(model) -> tuple:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    names = [
        (str(c._attn_implementation), type(c._attn_implementation))
        for c in configs.values()
        if hasattr(c, "_attn_implementation")
    ]
    return hooks_on(model), names, registered(), len(torch.overrides._get_current_function_mode_stack())
