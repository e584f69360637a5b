"""Keys of an image's tokens as they would be with the image one width further to the right (AlignedGen puts an anchor there)."""

import tiny_denoisers
import torch
from reattend.hooks import Capture, Plan, Rotary, attach, sites


def use() -> None:
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")
    first, moved, text, width = sites(model).layers(0, 0).stack("denoiser.double"), [], tiny_denoisers.TEXT, 4

    def look(call, _) -> None:
        turns, image = call.turned.key, call.key[:, :, text:]
        plain = turns.off(image, torch.arange(text, call.num_keys))  # no positions at all
        assert torch.allclose(turns.on(plain, torch.arange(text, call.num_keys)), image, atol=1e-5)
        # the first two image tokens are neighbours in a line
        moved.append(turns.further(image, text, text + 1, times=width) if not moved else image)

    with attach(model, [Plan("look", [Rotary(first), Capture(first, look)])]):
        model(**inputs)
        inputs["img_ids"][:, 2] += width
        model(**inputs)
    assert torch.allclose(moved[0], moved[1], atol=1e-5)
