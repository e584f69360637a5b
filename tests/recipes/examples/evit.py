"""evit: two of four layers; encoders without a class token, and those whose layers take positions or windows, are refused."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks import steering

NO_CLASS = "goes by the attention of a class token"
EXAMPLES = {
    "": Example(
        "vision",
        {"keep": 0.6, "layers": (1, 2)},
        off={"keep": 1.0},
        layers=2,
        refused={
            "siglip_vision": NO_CLASS, "siglip": NO_CLASS, "ijepa": NO_CLASS, "sam": NO_CLASS,
            "dinov3": "cannot be merged between its layers",
        },
    ),
    "leave": Example(
        "vision",
        {"keep": {1: 0.5}, "fuse": False},
        off={"keep": {1: 1.0}},
        layers=1,
        refused={
            "siglip_vision": NO_CLASS, "siglip": NO_CLASS, "ijepa": NO_CLASS, "sam": NO_CLASS,
            "dinov3": "cannot be merged between its layers",
        },
    ),
}  # fmt: skip
BAD = [
    ({"keep": 0.0}, "keep: a part must be above 0"),
    ({"keep": {1: 1.5}}, "keep: a part must be above 0"),
    ({"keep": {}}, "keep: a part must be above 0"),
    ({"keep": {-1: 0.5}}, "layers count from 0"),
]
GOLDEN = ("drop_keep05", "fuse_keep07", "keep_all_identity")


def official(data, facts):
    """transformers' ViT with the weights of the official model."""
    from transformers import ViTConfig, ViTForImageClassification

    dim, depth = int(facts["dim"]), int(facts["depth"])
    config = ViTConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=int(facts["heads"]), intermediate_size=2 * dim,
        image_size=int(facts["img"]), patch_size=int(facts["patch"]), layer_norm_eps=1e-6, num_labels=len(data["w.head.bias"]),
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    names = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
    weights = {f"vit.{new}": data[f"w.{old}"] for new, old in names.items()}
    layer = {
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    for part in ("weight", "bias"):
        weights[f"vit.embeddings.patch_embeddings.projection.{part}"] = data[f"w.patch_embed.proj.{part}"]
        weights[f"vit.layernorm.{part}"] = data[f"w.norm.{part}"]
        weights[f"classifier.{part}"] = data[f"w.head.{part}"]
        for i in range(depth):
            for new, old in layer.items():
                weights[f"vit.layers.{i}.{new}.{part}"] = data[f"w.blocks.{i}.{old}.{part}"]
            for which, piece in zip("qkv", data[f"w.blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True):
                weights[f"vit.layers.{i}.attention.{which}_proj.{part}"] = piece
    model.load_state_dict(weights)
    return model


def golden(name, run):
    """States after every block, the class token's at the end, and the logits."""
    data, facts = golden_file("evit", name)
    model, rates = official(data, facts), dict(enumerate(json.loads(facts["keep_rate"])))
    kept, steering.fused_as_it_is = steering.fused_as_it_is, run
    session = reattend.apply(model, "evit", keep=rates, fuse=facts["fuse_token"] == "true")
    try:
        with torch.no_grad():
            out = model(data["pixel_values"], output_hidden_states=True)
    finally:
        steering.fused_as_it_is = kept
        session.__exit__(KeyError, None, None)  # no word on a keep rate of 1, which changes nothing
    for i, states in enumerate(out.hidden_states[1:]):
        yield states, data[f"expected_hidden_{i}"]
    yield model.vit.layernorm(out.hidden_states[-1])[:, 0].detach(), data["expected_cls"]
    yield out.logits, data["expected_logits"]


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {}
