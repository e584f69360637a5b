"""Backward through a model under a recipe gives the slope of the steered loss: what a recipe chooses is constant, what it weighs is not."""

from __future__ import annotations

import copy

import pytest
import reattend
import tiny_models
import torch
from asked_images import ONE
from asked_images import tokenizer as image_tokenizer
from matrix_models import Case, cases

pytestmark = pytest.mark.filterwarnings("ignore:the borders of the segments")

# Norms and angles of the models are float32 also in float64 models: smaller steps show their rounding.
STEP = 2e-5


def slopes(model, inputs, attach) -> tuple[float, float]:
    """(by backward, by differences) of the last row's logits along one random direction of the embeddings."""
    weight = model.get_input_embeddings().weight
    torch.manual_seed(1)
    along, cotangent = torch.nn.functional.normalize(torch.randn_like(weight), dim=-1), None
    values = {}
    for step in (0.0, STEP, -STEP):
        with torch.no_grad():
            weight += step * along
        with attach() as session:
            with torch.set_grad_enabled(step == 0):
                logits = model(**inputs).logits[:, -1]
                cotangent = torch.randn_like(logits) if cotangent is None else cotangent
                values[step] = (logits * cotangent).sum()
            assert session.applied
        if step == 0:
            (slope,) = torch.autograd.grad(values[step], weight)
        with torch.no_grad():
            weight -= step * along
    return float((slope * along).sum()), float((values[STEP] - values[-STEP]) / (2 * STEP))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "model", "kind"), cases("gradients", llm=["Llama"]))
def test_language_methods(name, model, kind, implementation):
    case = Case(name, model, kind)
    if "prefill" not in case.example.acts:
        return
    case.model = copy.deepcopy(case.model).double()
    for layer in case.model.model.layers:  # differences want slopes that do not turn at once
        layer.self_attn.q_proj.weight.data /= 30
    case.model.set_attn_implementation(implementation)
    for more in ({}, {"output_attentions": True}) if implementation == "eager" else ({},):
        got, wanted = slopes(case.model, case.inputs([0]) | more, lambda: case.apply([0]))
        assert got == pytest.approx(wanted, rel=5e-3, abs=0.05)


@pytest.mark.parametrize("probed", [False, True])
def test_gift_weighs_what_it_has_seen(probed):
    """Its factors grow with what earlier layers looked at, so their slope is part of the loss's."""
    tiny = tiny_models.llava()
    model = tiny.model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs([ONE, ONE]).items()}
    layers = dict(saliency_layers=[2], enhance_layers=[1, 3]) if probed else dict(saliency_layers=[0, 1], enhance_layers=[2, 3])
    got, wanted = slopes(model, inputs, lambda: reattend.apply(model, "gift", **layers, alpha=3.0, tokenizer=image_tokenizer()))
    assert got == pytest.approx(wanted, rel=5e-3, abs=0.05)
