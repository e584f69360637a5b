"""Models by name, as the command line finds them."""

from __future__ import annotations

import warnings

import pytest
import torch
from reattend import ReattendError
from reattend.comparison.loading import load


@pytest.mark.parametrize("dtype, expected", [(None, torch.float32), ("float16", torch.float16)])
def test_a_diffusers_pipeline_is_loaded_in_the_dtype_asked_for(image_pipe, tmp_path, dtype, expected):
    image_pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # diffusers renamed the argument
        pipe = load(str(tmp_path), device="cpu", dtype=dtype)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) >= 2 and {part.dtype for part in parts} == {expected}


def test_a_dtype_that_does_not_exist():
    with pytest.raises(ReattendError, match="--dtype must be one of"):
        load("smollm2", dtype="float31")
