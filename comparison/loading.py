"""Models by name for the command line: a hub id, a folder, one of the zoo, or a small language model that comes as a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..interventions import ReattendError
from ..zoo.packaged import FILES, PACKAGED, packaged_smollm2, quiet

__all__ = ["load", "packaged_smollm2", "skeleton", "task_of"]

ZOO = "zoo:"


def load(name: str, *, device: str | None = None, dtype: str | None = None) -> Any:
    """A pipeline for a model name: `smollm2`, `gemma3-270m`, `zoo:NAME`, a hub id, or a folder of a transformers model or a diffusers pipeline.

    Raises ReattendError with what to do where it cannot be found or no pipeline here fits it.
    """
    import torch

    kind = getattr(torch, dtype) if dtype and isinstance(getattr(torch, dtype, None), torch.dtype) else None
    if dtype and dtype != "auto" and kind is None:
        raise ReattendError(f"--dtype must be one of float32, float16, bfloat16, auto; got {dtype!r}")
    where = _device(device)
    try:
        if name in PACKAGED:
            from transformers import pipeline

            model, tokenizer = PACKAGED[name]()
            return pipeline("text-generation", model=model.to(kind), tokenizer=tokenizer, device=where)
        if name.startswith(ZOO):
            from ..zoo.loading import pipeline as from_zoo

            with quiet():
                return from_zoo(name.removeprefix(ZOO), device=where, dtype=kind)
        if _file(name, "model_index.json") is not None:
            return _diffusion(name, kind, where)
        return _transformers(name, kind or "auto", where)
    except ReattendError:
        raise
    except Exception as error:  # readers of broken files raise nearly everything
        raise ReattendError(f"cannot load {name!r}: {_first_sentence(error)}") from error


def _device(named: str | None) -> str:
    import torch

    if not named:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ReattendError(f"--device {named!r} cannot be used here: {_first_sentence(error)}") from None
    return named


def _transformers(name: str, dtype: Any, device: str) -> Any:
    from transformers import AutoConfig, pipeline

    config = AutoConfig.from_pretrained(name)
    task = task_of(config)
    with quiet():
        return pipeline(task, model=name, dtype=dtype, device=device)  # type: ignore


def task_of(config: Any) -> str:
    """The pipeline task of a transformers config, from the class it names."""
    from ..hooks.sites.encoders import ENCODERS

    named = (getattr(config, "architectures", None) or [""])[0]
    if named.endswith("MaskedLM"):
        return "fill-mask"
    if named.endswith("ForImageClassification"):
        return "image-classification"
    if named.endswith("ForSequenceClassification"):
        return "text-classification"
    if getattr(config, "vision_config", None) is not None and named.endswith("ForConditionalGeneration"):
        return "image-text-to-text"
    if getattr(config, "model_type", "") in ENCODERS:
        return "image-feature-extraction"
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    raise ReattendError(f"no command here runs a {named or type(config).__name__}: use reattend.apply(model, ...) in Python")


def _diffusion(name: str, dtype: Any, device: str) -> Any:
    try:
        from diffusers import DiffusionPipeline, __version__  # type: ignore[attr-defined]
    except ImportError:
        raise ReattendError(f'{name!r} is a diffusers pipeline: pip install "diffusers>=0.36,<0.43"') from None
    # renamed there; before, `dtype` was ignored, and since, `torch_dtype` is deprecated
    named = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    return DiffusionPipeline.from_pretrained(name, **({named: dtype} if dtype else {})).to(device)


def skeleton(name: str) -> Any:
    """The model of a hub id or folder without its weights (meta device), for listing sites: only config files are read.

    For a diffusers pipeline, its denoiser.
    """
    import torch

    try:
        if name in PACKAGED:
            import transformers

            file = FILES[name]()
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(config)
        if name.startswith(ZOO):
            from ..zoo.loading import folder

            name = str(folder(name.removeprefix(ZOO), weights=True))
        index = _file(name, "model_index.json")
        with torch.device("meta"):
            return _denoiser(name, index) if index is not None else _architecture(name)
    except ReattendError:
        raise
    except Exception as error:  # readers of broken files raise nearly everything
        raise ReattendError(f"cannot read {name!r}: {_first_sentence(error)}") from error


def _architecture(name: str) -> Any:
    import transformers

    if Path(name).is_dir():
        held = json.loads((Path(name) / "config.json").read_text()) if (Path(name) / "config.json").is_file() else {}
        if "_class_name" in held:
            return _diffusers_model(held)
    config = transformers.AutoConfig.from_pretrained(name)
    named = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, named, None)
    return cls(config) if cls is not None else transformers.AutoModel.from_config(config)


def _denoiser(name: str, index: Path) -> Any:
    parts = json.loads(index.read_text())
    part = next((p for p in ("transformer", "unet") if p in parts), None)
    file = _file(name, f"{part}/config.json") if part else None
    if file is None:
        raise ReattendError(f"the pipeline {name!r} names neither a transformer nor a unet with a config")
    return _diffusers_model(json.loads(file.read_text()))


def _diffusers_model(config: dict[str, Any]) -> Any:
    try:
        import diffusers
    except ImportError:
        raise ReattendError('this is a diffusers model: pip install "diffusers>=0.36,<0.43"') from None
    cls = getattr(diffusers, config["_class_name"], None)
    if cls is None:
        raise ReattendError(f"this version of diffusers has no {config['_class_name']}")
    return cls.from_config(config)


def _file(name: str, path: str) -> Path | None:
    """A file of a folder or hub repository, or None if it is not there."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / path if (folder / path).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, path))
    except HFValidationError:
        raise ReattendError(f"{name!r} is neither a folder, a hub id (owner/name), nor one of {', '.join(PACKAGED)}") from None
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:297] + "..."
