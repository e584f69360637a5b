"""From what a user has - a pipeline or a model, a text, a picture - to the job that is run twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..interventions import ReattendError, UnsupportedError
from ..recipes import Recipe
from ..recipes.kit import checks
from .job import Job, noise_of
from .predictions import PredictionJob
from .text import TextJob

TASKS = ("text-generation", "image-text-to-text", "fill-mask", "text-classification", "image-classification")


def job_for(
    model: Any,
    text: Any,
    prompt: Any,
    image: Any,
    inputs: Any,
    tokenizer: Any,
    options: dict[str, Any],
    seed: int,
    recipes: Sequence[Recipe],
) -> Job:
    """The job for this model and input, whose runs stand alone, under these recipes or none of them.

    Raises ReattendError where they do not go together.
    """
    one_noise = noise_of(recipes)
    if text is not None and prompt is not None:
        raise ReattendError("text and prompt both name the input: give one of them")
    asked = text if text is not None else prompt
    # to a pipeline that draws, an empty prompt is one: Attentive Eraser asks for it
    if isinstance(asked, str) and not asked.strip() and not draws(model):
        raise ReattendError("the prompt is empty: give the text that both runs shall start from")
    if isinstance(asked, str):
        checks.text(asked, "the prompt")
    name, first = ("text", text) if text is not None else ("prompt", prompt) if prompt is not None else ("inputs", inputs)
    if isinstance(first, (list, tuple)) and first and all(isinstance(item, str) for item in first) and not draws(model):
        raise ReattendError(
            f"{name}: a comparison takes one prompt at a time, as a string or a list of chat messages, got {len(first)} in a "
            f"{type(first).__name__}: call it once per prompt"
        )
    if isinstance(model, nn.Module):
        return _bare(model, asked, image, inputs, tokenizer, options, seed)
    if draws(model):
        from .images import ImageJob

        given = {"prompt": asked, "image": image}
        return ImageJob(model, {**{k: v for k, v in given.items() if v is not None}, **options}, seed, one_noise)
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise ReattendError(
            f"expected a transformers model or pipeline, a diffusers pipeline, or an nn.Module, got {type(model).__name__}"
        )
    return _pipeline(model, asked if asked is not None else inputs, image, options, seed)


def draws(model: Any) -> bool:
    """Whether this is a diffusers pipeline, which takes several prompts and gives a picture for each."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), dict)


def _pipeline(pipe: Any, asked: Any, image: Any, options: dict[str, Any], seed: int) -> Job:
    task, module = getattr(pipe, "task", ""), pipe.model
    if task not in TASKS:
        raise UnsupportedError(f"compare does not know the pipeline task {task!r}; it knows: {', '.join(TASKS)}")
    job: Job
    if task in ("text-generation", "image-text-to-text"):
        settings = {**getattr(pipe, "_forward_params", {}), **options}
        settings = {**settings.pop("generate_kwargs", {}), **settings}
        if getattr(pipe, "generation_config", None) is not None:
            settings.setdefault("generation_config", pipe.generation_config)
        processor = getattr(pipe, "processor", None) or pipe.tokenizer
        prepared = _with_processor(processor, _required(asked, "text"), image)
        job = TextJob(pipe, module, processor, prepared, settings, seed)
    elif task == "image-classification":
        picture = _required(image if image is not None else asked, "image")
        job = PredictionJob(pipe, module, None, dict(pipe.preprocess(picture)), options, seed, task)
        image = picture
    else:
        prepared = dict(pipe.preprocess(_required(asked, "text")))
        prepared = {k: v for k, v in prepared.items() if isinstance(v, Tensor)}
        job = PredictionJob(pipe, module, pipe.tokenizer, prepared, options, seed, task)
    return _with_pictures(job, asked, image)


def _bare(model: nn.Module, asked: Any, image: Any, inputs: Any, tokenizer: Any, options: dict[str, Any], seed: int) -> Job:
    if isinstance(inputs, (str, list)) and asked is None:
        asked, inputs = inputs, None
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ReattendError(f"inputs must be a dict of tensors as the model takes them, got {type(inputs).__name__}")
    if inputs is None:
        if tokenizer is None:
            raise ReattendError("a bare model needs prepared inputs=, or text= with tokenizer= (its tokenizer or processor)")
        inputs = _with_processor(tokenizer, asked, image)
    can = getattr(model, "can_generate", None)
    job: Job
    if callable(can) and can():
        job = TextJob(model, model, tokenizer, dict(inputs), options, seed)
    else:
        asked_for = "fill-mask" if type(model).__name__.endswith("MaskedLM") else "forward"
        job = PredictionJob(model, model, tokenizer, dict(inputs), options, seed, asked_for)
    return _with_pictures(job, asked, image)


def _with_processor(processor: Any, asked: Any, image: Any) -> dict[str, Any]:
    """Model inputs from a text or chat messages, and a picture if there is one; a processor's chat template is used with pictures."""
    if isinstance(asked, list) and asked and all(isinstance(m, Mapping) for m in asked):
        if image is not None:
            raise ReattendError("with chat messages, put the picture into a message's content instead of image=")
        return dict(_templated(processor, asked))
    if image is not None:
        if not hasattr(processor, "image_processor"):
            raise ReattendError(
                f"{type(processor).__name__} takes no picture: image= needs a processor with an image processor"
            )
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": _required(asked, "text")}]
            return dict(_templated(processor, [{"role": "user", "content": content}]))
        token = getattr(processor, "image_token", "<image>")
        words = _required(asked, "text")
        words = words if token in words else f"{token}\n{words}"
        return dict(processor(images=image, text=words, return_tensors="pt"))
    if asked is not None and not isinstance(asked, str):
        raise ReattendError(f"text must be a string or a list of chat messages, got {type(asked).__name__}")
    if hasattr(processor, "image_processor"):
        return dict(processor(text=_required(asked, "text"), return_tensors="pt"))
    if not hasattr(processor, "decode"):
        raise ReattendError(f"{type(processor).__name__} cannot read text: image= is what it takes")
    return dict(processor(_required(asked, "text"), return_tensors="pt"))


def _templated(processor: Any, messages: list) -> Mapping[str, Any]:
    if not getattr(processor, "chat_template", None):
        raise ReattendError("this tokenizer has no chat template: give the prompt as one string")
    more = messages[-1].get("role") == "assistant"
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not more,
        continue_final_message=more,
    )


def _with_pictures(job: Any, asked: Any, image: Any) -> Job:
    """The job, with the pictures of its input at hand for the report."""
    given = [image]
    if isinstance(asked, list):
        parts = [p for m in asked if isinstance(m.get("content"), list) for p in m["content"]]
        given += [part.get("image") for part in parts if isinstance(part, Mapping)]
    job.pictures = [picture for picture in given if hasattr(picture, "save")]
    return job


def _required(value: Any, name: str) -> Any:
    if value is None:
        raise ReattendError(f"{name}= is missing: the input that both variants run on")
    return value
