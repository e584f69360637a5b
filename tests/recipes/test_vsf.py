"""VSF: what its card says of one call, whole denoisers against the authors' appended copy, and the texts of pipelines."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import reattend
import torch
from examples.nag import saved
from examples.vsf import called
from reattend.hooks import Context, Plan, attach
from reattend.hooks.prompts.second_text import encoded
from reattend.interventions import Keep, ReattendError, fused, reference
from reattend.recipes.kit.second_texts import text_sites
from tiny_denoisers import TEXT, build
from tiny_runs import draw, stable_diffusion, stable_diffusion_3
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

IMAGE, POSITIVE, NEGATIVE = 100, 6, 4
VSF = reattend.recipe("vsf", negative="a dog")


def operands(kind: str, seed: int = 0, loud: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value; loud multiplies the negative's keys."""
    torch.manual_seed(seed)
    keys = POSITIVE + NEGATIVE + (IMAGE if kind == "joint" else 0)
    queries = keys if kind == "joint" else IMAGE
    query, key, value = torch.randn(2, 3, queries, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)
    key[:, :, -NEGATIVE:] *= loud
    return query, key, value


def asked(kind: str, scale: float, offset: float, **more: Any) -> tuple[Any, list[Any]]:
    facts = {"kind": kind, "image_length": str(IMAGE), "negative_length": str(NEGATIVE)}
    return called(VSF, *operands(kind, **more), facts, scale, offset)


def both(kind: str, scale: float, offset: float, **more: Any) -> Tensor:
    call, edits = asked(kind, scale, offset, **more)
    found, wanted = fused(call, edits), reference(call, edits)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    return found


def visible(kind: str) -> Tensor:
    """Bool [Tq, Tk]: who sees whom, by the card's table."""
    keys = POSITIVE + NEGATIVE + (IMAGE if kind == "joint" else 0)
    seen = torch.ones(keys if kind == "joint" else IMAGE, keys, dtype=torch.bool)
    if kind == "joint":
        seen[IMAGE : IMAGE + POSITIVE, -NEGATIVE:] = False
        seen[-NEGATIVE:, IMAGE : IMAGE + POSITIVE] = False
    return seen


# -- one call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_what_the_card_says_of_a_call(kind):
    call, _ = asked(kind, 1.0, 0.0)
    kept = Keep(pattern=visible(kind))
    plain, once, off = both(kind, -1.0, 0.0), both(kind, 1.0, 0.3), both(kind, 0.0, 0.3)
    torch.testing.assert_close(plain, reference(call, [kept]), atol=1e-5, rtol=1e-5)
    # linear in the scale
    torch.testing.assert_close(both(kind, 3.0, 0.3), off + 3 * (once - off), atol=1e-5, rtol=1e-4)
    # scale 0 takes the negative out of the sum, not out of the denominator
    alone = visible(kind)
    alone[:IMAGE, -NEGATIVE:] = False
    hidden = reference(call, [Keep(pattern=alone)])
    assert (off - hidden)[:, :, :IMAGE].abs().max() > 1e-3
    torch.testing.assert_close(both(kind, 3.0, 60.0), hidden, atol=1e-5, rtol=1e-5)
    # the text's rows know of neither
    assert torch.equal(both(kind, 3.0, 0.0)[:, :, IMAGE:], both(kind, 5.0, 0.7)[:, :, IMAGE:])
    # by hand, with weights
    query, key, value = operands(kind)
    bias = torch.zeros(visible(kind).shape)
    bias[:IMAGE, -NEGATIVE:] = -0.3
    weights = (query @ key.transpose(2, 3) / 4 + bias).masked_fill(~visible(kind), -math.inf).softmax(dim=-1)
    weights[:, :, :IMAGE, -NEGATIVE:] *= -3
    torch.testing.assert_close(both(kind, 3.0, 0.3), weights @ value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cross", "joint"])
@pytest.mark.parametrize("loud", [5.0, 20.0])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_a_negative_that_takes_the_whole_row(kind, loud, scale):
    """A column may hold all weight, to the last bit of it: nothing is divided by what is left."""
    call, edits = asked(kind, scale, 0.1, loud=loud)
    scores = (call.query @ call.key.transpose(2, 3) / 4)[:, :, :IMAGE]
    assert scores.softmax(dim=-1)[..., -NEGATIVE:].sum(dim=-1).max() > 0.99999
    largest = call.value.abs().max() * max(1, scale)
    for given in (edits, edits[-1:]):
        assert (fused(call, given) - reference(call, given)).abs().max() < 1e-5 * largest


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_no_way_holds_all_pairs(kind):
    call, edits = asked(kind, 3.0, 0.3)
    call.ways = Counter()
    fused(call, edits)
    assert set(call.ways) == {"columns"}


def test_the_offset_is_not_rounded():
    """0.08 is 0.0801 in bfloat16, whose rows are then off by more than the product's own rounding."""
    facts = {"kind": "cross", "negative_length": str(NEGATIVE)}
    query, key, value = (t.bfloat16() for t in operands("cross"))
    (bias, _) = called(VSF, query, key, value, facts, 3.0, 0.08)[1]
    assert bias.bias.dtype == torch.float32 and float(bias.bias.min()) == pytest.approx(-0.08, abs=1e-8)
    facts |= {"kind": "joint", "image_length": str(IMAGE)}
    (bias, _) = called(VSF, *(t.bfloat16() for t in operands("joint")), facts, 3.0, 0.08)[1]
    assert bias.U.dtype == bias.V.dtype == torch.float32


# -- whole denoisers ---------------------------------------------------------------------------------------------------


class Official(TorchFunctionMode):
    """Attention of `tokens` tokens with the last negative's keys and values appended, flipped, and seen as the authors' mask says."""

    def __init__(self, tokens: int, image: slice, negative: slice, scale: float, offset: float) -> None:
        super().__init__()
        self.tokens, self.image, self.negative, self.scale, self.offset = tokens, image, negative, scale, offset

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
        if query.shape[2] != self.tokens:
            return func(*args, **kwargs)
        n, length = self.tokens, self.negative.stop - self.negative.start
        places = torch.arange(n)
        image = (places >= self.image.start) & (places < self.image.stop)
        negative = (places >= self.negative.start) & (places < self.negative.stop)
        prompt = ~image & ~negative
        seen = torch.zeros(n, n + length, dtype=torch.bool)
        seen[:, :n] = (
            image | (prompt[:, None] & ~negative[:, None] & prompt) | (image[:, None] & prompt) | (negative[:, None] & negative)
        )
        seen[image, n:] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        mask[image, n:] -= self.offset
        key = torch.cat([key, key[:, :, self.negative]], dim=2)
        value = torch.cat([value, -self.scale * value[:, :, self.negative]], dim=2)
        return func(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("rows", ["pipeline", "script"])
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "SD3Transformer2DModel (3.5)", "FluxTransformer2DModel"])
def test_a_denoiser_gives_what_an_appended_copy_gives(name, rows):
    model, inputs = build(name)
    negative = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
    copies, text = (2 if rows == "pipeline" else 1), inputs["encoder_hidden_states"]
    longer = {**inputs, "encoder_hidden_states": torch.cat([text, *[negative.expand(2, -1, -1)] * copies], dim=1)}
    if "txt_ids" in inputs:
        longer["txt_ids"] = torch.zeros(TEXT + 3 * copies, 3)
    tokens = 16 + TEXT + 3 * copies
    first = name.startswith("SD3")
    image = slice(0, 16) if first else slice(tokens - 16, tokens)
    last = slice(tokens - 3, tokens) if first else slice(tokens - 19, tokens - 16)
    with torch.no_grad(), Official(tokens, image, last, 3.3, 0.2):
        wanted = model(**longer)[0]
    path = saved(f"vsf {rows} {name}", {"prompt_embeds": negative})
    with torch.no_grad(), reattend.apply(model, "vsf", tensors=path, scale=3.3, offset=0.2, text_rows=rows):
        torch.testing.assert_close(model(**inputs)[0], wanted, atol=2e-5, rtol=1e-4)


def test_maps_of_it_are_signed():
    """Where values are taken away: below 0, and counted as such; other numbers of a reading stay finite."""
    model, inputs = build("UNet2DConditionModel")
    path = saved("vsf maps", {"prompt_embeds": torch.randn(1, 3, 8)})
    with reattend.apply(model, "vsf", tensors=path, scale=2.0), reattend.capture(model, maps=[0]) as seen, torch.no_grad():
        model(**inputs)
    name = next(site.name for site in text_sites(reattend.sites(model)))
    (reading,) = seen.readings[name]
    assert (reading.maps[0][..., TEXT:] < 0).all() and (reading.maps[0][..., :TEXT] > 0).all()
    assert reading.entropy.isfinite().all() and reading.mass["text"].max() < 1


DEFAULTS = {
    "SD3Transformer2DModel": (3.0, 0.08),
    "FluxTransformer2DModel": (6.0, 0.0),
    "WanTransformer3DModel": (1.7, 0.2),
    "UNet2DConditionModel": (1.7, 0.2),
    "AuraFlowTransformer2DModel": (3.0, 0.08),
}


@pytest.mark.filterwarnings("ignore:recipe .* never acted")
def test_defaults_are_those_of_the_model(monkeypatch):
    path, found = saved("vsf default", {"prompt_embeds": torch.randn(1, 3, 8)}), {}

    def flip(self: Any, call: Any, text: Any, *numbers: float) -> list[Any]:
        found[name] = numbers
        return []

    monkeypatch.setattr(type(VSF), "flip", flip)
    for name in DEFAULTS:
        model, inputs = build(name)
        with reattend.apply(model, "vsf", tensors=path), torch.no_grad():
            model(**inputs)
    assert found == DEFAULTS


# -- texts of pipelines --------------------------------------------------------------------------------------------------


def columns_of(pipe: Any, call: dict[str, Any], texts: Any, **given: Any) -> list[list[int]]:
    """How many columns each row of the first call has of its second text."""
    found: list[list[int]] = []

    def use(at, text):
        found.append(text.columns.sum(dim=1).tolist())

    with attach(
        pipe, [Plan("look", [Context("look", text_sites(reattend.sites(pipe)), use, texts=texts, place="after", **given)])]
    ):
        draw(pipe, call, num_inference_steps=1)
    return found[:1]


@pytest.mark.filterwarnings("ignore:recipe .* never acted")
def test_a_text_has_its_own_length_whatever_the_pipeline_fills_up():
    """A letter is a token here; with them a start and an end."""
    pipe, call, _, _ = stable_diffusion(guidance=1.0)
    assert encoded(pipe, ["dog"]).embeds.shape[1] == 64
    assert columns_of(pipe, call, "dog") == [[5, 5]]
    assert columns_of(pipe, call, ["dog", "apple"]) == [[5, 7]]
    assert columns_of(pipe, call, ["dog", ""]) == [[5, 0]]
    pipe, call, _, _ = stable_diffusion_3(guidance=1.0)
    assert columns_of(pipe, call, "dog", copies=2) == [[5]]


def test_the_longest_text_rules_no_other():
    """The picture of a prompt is the same beside one with a longer negative text, and with none is the untouched one."""
    for pipe, call, _, _ in (stable_diffusion(guidance=1.0), stable_diffusion_3(guidance=1.0)):
        call = {**call, "prompt": ["a fox", "a map"]}
        base = draw(pipe, call)
        pictures = {}
        for name, texts in {"both": ["dog", "a large tree"], "one": ["dog", ""], "same": "dog"}.items():
            with reattend.apply(pipe, "vsf", negative=texts, scale=6.0, offset=-0.5):
                pictures[name] = draw(pipe, call)
        assert (pictures["both"] - base).flatten(1).abs().amax(dim=1).min() > 1e-4
        near = {"atol": 2e-4, "rtol": 1e-3}
        torch.testing.assert_close(pictures["both"][0], pictures["one"][0], **near)
        torch.testing.assert_close(pictures["same"][0], pictures["one"][0], **near)
        if "unet" in pipe.components:  # in joint attention an empty text's place is still there, seen by nobody
            torch.testing.assert_close(pictures["one"][1], base[1], **near)


def test_an_empty_text_is_no_change():
    pipe, call, _, _ = stable_diffusion_3(guidance=1.0)
    base = draw(pipe, call)
    for texts in ("", " ", ["", ""]):
        with reattend.apply(pipe, "vsf", negative=texts) as session:
            assert torch.equal(draw(pipe, call), base)
        assert session.applied == 0


def test_an_image_prompt_in_wan_leaves_no_place():
    from tiny_streams import STREAMS

    model, _ = build("WanTransformer3DModel (image)", among=STREAMS)
    path = saved("vsf wan", {"prompt_embeds": torch.randn(1, 3, 8)})
    with pytest.raises(ReattendError, match="takes the last 512 tokens for the text"):
        reattend.apply(model, "vsf", tensors=path)
