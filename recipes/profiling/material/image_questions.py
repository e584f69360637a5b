"""Image-question pairs for profiling runs: as (image, question) pairs, ready inputs of the model, or a JSON-lines file.

Lines of the file are {"image": path, "question": text}, with paths from the file's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ....interventions import ReattendError
from ...kit.checks import read_picture, read_text


def read_samples(samples: Iterable[Any] | str | None) -> list[Any]:
    """The samples as a list. Raises ReattendError where there are none, or a file is not as this module says."""
    if isinstance(samples, (str, Path)):
        path = Path(samples)
        lines = read_text(path, "samples file").splitlines()
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
            samples = [(path.parent / row["image"], row["question"]) for row in rows]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ReattendError(
                f'samples: {str(path)!r} must hold lines of {{"image": path, "question": text}}: {error}'
            ) from None
    found = list(samples or ())
    if not found:
        raise ReattendError("samples are needed: [(image, question), ...], or a JSON-lines file; 50 to 100 pairs are good")
    for sample in found:
        pair = isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[1], str)
        if not pair and not isinstance(sample, Mapping):
            raise ReattendError(f"a sample must be (image, question) or a mapping of model inputs, got {type(sample).__name__}")
    return found


def inputs_of(sample: Any, processor: Any, device: Any) -> dict[str, Any]:
    """The model's inputs for one sample, on its device, with the model's own chat template where the processor has one."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _prepared(sample, processor).items()}


def _prepared(sample: Any, processor: Any) -> Mapping[str, Any]:
    if isinstance(sample, Mapping):
        return sample
    image, question = sample
    if isinstance(image, (str, Path)):
        image = read_picture(image, "samples: picture")
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    if not hasattr(processor, "image_processor"):
        raise ReattendError("(image, question) samples need the model's processor; ready inputs of the model do without")
    return processor(images=image, text=f"{getattr(processor, 'image_token', '<image>')}\n{question}", return_tensors="pt")
