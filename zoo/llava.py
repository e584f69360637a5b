"""What the zoo's LLaVAs have in common: the pictures they take, and how pictures and chats become their inputs."""

from __future__ import annotations

from typing import Any

SIDE, PATCH = 48, 8


def llava_processor(tokenizer: Any, image_token: str, template: str) -> Any:
    """The LlavaProcessor that scales pictures to SIDE x SIDE in -1..1 and writes chats by a template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=image_token,
        chat_template=template,
    )
