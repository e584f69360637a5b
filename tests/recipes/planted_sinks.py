"""Tiny vision-language models with sinks: a huge value in one hidden dimension of chosen tokens, as large models have them."""

from __future__ import annotations

import tiny_models
import torch
from reattend.hooks import sites

DIM = 5
# random models hardly look at images and their sinks take all of it: no thresholds, so that every row behind an image changes
OPEN = {"tau": 5.0, "sink_dims": [DIM], "first_layer": 1, "summ": 0.0, "rho": 1.0}
PROMPTS = [[1, 5, 6, "image", 7, 8], [1, 9, "image", 10, 11, 12, "image", 13], [1, 14, 15, 16]]


class Planted:
    """Makes sinks: a huge value in one hidden dimension of the first token and of two image tokens of every sample."""

    def __init__(self, tiny, layer=1):
        self.tiny, self.positions = tiny, None
        name = sites(tiny.model).stack("decoder").kind("self")[layer].name.rsplit(".", 1)[0]
        tiny.model.get_submodule(name).register_forward_pre_hook(self.plant, with_kwargs=True)

    def inputs(self, prompts, **options):
        inputs = self.tiny.inputs(prompts, **options)
        self.mark(inputs)
        return inputs

    def mark(self, inputs):
        image = inputs["input_ids"] == tiny_models.IMAGE
        real = inputs["attention_mask"].bool()
        order = image.cumsum(dim=1)
        self.positions = (real & (real.cumsum(dim=1) == 1)) | (image & ((order == 2) | (order == 3)))

    def plant(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            return None
        new = hidden.clone()
        width = min(hidden.shape[1], self.positions.shape[1])
        rows = self.positions.repeat_interleave(hidden.shape[0] // self.positions.shape[0], dim=0)[:, :width]
        new[:, :width, DIM] = torch.where(rows, 400.0, hidden[:, :width, DIM])
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def planted(family):
    tiny = tiny_models.build(family)
    return tiny.model, Planted(tiny)
