"""What is evaluated: a model with its processor, and the ways in which suites talk to it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..hooks.sites.discovery import components, original_of, unwrapped_model
from ..interventions import ReattendError
from ..recipes.kit.base import Recipe


class Asked(Protocol):
    """The recipes at work while a suite asks, as a subject needs them: see `Steering`."""

    def marked(self, rows: dict[str, list[Any]]) -> contextlib.AbstractContextManager[Sequence[Recipe]]: ...

    def paused(self) -> contextlib.AbstractContextManager: ...


class Subject:
    """A model as suites see it.

    source: what recipes attach to. module: the transformers model, or the denoiser of a diffusers pipeline. processor: tokenizer or
    processor of a transformers model. pipe: the diffusers pipeline, or None. kind: "llm", "lvlm", "diffusion" or "vision".
    """

    steering: Asked | None = None
    processor: Any

    def __init__(self, source: Any, processor: Any = None) -> None:
        self.source = source = original_of(source)
        self.pipe = source if isinstance(getattr(source, "components", None), dict) else None
        if self.pipe is not None:
            parts = components(source)
            self.module: nn.Module = next((parts[k] for k in ("transformer", "unet") if k in parts), next(iter(parts.values())))
            self.processor, self.kind = getattr(source, "tokenizer", None), "diffusion"
            return
        self.module = source if isinstance(source, nn.Module) else unwrapped_model(source)
        own = getattr(source, "processor", None) or getattr(source, "tokenizer", None)
        self.processor = processor if processor is not None else own
        if _sees_alone(self.module):
            self.processor = self.processor or getattr(source, "image_processor", None)
            self.kind = "vision"
            return
        if self.processor is None:
            raise ReattendError("evaluating a bare model needs its tokenizer or processor: evaluate(model, ..., tokenizer=...)")
        self.kind = "lvlm" if getattr(self.processor, "image_processor", None) is not None else "llm"
        if self.tokenizer.pad_token is None and self.tokenizer.eos_token is None:
            raise ReattendError("batches need a padding token: set tokenizer.pad_token")

    def marked(self, **rows: list[Any]) -> contextlib.AbstractContextManager[Sequence[Recipe]]:
        """Around a batch: tells recipes that wait for passages what to mark, by kind: `marked(highlight=[["Anna lives in Rome."]])`.

        Each value holds, for every prompt of the batch, the passages as they stand in it, a text beside it (`marked(negative=["a dog"])`),
        or boxes (`marked(boxes=[{"dog": (0, 0.5, 0.5, 1)}])`). Gives the recipes at work, for what they have found afterwards.
        """
        return contextlib.nullcontext(()) if self.steering is None else self.steering.marked(rows)

    def untouched(self) -> contextlib.AbstractContextManager:
        """The model without the recipes that are being evaluated, for a judgement about what they wrote."""
        return contextlib.nullcontext() if self.steering is None else self.steering.paused()

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", None) or self.processor

    @property
    def device(self) -> torch.device:
        place = getattr(self.pipe, "_execution_device", None) or getattr(self.module, "device", None)
        return torch.device(place or next(self.module.parameters()).device)

    @contextlib.contextmanager
    def quiet(self, pipe: Any = None) -> Iterator[None]:
        """Around a call of a diffusers pipeline (None: the source): without its own progress bar."""
        pipe = self.source if pipe is None else pipe
        kept = getattr(pipe, "_progress_bar_config", None)
        pipe.set_progress_bar_config(**{**(kept or {}), "disable": True})
        try:
            yield
        finally:
            if kept is None:
                del pipe._progress_bar_config
            else:
                pipe._progress_bar_config = kept

    # -- encoders of images ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def seen(self, pictures: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """(features [B, n], most likely classes [B] or None) of PIL pictures, on the CPU. Features are the pooled ones, or the mean state.

        Without an image processor pictures are brought to the encoder's size and to the range -1 to 1.
        """
        images: Any = getattr(self.processor, "image_processor", None) or self.processor
        if images is not None:
            pixels = images(images=list(pictures), return_tensors="pt")["pixel_values"]
        else:
            size = self.module.config.image_size  # type: ignore[union-attr]
            high, wide = size if isinstance(size, (list, tuple)) else (size, size)
            arrays = [np.asarray(one.convert("RGB").resize((wide, high)), dtype=np.float32) for one in pictures]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
        dtype = next(self.module.parameters()).dtype
        out = self.module(pixel_values=pixels.to(self.device, dtype), output_hidden_states=True)
        names = ("image_embeds", "pooler_output", "last_hidden_state")
        found = next((out[name] for name in names if out.get(name) is not None), None)
        found = out.hidden_states[-1] if found is None else found
        # of all tokens the first one, where it is a class token, has what the head reads
        features = found if found.dim() == 2 else found[:, 0] if out.get("logits") is not None else found.mean(dim=1)
        logits = out.get("logits")
        return features.float().cpu(), None if logits is None else logits.argmax(dim=-1).cpu()

    # -- language and vision-language models -------------------------------------------------------------------------

    def chat(self, text: str, picture: bool = False, answer: str | None = None) -> str:
        """The prompt for one message of a user, in the model's chat template where it has one; `answer`: how the reply begins."""
        if not getattr(self.processor, "chat_template", None):
            token = getattr(self.processor, "image_token", "<image>")
            text = f"{token}\n{text}" if picture and token not in text else text
            return text if answer is None else f"{text} {answer}"
        content: Any = (
            [*([{"type": "image"}] if picture else []), {"type": "text", "text": text}] if self.kind == "lvlm" else text
        )
        chat = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return prompt if answer is None else prompt + answer

    def encode(self, prompts: Sequence[str], pictures: Sequence[Any] | None = None) -> dict[str, Any]:
        """Model inputs of a batch, padded on the left, on the model's device."""
        tokenizer = self.tokenizer
        begins = bool(tokenizer.bos_token) and prompts[0].startswith(tokenizer.bos_token)
        given: dict[str, Any] = {"text": list(prompts), "padding": True, "return_tensors": "pt"}
        if pictures is not None:
            given["images"] = list(pictures)
        kept = tokenizer.padding_side, tokenizer.pad_token
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            inputs = dict(self.processor(**given, add_special_tokens=not begins))
        finally:
            tokenizer.padding_side, tokenizer.pad_token = kept
        kind = getattr(self.module, "dtype", None)
        floats = kind if isinstance(kind, torch.dtype) else torch.float32
        return {
            name: value.to(self.device, floats if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }

    def generate(
        self, prompts: Sequence[str], pictures: Sequence[Any] | None = None, max_new_tokens: int = 32, **options: Any
    ) -> list[str]:
        """What the model writes after each prompt, greedily unless options say otherwise; special tokens are left out.

        prompts: as `chat` makes them. pictures: one per prompt. options: keyword arguments of the model's `generate`.
        """
        inputs = self.encode(prompts, pictures)
        pad = self.tokenizer.pad_token_id
        options.setdefault("pad_token_id", pad if pad is not None else self.tokenizer.eos_token_id)
        with torch.no_grad():
            out = self.module.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)  # type: ignore[operator]
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _sees_alone(module: nn.Module) -> bool:
    """Whether a model reads images and nothing else."""
    names = inspect.signature(type(module).forward).parameters
    return "pixel_values" in names and not {"input_ids", "inputs_embeds", "decoder_input_ids"} & set(names)
