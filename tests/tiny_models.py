"""Random vision-language models of a few thousand weights, built from configs, each with inputs as its processor would make them.

`build("llava")` returns a `Tiny`: the model and a function that makes inputs for a batch of prompts. A prompt is a list of pieces:
an int is a text token, "image" a whole image (with whatever tokens the family puts inside and around it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, BREAK, END, PAD, VOCABULARY = 90, 91, 92, 93, 0, 100
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    image_size=24, patch_size=6, projection_dim=16,
)  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@dataclass
class Tiny:
    """A model and its inputs. expand(n): what the n-th image of a batch becomes, ids and pixels; finish: family-specific arguments."""

    model: Any
    expand: Callable[[int], tuple[list[int], dict[str, Tensor]]]
    finish: Callable[[dict[str, Any]], None] = lambda inputs: None

    def inputs(self, prompts: Sequence[Sequence[int | str]], side: str = "left") -> dict[str, Any]:
        rows, pixels = [], []
        for prompt in prompts:
            row: list[int] = []
            for piece in prompt:
                if piece == "image":
                    ids, arguments = self.expand(len(pixels))
                    pixels.append(arguments)
                    row += ids
                else:
                    row.append(int(piece))
            rows.append(row)
        width = max(map(len, rows))
        pads = [[PAD] * (width - len(row)) for row in rows]
        padded = [p + r if side == "left" else r + p for p, r in zip(pads, rows, strict=True)]
        ids = torch.tensor(padded)
        real = [
            [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for p, r in zip(pads, rows, strict=True)
        ]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.tensor(real)}
        for name in pixels[0] if pixels else ():
            inputs[name] = torch.cat([p[name] for p in pixels])
        self.finish(inputs)
        return inputs


def _model(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    # random weights of the usual scale hardly attend at all: larger ones make every edit show
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("q_proj" in parameter_name or "k_proj" in parameter_name):
            parameter.data *= 20
        if parameter_name.endswith("mm_input_projection_weight"):
            parameter.data.normal_()  # Gemma 3 starts it at zero
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _pixels(n: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + n))


def _square(side: int, size: int = 24) -> Callable[[int], tuple[list[int], dict[str, Tensor]]]:
    return lambda n: ([IMAGE] * side**2, {"pixel_values": _pixels(n, 1, 3, size, size)})


def _text(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **changes}


def llava(**text: Any) -> Tiny:
    config = transformers.LlavaConfig(
        text_config=_text(**text), vision_config=CLIP, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return Tiny(_model("LlavaForConditionalGeneration", config), _square(4))


def vipllava() -> Tiny:
    config = transformers.VipLlavaConfig(
        text_config=_text(), vision_config=CLIP, image_token_id=IMAGE, vision_feature_layers=[-1, -2]
    )
    return Tiny(_model("VipLlavaForConditionalGeneration", config), _square(4))


# heights and widths of the original images: wide, tall, square
SIZES = [(24, 60), (50, 20), (30, 30)]
PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def _anyres(name: str, config: Any) -> Tiny:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model = _model(name, config)

    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        size = SIZES[n % len(SIZES)]
        tiles = image_size_to_num_patches(size, PINPOINTS, 24)
        # the model's own packing says how many placeholders the processor has to write
        side = [torch.zeros(tiles, 16, 32)]
        packing: dict[str, Any] = {"image_newline": model.model.image_newline}
        if "Next" in name:
            packing["vision_feature_select_strategy"] = "default"
        else:
            packing["vision_aspect_ratio"] = config.vision_aspect_ratio
        count = int(model.model.pack_image_features(side, torch.tensor([size]), **packing)[1][0])
        pixels = torch.zeros(1, 5, 3, 24, 24)
        pixels[:, :tiles] = _pixels(n, 1, tiles, 3, 24, 24)
        return [IMAGE] * count, {"pixel_values": pixels, "image_sizes": torch.tensor([size])}

    return Tiny(model, expand)


def llava_next() -> Tiny:
    config = transformers.LlavaNextConfig(
        text_config=_text(), vision_config=CLIP, image_token_id=IMAGE, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1
    )
    return _anyres("LlavaNextForConditionalGeneration", config)


def llava_onevision(limit: str = "anyres_max_9") -> Tiny:
    config = transformers.LlavaOnevisionConfig(
        text_config=_text("qwen2"), vision_config=SIGLIP, image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_aspect_ratio=limit,
    )  # fmt: skip
    return _anyres("LlavaOnevisionForConditionalGeneration", config)


# rows and columns of merged tokens of successive images
GRIDS = [(2, 3), (4, 2), (3, 3)]


def _qwen(name: str, config: Any, patch: int) -> Tiny:
    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        rows, cols = GRIDS[n % len(GRIDS)]
        pixels = _pixels(n, 4 * rows * cols, 3 * 2 * patch**2)
        return [IMAGE] * (rows * cols), {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * cols]])}

    model = _model(name, config)
    takes_types = "mm_token_type_ids" in inspect.signature(model.forward).parameters  # transformers 5.0 does not

    def finish(inputs: dict[str, Any]) -> None:
        if takes_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()

    return Tiny(model, expand, finish)


def _qwen_ids() -> dict[str, int]:
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=94, vision_end_token_id=95)


def qwen2_vl() -> Tiny:
    vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    return _qwen("Qwen2VLForConditionalGeneration", config, 4)


def qwen2_5_vl() -> Tiny:
    vision = dict(
        depth=2, hidden_size=16, out_hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_ids())
    return _qwen("Qwen2_5_VLForConditionalGeneration", config, 4)


def qwen3_vl() -> Tiny:
    vision = dict(
        depth=2, hidden_size=16, out_hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}}, vision_config=vision, **_qwen_ids()
    )
    return _qwen("Qwen3VLForConditionalGeneration", config, 4)


def glm4v() -> Tiny:
    vision = dict(
        depth=2, hidden_size=16, out_hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, image_size=24,
    )  # fmt: skip
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=94, image_end_token_id=95)
    config = transformers.Glm4vConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **ids)
    return _qwen("Glm4vForConditionalGeneration", config, 4)


def internvl(tiles: int = 3) -> Tiny:
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=[24, 24], patch_size=[6, 6]
    )
    config = transformers.InternVLConfig(
        text_config=_text("qwen2"), vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip

    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        return [94, *[IMAGE] * (4 * tiles), 95], {"pixel_values": _pixels(n, tiles, 3, 24, 24)}

    return Tiny(_model("InternVLForConditionalGeneration", config), expand)


def _idefics3(name: str, config: Any, tiles: int = 3) -> Tiny:
    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        ids = [t for tile in range(tiles) for t in (94, 60 + tile, *[IMAGE] * 4)]
        return [*ids, 94], {"pixel_values": _pixels(n, tiles, 3, 24, 24)}

    def finish(inputs: dict[str, Any]) -> None:
        # one sample per row, all with as many tiles as the fullest; unused tiles are all zero and dropped by the model
        if "pixel_values" not in inputs:
            return
        counts = ((inputs["input_ids"] == IMAGE).sum(dim=1) // 4).tolist()
        pixels = torch.zeros(len(counts), max(counts), 3, 24, 24)
        for row, part in enumerate(inputs["pixel_values"].split(counts)):
            pixels[row, : len(part)] = part
        inputs["pixel_values"] = pixels

    return Tiny(_model(name, config), expand, finish)


def idefics3() -> Tiny:
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6)
    config = transformers.Idefics3Config(text_config=_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    return _idefics3("Idefics3ForConditionalGeneration", config)


def smolvlm() -> Tiny:
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6)
    config = transformers.SmolVLMConfig(text_config=_text(), vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    return _idefics3("SmolVLMForConditionalGeneration", config)


def _typed(inputs: dict[str, Any]) -> None:
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()


def gemma3() -> Tiny:
    text = {**TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=SIGLIP, image_token_id=IMAGE, mm_tokens_per_image=4)
    return Tiny(_model("Gemma3ForConditionalGeneration", config), lambda n: ([94, *[IMAGE] * 4, 95], _square(1)(n)[1]), _typed)


def paligemma() -> Tiny:
    config = transformers.PaliGemmaConfig(
        text_config=_text("gemma"), vision_config={**SIGLIP, "projection_dim": 32}, image_token_id=IMAGE, projection_dim=32
    )
    return Tiny(_model("PaliGemmaForConditionalGeneration", config), _square(4))


PIXTRAL = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=48,
    patch_size=4, head_dim=8,
)  # fmt: skip


def _broken(name: str, config: Any, token: int) -> Tiny:
    """Rows of image tokens with [IMG_BREAK] after each but the last, which ends with [IMG_END]."""

    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        rows, cols = GRIDS[n % len(GRIDS)]
        ids = [t for row in range(rows) for t in (*[IMAGE] * cols, BREAK if row + 1 < rows else END)]
        pixels = torch.zeros(1, 3, 48, 48)
        pixels[..., : rows * token, : cols * token] = _pixels(n, 1, 3, rows * token, cols * token)
        return ids, {"pixel_values": pixels, "image_sizes": torch.tensor([[rows * token, cols * token]])}

    return Tiny(_model(name, config), expand)


def pixtral() -> Tiny:
    config = transformers.LlavaConfig(
        text_config=_text("mistral"), vision_config=PIXTRAL, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return _broken("LlavaForConditionalGeneration", config, 4)


def mistral3() -> Tiny:
    config = transformers.Mistral3Config(
        text_config=_text("mistral"), vision_config=PIXTRAL, image_token_id=IMAGE, vision_feature_layer=-1, spatial_merge_size=2
    )
    return _broken("Mistral3ForConditionalGeneration", config, 8)


def mllama() -> Tiny:
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=24,
        patch_size=6, max_num_tiles=1, supported_aspect_ratios=[[1, 1]], intermediate_layers_indices=[0], vision_output_dim=32,
    )  # fmt: skip
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    text.pop("head_dim")
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)

    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        ones = torch.ones(1, 1, dtype=torch.long)
        pixels = {
            "pixel_values": _pixels(n, 1, 1, 1, 3, 24, 24),
            "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[..., None],
        }
        return [IMAGE], pixels

    return Tiny(_model("MllamaForConditionalGeneration", config), expand)


def llama4(tiles: int = 2) -> Tiny:
    vision = dict(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6,
        pixel_shuffle_ratio=0.5, projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    text = dict(
        **TEXT, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2,
        attention_chunk_size=64,
    )  # fmt: skip
    config = transformers.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)

    def expand(n: int) -> tuple[list[int], dict[str, Tensor]]:
        return [94, *[IMAGE] * 4, 95, *[IMAGE] * 4, 96], {"pixel_values": _pixels(n, tiles, 3, 24, 24)}

    return Tiny(_model("Llama4ForConditionalGeneration", config), expand)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    f.__name__: f
    for f in (
        llava, vipllava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, internvl, idefics3, smolvlm,
        gemma3, paligemma, pixtral, mistral3, llama4,
    )
}  # fmt: skip


def build(family: str) -> Tiny:
    return BUILDERS[family]()
