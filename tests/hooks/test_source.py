"""What is decided by reading code, on the libraries' own classes: where one of these is written anew, the row shows which fact has moved."""

from __future__ import annotations

import ast
import functools
import importlib

import pytest
import torch
from reattend.hooks.routes.interface import _lookup
from reattend.hooks.sites.projections import _before_rotary
from reattend.hooks.sites.rotary import _changed_after, _rope_call
from reattend.hooks.sites.source import source_of


def cls(model: str, name: str):
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


# (class, where its softmax is: a name in its forward)
DISPATCHED = [
    ("llama", "LlamaAttention", "ALL_ATTENTION_FUNCTIONS"),
    ("gpt2", "GPT2Attention", "ALL_ATTENTION_FUNCTIONS"),
    ("clip", "CLIPAttention", "ALL_ATTENTION_FUNCTIONS"),
]
# (class, its key norm, whether that comes before RoPE; None where its forward shows no such norm, so that one on a module is refused)
NORMS = [
    ("qwen3", "Qwen3Attention", "k_norm", True),
    ("gemma3", "Gemma3Attention", "k_norm", True),
    ("olmo2", "Olmo2Attention", "k_norm", True),
    ("hunyuan_v1_dense", "HunYuanDenseV1Attention", "key_layernorm", False),
    ("llama", "LlamaAttention", "k_norm", None),
]
# (class, whether queries and keys are turned by one call of the usual form and stay as they are after it)
TURNED = [
    ("llama", "LlamaAttention", True),
    ("qwen3", "Qwen3Attention", True),
    ("phi", "PhiAttention", True),
    ("hunyuan_v1_dense", "HunYuanDenseV1Attention", False),
    ("gpt2", "GPT2Attention", False),
]


@pytest.mark.parametrize(("model", "name", "used"), DISPATCHED)
def test_where_attention_is_dispatched(model, name, used):
    assert used in source_of(cls(model, name).forward).names


@pytest.mark.parametrize(("model", "name", "norm", "before"), NORMS)
def test_which_norms_come_before_positions(model, name, norm, before):
    assert _before_rotary(cls(model, name), norm) is before


@pytest.mark.parametrize(("model", "name", "plain"), TURNED)
def test_which_classes_turn_queries_and_keys_in_the_usual_way(model, name, plain):
    call = _rope_call(cls(model, name))
    assert (call is not None and not _changed_after(cls(model, name), call)) is plain


@pytest.mark.parametrize(
    ("model", "name"), [("llama", "LlamaAttention"), ("gemma3", "Gemma3Attention"), ("clip", "CLIPAttention")]
)
def test_the_eager_function_that_a_class_would_call(model, name):
    assert _lookup("eager", cls(model, name)).__name__ == "eager_attention_forward"


def test_wrapped_functions_and_functions_without_code():
    def inner(x):
        return [torch.softmax(y, -1) for y in x]

    @functools.wraps(inner)
    def outer(*args):
        return inner(*args)

    read = source_of(outer)
    assert "softmax" in read.names and any(isinstance(node, ast.ListComp) for node in ast.walk(read.tree))
    builtin = source_of(torch.softmax)
    assert not builtin.names and not builtin.order and not list(ast.iter_child_nodes(builtin.tree))
