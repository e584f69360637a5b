"""What recipes for image encoders and denoisers cost in one pass, as ratios to the untouched model: a table of docs/performance.md.

python benchmarks/passes.py
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import methods  # noqa: F401  (puts the tests' models on the path)
import reattend
import torch
from timing import ratios
from torch import nn
from transformers import ViTConfig, ViTModel


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """ViT-S/16 at 224 pixels, a batch of 8."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=12)
    return ViTModel(config, add_pooling_layer=False).eval(), {"pixel_values": torch.randn(8, 3, 224, 224)}


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """A UNet of three resolutions with 32 x 32 latents and 77 text tokens, the two halves of guidance in one batch."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256), layers_per_block=2, attention_head_dim=8, cross_attention_dim=256,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model.eval(), {
        "sample": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 77, 256),
    }


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], dict[str, tuple[str, dict[str, Any]]]]] = {
    "ViT-S/16, batch 8": (vit, {"evit, keep 0.7": ("evit", {"keep": 0.7}), "evit, keep 0.5": ("evit", {"keep": 0.5})}),
    "a UNet, two halves of guidance": (
        unet,
        {
            "prompt-reweight of two words": ("prompt-reweight", {"columns": [([1, 2], 2.0)], "stop": 1.0}),
            "softpag": ("softpag", {}),
        },
    ),
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    print("| | one pass |\n|---|---|")
    for title, (build, recipes) in CASES.items():
        model, inputs = build()

        def run(model: nn.Module, inputs: dict[str, Any] = inputs) -> None:
            rows = reattend.rows("unconditional", "conditional") if "sample" in inputs else contextlib.nullcontext()
            with torch.no_grad(), rows:
                model(**inputs)

        with contextlib.ExitStack() as sessions:
            variants: dict[str, Callable[[], object]] = {"untouched": functools.partial(run, model)}
            for label, (slug, given) in recipes.items():
                own = copy.deepcopy(model)
                sessions.enter_context(reattend.apply(own, slug, **given))
                variants[label] = functools.partial(run, own)
            for label, ratio in ratios(variants, rounds=7).items():
                print(f"| {title}: {label} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
