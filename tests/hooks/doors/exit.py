"""Image tokens leave a vision-language model before its last layer."""

import torch
from reattend.hooks import Capture, Exit, Plan, attach, sites
from tiny_models import build


def use() -> None:
    tiny = build("llava")
    inputs, widths = tiny.inputs([[1, "image", 5, 6, 7]]), []
    decoder = sites(tiny.model).stack("decoder")
    look = Capture(decoder.layers(0, 0), lambda call, edits: widths.append(call.num_keys))
    with attach(tiny.model, [Plan("leave", [look, Exit(decoder.layers(3, 3), ["image"])])]):
        out = tiny.model(**inputs, use_cache=True)
    kept = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    images = int((inputs["input_ids"] == tiny.model.config.image_token_id).sum())
    assert kept == [*widths * 3, widths[0] - images] and out.logits.shape[1] == inputs["input_ids"].shape[1]
    assert torch.isfinite(out.logits).all()
