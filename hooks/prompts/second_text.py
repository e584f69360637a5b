"""A second text for a denoiser: encoded as the running pipeline encodes its own, or given as tensors, and fitted to a call's arguments."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError
from ..module_hooks import Hooks
from ..sites.discovery import components
from ..sites.source import source_of
from ..tokens.text_columns import held_by, read_row
from ..tokens.text_encodings import TextEncodings, text_encoders

# what a text may be given as, by the names that pipelines use
NAMES = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
ALIASES = {"prompt_embeds_mask": "prompt_attention_mask"}
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
POOLED = ("pooled_projections", "text_embeds")
# arguments of `encode_prompt` that say what is encoded, not how
CONTENT = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "prompt_4",
    "device",
    "dtype",
    "kwargs",
    "do_classifier_free_guidance",
    "text_encoder_index",
)


NO_POOLED = "this model reads a pooled text beside the tokens: give the second text's as pooled_prompt_embeds"


@dataclass
class Encoded:
    """Texts as tensors: embeds [P, T, C]; pooled [P, C']; mask [P, T], True = real; None where the family has no such thing.

    words bool [P, T], of texts that the pipeline has encoded: where tokens of the texts themselves stand, start and end tokens too. A mask
    is none of the denoiser's where its own prompt comes without one: padding acts there as the prompt's does.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    words: Tensor | None = None

    @property
    def count(self) -> int:
        return self.embeds.shape[0]

    def packed(self) -> Encoded:
        """The texts without what pads them: words first, as many tokens as the longest one has, the others masked after their end."""
        words = self.mask if self.words is None else self.words
        if words is None:
            return self
        words = words.to(self.embeds.device)
        order = (~words).long().argsort(dim=1, stable=True)[:, : int(words.sum(dim=1).amax())]
        embeds = self.embeds.gather(1, order[..., None].expand(-1, -1, self.embeds.shape[2]))
        left = words.gather(1, order)
        return Encoded(embeds, self.pooled, None if bool(left.all()) else left)

    def joined(self, each: int) -> Encoded:
        """Texts of `each` of these, one after the other; the pooled ones are left out where that is more than one."""
        if each == 1:
            return self
        embeds = self.embeds.reshape(self.count // each, -1, self.embeds.shape[2])
        return Encoded(embeds, None, None if self.mask is None else self.mask.reshape(len(embeds), -1))

    def arguments(self, given: Mapping[str, Any], *, pooled: bool = True) -> dict[str, Any]:
        """The arguments of a denoiser's call that these texts stand for, by name, with P rows each. pooled: also the pooled ones.

        Raises ReattendError for texts of another kind than the call's.
        """
        text = given.get("encoder_hidden_states")
        if not isinstance(text, Tensor) or text.dim() != 3:
            raise ReattendError("the denoiser was called without encoder_hidden_states of one text [batch, tokens, width]")
        if self.embeds.shape[2] != text.shape[2]:
            raise ReattendError(
                f"prompt_embeds of the second text are {self.embeds.shape[2]} wide, those of the prompt {text.shape[2]}: a text of this "
                "model's own encoders is needed"
            )
        found: dict[str, Any] = {"encoder_hidden_states": self.embeds.to(text)}
        name = next((name for name in POOLED if _named(given, name) is not None), "") if pooled else ""
        own = _named(given, name)
        if own is not None:
            if self.pooled is None:
                raise ReattendError(NO_POOLED)
            if self.pooled.shape[1] != own.shape[-1]:
                raise ReattendError(
                    f"pooled_prompt_embeds of the second text are {self.pooled.shape[1]} wide, those of the prompt {own.shape[-1]}"
                )
            value = self.pooled.to(own)
            found |= {name: value} if name in given else {"added_cond_kwargs": {name: value}}
        mask = next((name for name in MASKS if isinstance(given.get(name), Tensor)), None)
        if mask is not None:
            own = self.mask if self.mask is not None else torch.ones(self.embeds.shape[:2], device=text.device)
            own, whole = own.to(given[mask]), given[mask]
            if whole.dim() == 2 and whole.shape[1] > text.shape[1]:  # Chroma's goes on with the image's tokens
                own = torch.cat([own, whole[:1, text.shape[1] :].expand(len(own), -1)], dim=1)
            found[mask] = own
        return found


def pooled_misfit(denoiser: nn.Module, text: Encoded) -> str:
    """Why texts that are given as tensors do not fit a joint denoiser, or ""."""
    reads = "pooled_projections" in inspect.signature(type(denoiser).forward).parameters
    if reads == (text.pooled is not None):
        return ""
    return NO_POOLED if reads else f"{type(denoiser).__name__} reads no pooled text: leave pooled_prompt_embeds out"


def _named(given: Mapping[str, Any], name: str) -> Tensor | None:
    """An argument, or an entry of the dictionary in which SDXL and its kin keep theirs."""
    added = given.get("added_cond_kwargs")
    value = given.get(name, added.get(name) if isinstance(added, Mapping) else None)
    return value if isinstance(value, Tensor) else None


def given_as(tensors: Mapping[str, Tensor]) -> Encoded:
    """Texts that are given as tensors, by the names of `NAMES`. Raises ReattendError for other names, shapes and numbers."""
    named = {ALIASES.get(name, name): value for name, value in tensors.items()}
    strange = [name for name in named if name not in NAMES]
    if strange or "prompt_embeds" not in named or not all(isinstance(value, Tensor) for value in named.values()):
        raise ReattendError(
            f"a second text is given as tensors under the names {', '.join(NAMES)} (the first at least), got {', '.join(tensors)}"
        )
    embeds, pooled, mask = (named.get(name) for name in NAMES)
    assert embeds is not None
    for name, value in named.items():
        if name != NAMES[2] and not value.is_floating_point():
            raise ReattendError(f"{name} must hold floating-point numbers, as text encoders give them, got {value.dtype}")
        if not bool(value.isfinite().all()):
            raise ReattendError(f"{name} must hold finite numbers, and some are nan or infinite")
    if embeds.dim() != 3 or not embeds.shape[0]:
        raise ReattendError(f"prompt_embeds must be [texts, tokens, width], got {list(embeds.shape)}")
    if pooled is not None and (pooled.dim() != 2 or len(pooled) != len(embeds)):
        raise ReattendError(
            f"pooled_prompt_embeds must be [{len(embeds)}, width], as there are texts, got {list(pooled.shape)}"
        )
    if mask is not None and mask.shape != embeds.shape[:2]:
        raise ReattendError(f"prompt_attention_mask must be {list(embeds.shape[:2])}, as prompt_embeds, got {list(mask.shape)}")
    return Encoded(embeds.detach(), None if pooled is None else pooled.detach(), None if mask is None else mask.bool())


def encoder_misfit(model: Any) -> str:
    """Why a model or pipeline cannot make tensors of a text, or ""."""
    remedy = "give the second text as tensors (prompt_embeds, and pooled_prompt_embeds where there are any)"
    if isinstance(model, nn.Module):
        return f"{type(model).__name__} is a bare denoiser and encodes no text: {remedy}, or apply the recipe to the pipeline"
    if not callable(getattr(model, "encode_prompt", None)) or not _returned(model):
        modular = "update_components" in dir(model) and "blocks" in dir(model)
        guider = (
            ", or set the guider reattend.guiders.NAGGuidance, which reads the pipeline's negative_prompt" if modular else ""
        )
        return f"how {type(model).__name__} encodes a text is not known: {remedy}{guider}"
    if not any(name.startswith("text_encoder") for name in components(model)):
        return f"this {type(model).__name__} has no text encoder: {remedy}"
    return ""


@torch.no_grad()
def encoded(pipeline: Any, texts: Sequence[str]) -> Encoded:
    """Texts as the running call of a pipeline encodes its own prompt, with the same settings (lengths, skipped layers, cleaning).

    Raises ReattendError where the pipeline cannot.
    """
    reason = encoder_misfit(pipeline)
    if reason:
        raise ReattendError(reason)
    encode = pipeline.encode_prompt
    given: dict[str, Any] = {"prompt": list(texts)}
    running = running_call(pipeline)
    for name in inspect.signature(encode).parameters:
        if name == "do_classifier_free_guidance":
            given[name] = False
        elif re.fullmatch(r"prompt_\d", name):
            given[name] = None  # the same text for the other encoders
        elif name == "device":
            # a pipeline looks for its device in all of its modules, which takes as long as a small text encoder
            found = running.get("device")
            given[name] = found if isinstance(found, torch.device) else getattr(pipeline, "_execution_device", None)
        elif name.startswith("num_") and name.endswith("_per_prompt"):
            given[name] = 1
        elif name in CONTENT or name.startswith("negative_") or "_embeds" in name or name.endswith(("_mask", "_embeds")):
            continue
        elif name in running:
            given[name] = running[name]
    encodings, hooks = TextEncodings(text_encoders(pipeline)), Hooks()
    try:
        encodings.listen(hooks)
        values = encode(**given)
    except Exception as error:  # whatever its encoders object to
        raise ReattendError(f"{type(pipeline).__name__} could not encode the second text: {error}") from error
    finally:
        hooks.remove()
    named = dict(zip(_returned(pipeline), values, strict=False))
    tensors = {name: value for name, value in named.items() if ALIASES.get(name, name) in NAMES and isinstance(value, Tensor)}
    for name, value in tensors.items():
        size = tensors["prompt_embeds"].shape
        if ALIASES.get(name, name) == "prompt_attention_mask" and value.shape == (size[0], size[1] * size[2]):
            tensors[name] = value.view(size)[..., 0]  # AuraFlow's says it of every channel
    found = given_as(tensors)
    words = found.mask if found.mask is not None else _words(found.embeds, encodings)
    empty = torch.tensor([not text.strip() for text in texts], device=words.device)
    found.words = words & ~empty[:, None]
    return found


def _words(embeds: Tensor, encodings: TextEncodings) -> Tensor:
    """Bool [P, T]: which columns hold tokens that a text encoder was given, but for its padding; all of them where that is not known."""
    passes = list(encodings.encoded)
    if not passes:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    held = [held_by(embeds, passes)]
    words = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for row in range(len(embeds)):
        for stream in read_row([embeds], held, row, passes, encodings.tokenizers):
            words[row, stream.columns] = True
    return (words | ~words.any(dim=1, keepdim=True)).to(embeds.device)


def _returned(pipeline: Any) -> list[str]:
    """The names of what a pipeline's `encode_prompt` returns, in order."""
    for node in ast.walk(source_of(type(pipeline).encode_prompt).tree):
        if (
            isinstance(node, ast.Return)
            and isinstance(node.value, ast.Tuple)
            and all(isinstance(x, ast.Name) for x in node.value.elts)
        ):
            return [x.id for x in node.value.elts if isinstance(x, ast.Name)]
    return []


def running_call(pipeline: Any) -> dict[str, Any]:
    """The variables of the call of a pipeline that is under way in this thread, with the scale of its text encoders' LoRA layers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipeline:
            names = dict(frame.f_locals)
            if "text_encoder_lora_scale" in names:
                names["lora_scale"] = names["text_encoder_lora_scale"]
            return names
        frame = frame.f_back
    return {}
