"""Chosen tokens of an image leave a decoder in mid-stack: the same answers as if they were hidden there (the two forms of FastV)."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from reattend.hooks import Capture, Edits, Exit, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_of
from reattend.interventions import KeyBias, ReattendError, UnsupportedError, row_weights

PROMPTS = [[1, 5, 6, "image", 7, 8], [1, 9, "image", 10, 11, 12, "image", 13], [1, 14, 15]]
HOW = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def least(weights, image):
    """Bool [B, n]: the half of each row's image tokens that its last row looks at least."""
    chosen = torch.zeros_like(image)
    for row in range(len(image)):
        places = image[row].nonzero()[:, 0]
        chosen[row, places[weights[row, places].argsort()[: len(places) // 2]]] = True
    return chosen


def last_row(call, edits):
    if call.clock.phase == "prefill":
        call.memory["row"] = row_weights(call, edits, torch.tensor([call.num_queries - 1]))[:, :, 0].mean(dim=1)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_chosen_tokens_leave_as_if_they_were_hidden(family):
    tiny = tiny_models.build(family)
    model, inputs = tiny.model, tiny.inputs(PROMPTS)
    how = {**HOW, "suppress_tokens": [tiny_models.IMAGE]}
    decoder = sites(model).stack("decoder").kind("self")
    look, width = Capture(decoder.layers(1, 1), last_row), inputs["input_ids"].shape[1]
    left = []

    def chosen(passing):
        image = passing.tokens.positions("image", 0, passing.hidden.shape[1])
        left.append(least(passing.memory["row"], image))
        return left[-1]

    def hide(call):
        image = call.tokens.positions("image", 0, width)
        gone = torch.nn.functional.pad(least(call.memory["row"], image), (0, call.num_keys - width))
        return KeyBias(bias=torch.where(gone, -1e4, 0.0)[:, None])

    plain = model.generate(**dict(inputs), **how)
    with attach(model, [Plan("leave", [look, Exit(decoder.layers(2), ["image"], chosen=chosen)])]) as session:
        out = model.generate(**dict(inputs), **how)
    with attach(model, [Plan("hide", [look, Edits(decoder.layers(2), hide)])]):
        hidden = model.generate(**dict(inputs), **how)
    got, wanted = torch.stack(out.logits), torch.stack(hidden.logits)
    possible = got > -900
    torch.testing.assert_close(got[possible], wanted[possible], atol=1e-4, rtol=1e-4)
    assert (got - torch.stack(plain.logits))[possible].abs().max() > 1e-4
    assert session.stats["leave"] == {site.name: 1 for site in decoder.layers(2)}
    # padding leaves too: the longest row says how many are kept
    stay = int((~left[0] & inputs["attention_mask"].bool()).sum(dim=1).max())
    assert [layer.keys.shape[2] for layer in cache_of(out).layers] == [width + 2] * 2 + [stay + 2] * 2
    assert torch.equal(torch.stack(model.generate(**dict(inputs), **how).logits), torch.stack(plain.logits))


def test_where_none_is_chosen_no_bit_changes():
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:1])
    decoder = sites(model).stack("decoder").kind("self")
    plain = model(**inputs).logits
    none = Exit(decoder.layers(2), ["image"], chosen=lambda passing: torch.zeros(passing.hidden.shape[:2], dtype=torch.bool))
    session = attach(model, [Plan("none", [none])])
    assert torch.equal(model(**inputs).logits, plain) and session.applied == 0
    session.__exit__(ValueError, None, None)


def test_refused():
    tiny = tiny_models.build("llava")
    model, inputs = tiny.model, tiny.inputs(PROMPTS[:1])
    table, decoder = sites(model), sites(model).stack("decoder").kind("self")
    for roles in ("image", []):
        with pytest.raises(ReattendError, match="roles is a list of at least one role"):
            Exit(decoder.layers(2), roles)
    for some in (decoder.only([1, 3]), decoder.layers(0, 2), table, decoder[::-1]):
        with pytest.raises(UnsupportedError, match="are not all layers of the decoder from one on"):
            attach(model, [Plan("x", [Exit(some, ["image"])])])
    plain, width = model(**inputs).logits, inputs["input_ids"].shape[1]
    for answer in (None, [True] * width, torch.ones(1, width), torch.ones(1, 3, dtype=torch.bool)):
        step = Exit(decoder.layers(2), ["image"], chosen=lambda passing, answer=answer: answer)
        with pytest.raises(ReattendError, match=rf"chosen answered .*bool \[1, {width}\]"), attach(model, [Plan("x", [step])]):
            model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)
