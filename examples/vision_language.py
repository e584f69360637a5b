"""Before and after VAR on one image and one question.

    python examples/vision_language.py --image photo.jpg --question "What is on the table?"
    python examples/vision_language.py --model tiny          # random weights, nothing is downloaded: shows the steps, not the effect

VAR takes attention from image tokens that only act as sinks and gives it to the rest of the image. The dimensions in which a model's
sinks show are known for LLaVA-1.5; for any other model they are found here from one short text and kept in --profile.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import reattend
import torch
from PIL import Image, ImageDraw
from reattend.recipes import recipe_class


def main(arguments: list[str] | None = None) -> tuple[str, str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="a LLaVA-like model of the hub, or 'tiny'")
    parser.add_argument("--image", type=Path, help="picture to ask about; without one, a drawing of a house")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--move", type=float, default=0.4, help="fraction of the sinks' attention that is moved")
    parser.add_argument("--tau", type=float, help="how far a sink stands out; 20 unless the model is tiny")
    parser.add_argument("--profile", type=Path, help="file for the sink dimensions of a model that VAR does not know")
    parser.add_argument("--tokens", type=int, default=40, help="length of the answer")
    options = parser.parse_args(arguments)

    model, processor = tiny_llava() if options.model == "tiny" else load(options.model)
    picture = Image.open(options.image).convert("RGB") if options.image else drawing()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device, model.dtype)

    def answer() -> tuple[str, torch.Tensor]:
        """The answer, and the probabilities of its first token."""
        out = model.generate(
            **inputs, max_new_tokens=options.tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        words = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return words, out.logits[0][0].float().softmax(dim=-1)

    settings: dict = {"move": options.move, "tau": options.tau or (6.0 if options.model == "tiny" else 20.0)}
    if options.profile:
        if not options.profile.exists():
            recipe_class("var").profile(model, processor, tau=settings["tau"]).save(options.profile)
        settings["profile_path"] = str(options.profile)
    elif options.model == "tiny":
        settings["sink_dims"] = [SINK]

    before, old = answer()
    with reattend.apply(model, "var", **settings) as session:
        after, new = answer()
    moved = float((new - old).abs().sum() / 2)
    print(f"question: {options.question}\nbefore:   {before!r}\nafter:    {after!r}")
    print(
        f"VAR acted {session.applied} times, in {len(session.stats['var'])} layers; {moved:.1%} of the first token's chances moved"
    )
    return before, after, moved


def load(name: str):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto"), AutoProcessor.from_pretrained(
        name
    )


def drawing() -> Image.Image:
    picture = Image.new("RGB", (96, 96), "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((20, 45, 70, 90), fill="firebrick")
    draw.polygon([(15, 45), (45, 15), (75, 45)], fill="saddlebrown")
    return picture


SINK = 7  # the hidden dimension in which the tiny model has sinks, as large models have theirs


def tiny_llava():
    """A LLaVA of random weights with a byte tokenizer, made here: it sees, it has sinks, it cannot speak."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<image>", *letters])}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 48, "width": 48}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    text = dict(
        model_type="llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=48, patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                # random weights of the usual size do next to nothing; queries and keys stay modest, so that attention is spread
                parameter *= 24 if "v_proj" in name or "o_proj" in name else 6
        model.get_input_embeddings().weight[1, SINK] = 400.0
        model.model.multi_modal_projector.linear_2.weight[SINK] *= 12
    return model, processor


TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for part in m['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

if __name__ == "__main__":
    main()
