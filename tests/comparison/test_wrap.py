"""A wrapped object is still what it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import reattend
import torch
from reattend.comparison.wrap import Wrapped
from transformers import LlamaForCausalLM, Pipeline


def test_a_wrapped_pipeline_is_that_pipeline(text_pipe):
    before = dict(text_pipe.__dict__)
    wrapped = reattend.wrap(text_pipe)
    assert isinstance(wrapped, type(text_pipe)) and isinstance(wrapped, Pipeline) and isinstance(wrapped, Wrapped)
    assert type(wrapped).__name__ == type(text_pipe).__name__ and type(wrapped).__module__ == type(text_pipe).__module__
    assert wrapped.__dict__ is text_pipe.__dict__ and wrapped.model is text_pipe.model
    assert text_pipe.__dict__ == before and not isinstance(text_pipe, Wrapped)
    options = dict(max_new_tokens=4, do_sample=False)
    assert wrapped("the red dog", **options) == text_pipe("the red dog", **options)
    assert reattend.wrap(wrapped) is wrapped
    assert len(wrapped.sites()) == 2


def test_use_steers_and_restores(text_pipe):
    ids = torch.arange(5, 25)[None]
    wrapped = reattend.wrap(text_pipe)
    plain = text_pipe.model(ids).logits
    with wrapped.use("streaming", sinks=1, window=3) as session:
        inside = text_pipe.model(ids).logits
    assert session.stats == {"streaming": {"model.layers.0.self_attn": 1, "model.layers.1.self_attn": 1}}
    assert not torch.equal(plain, inside)
    assert torch.equal(plain, text_pipe.model(ids).logits)


def test_a_wrapped_model_and_its_original_are_one_to_sessions(llama):
    ids = torch.arange(5, 25)[None]
    wrapped = reattend.wrap(llama)
    assert isinstance(wrapped, LlamaForCausalLM)
    plain = llama(ids).logits
    with reattend.apply(llama, "streaming", sinks=1, window=3):
        once = llama(ids).logits
        assert torch.equal(once, wrapped(ids).logits)
        with wrapped.use("streaming", sinks=1, window=2) as inner:
            both = wrapped(ids).logits
            assert torch.equal(both, llama(ids).logits)
        assert inner.applied == 4
        assert torch.equal(once, wrapped(ids).logits)
    with reattend.apply(wrapped, "streaming", sinks=1, window=3) as session:
        assert torch.equal(once, llama(ids).logits)
    assert session.applied == 2
    assert torch.equal(plain, wrapped(ids).logits) and torch.equal(plain, llama(ids).logits)
    assert not llama._forward_pre_hooks and not llama._forward_hooks


def test_generate_and_moves_are_shared(llama):
    wrapped = reattend.wrap(llama)
    ids = torch.arange(5, 12)[None]
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(wrapped.generate(ids, **options), llama.generate(ids, **options))
    wrapped.to(torch.float64)
    assert llama.dtype == torch.float64 and llama.state_dict().keys() == wrapped.state_dict().keys()


def test_copies_and_pickles_are_wrapped_again(llama):
    wrapped = reattend.wrap(llama)
    ids = torch.arange(5, 12)[None]
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert isinstance(other, Wrapped) and isinstance(other, LlamaForCausalLM)
        assert other.lm_head is not llama.lm_head
        assert torch.equal(other(ids).logits, llama(ids).logits)
        with other.use("streaming", sinks=1, window=2):
            changed = other(ids).logits
            assert not torch.equal(changed, llama(ids).logits)
    shallow = copy.copy(wrapped)
    assert isinstance(shallow, Wrapped) and shallow.__dict__ is not llama.__dict__ and shallow.lm_head is llama.lm_head


def test_a_diffusers_pipeline_keeps_its_class(image_pipe, tmp_path):
    wrapped = reattend.wrap(image_pipe)
    assert isinstance(wrapped, type(image_pipe)) and wrapped.unet is image_pipe.unet
    assert wrapped.components.keys() == image_pipe.components.keys()
    assert any(site.stack.startswith("denoiser") for site in wrapped.sites())
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").read_text().count("StableDiffusionPipeline") == 1


def test_what_cannot_be_wrapped():
    with pytest.raises(reattend.ReattendError, match="expected a transformers model or pipeline"):
        reattend.wrap("gpt2")

    class Own(torch.nn.Linear):
        def compare(self):
            return None

    with pytest.raises(reattend.ReattendError, match="Own has its own compare"):
        reattend.wrap(Own(2, 2))
