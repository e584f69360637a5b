"""The tiny pipelines as fixtures."""

from __future__ import annotations

from text_pipelines import class_pipe, fill_pipe, image_pipe, llama, look_pipe, text_pipe, tokenizer  # noqa: F401
