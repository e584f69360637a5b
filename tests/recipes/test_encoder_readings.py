"""What selective-emphasis reads in the vision encoder belongs to the prompt that follows; and its shares by head to their own row."""

from __future__ import annotations

import copy

import pytest
import reattend
import tiny_models
import torch

FEW = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
PROMPT = [[1, 50, "image", 5, 6, 7, 8, 9, 51]]


def logits(model, inputs, **more):
    return torch.stack(model.generate(**copy.copy(inputs), **{**FEW, **more}).logits, dim=1)


def steer(model, **more):
    return reattend.apply(model, "selective-emphasis", first_layer=1, local_share=0.5, **more)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_previews_and_failed_calls_leave_nothing(family):
    tiny = tiny_models.build(family)
    model, inputs = tiny.model, tiny.inputs(PROMPT)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}

    def fails(*_):
        raise RuntimeError("out of memory")

    with steer(model) as session:
        wanted, passed = logits(model, inputs), model(**inputs).logits
        for spoil in ("preview", "pass", "generate"):
            if spoil == "preview":
                other = {**pixels, "pixel_values": pixels["pixel_values"].flip(0, -1)}
                model.get_image_features(**other)
            else:
                handle = model.model.language_model.layers[0].register_forward_pre_hook(fails)
                with pytest.raises(RuntimeError, match="out of memory"):
                    logits(model, inputs) if spoil == "generate" else model(**inputs)
                handle.remove()
            before = session.applied
            assert torch.equal(model(**inputs).logits, passed) and session.applied > before, spoil
            assert torch.equal(logits(model, inputs), wanted), spoil
        # beams and several answers repeat the prompt, not the image
        model.get_image_features(**pixels)
        beams = model.generate(**copy.copy(inputs), **{**FEW, "output_logits": False, "output_scores": True}, num_beams=2)
        torch.testing.assert_close(beams.scores[0][0], wanted[0, 0].log_softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 2}])
def test_shares_by_head_are_each_rows_own(options):
    """With all rows of the answer in one pass, as with one row at a time."""
    tiny = tiny_models.build("llava")
    inputs = tiny.inputs(PROMPT)
    options = {**options, "max_new_tokens": 6}
    with steer(tiny.model, by_head=True):
        wanted, found = logits(tiny.model, inputs, max_new_tokens=6), logits(tiny.model, inputs, **options)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# -- videos --------------------------------------------------------------------------------------------------------------
