"""The tiny pipelines as fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from text_pipelines import class_pipe, fill_pipe, image_pipe, llama, look_pipe, text_pipe, tokenizer  # noqa: F401
