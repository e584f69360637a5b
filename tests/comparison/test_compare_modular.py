"""Comparisons on diffusers' modular pipelines, whose call takes what their blocks take."""

from __future__ import annotations

import pytest
import reattend
import torch
from packaging.version import Version
from reattend import ReattendError

diffusers = pytest.importorskip("diffusers")
if Version(diffusers.__version__) < Version("0.42"):
    pytest.skip("the tiny modular pipelines need diffusers 0.42", allow_module_level=True)

from reattend.guiders import PAGGuidance  # noqa: E402
from tiny_modular import sdxl, whole_sdxl  # noqa: E402

GIVEN = {"prompt": "a fox", "height": 16, "width": 16, "num_inference_steps": 3}


def test_a_modular_pipeline_is_compared() -> None:
    pipe = whole_sdxl()
    report = reattend.wrap(pipe).compare("pag", scale=5.0, layers=[1], progress=False, **GIVEN)
    assert report.after.pictures[0].size == (16, 16)
    assert report.request["prompt"] == "a fox" and report.before.cost.steps == 3
    assert report.stats["pag"] and not report.metrics["identical"]
    with reattend.apply(pipe, "pag", scale=5.0, layers=[1]):
        alone = pipe(**GIVEN, generator=torch.Generator().manual_seed(0), output="images")
    assert alone[0].tobytes() == report.after.pictures[0].tobytes()


def test_variants_side_by_side_beside_a_guider() -> None:
    pipe = whole_sdxl()
    pipe.update_components(guider=PAGGuidance(guidance_scale=3.0, layers=[1]))
    swept = reattend.compare(pipe, ["seg", "softpag"], progress=False, attention=False, **GIVEN)
    assert len(swept.columns) == 2 and not any(column.same for column in swept.columns)


def test_what_its_blocks_do_not_take_or_make() -> None:
    with pytest.raises(ReattendError, match="takes no 'steps'; it takes: .*num_inference_steps"):
        reattend.compare(whole_sdxl(), "pag", prompt="a fox", steps=3)
    pipe, _, call = sdxl()
    with pytest.raises(ReattendError, match="makes neither images nor videos.*compare the pipeline with its decoding blocks"):
        reattend.compare(pipe, "pag", **call)
