"""The tests that are left out on purpose: one list, each with when and why, so that a skip ends when its reason does.

Left out besides are tests of packages that are not installed (`pytest.importorskip`); `make test` installs them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
from packaging.specifiers import SpecifierSet

NO_GPU = not torch.cuda.is_available()


@dataclass(frozen=True)
class Skip:
    """tests: a regular expression, searched in `file.py::test[parameters]`; when: whether it holds here; reason: whose fault it is."""

    tests: str
    when: bool
    reason: str


def on_transformers(versions: str) -> bool:
    return SpecifierSet(versions, prereleases=True).contains(transformers.__version__)


def on_torch(versions: str) -> bool:
    return SpecifierSet(versions, prereleases=True).contains(torch.__version__)


def on_diffusers(versions: str) -> bool:
    try:
        return SpecifierSet(versions, prereleases=True).contains(version("diffusers"))
    except PackageNotFoundError:
        return False


SKIPS = [
    Skip(
        r"test_attentive_eraser\.py::test_(image_to_image|the_noise_on|an_inpainting|every_prompt_has|a_mask_is_read|bad_input)"
        r"|test_given_pictures\.py::test_(removal_runs|composition_runs|masks_of_a_recipe)|test_samplers\.py::test_sides_that_are_no_whole",
        on_diffusers("<0.37"),
        "diffusers 0.36 beside transformers 5: its AutoPipeline cannot be imported (MT5Tokenizer)",
    ),
    Skip(
        r"test_(images|text_only|visual_token_exit)\.py::.*\[(.*-)?llama4(-.*)?\]",
        on_transformers(">=5.24,<5.25"),
        "transformers 5.24: no forward of Llama 4 with images ends (it reads image_outputs, which its language model's output lacks)",
    ),
    Skip(
        r"test_architectures\.py::test_verified\[(codegen|gptj)\]",
        on_transformers("<5.24"),
        "they computed their softmax themselves before transformers 5.24",
    ),
    Skip(
        r"test_images\.py::test_generate_finds_the_same_grids\[llama4-3\]",
        on_transformers("<5.24"),
        "transformers 5.23 does not repeat Llama 4's pictures for beams and refuses",
    ),
    Skip(r"test_calls_per_layer\.py::", on_transformers("<5.24"), "its bounds were counted with the newest libraries"),
    Skip(
        r"test_simulated_device\.py::test_a_static_cache_is_asked_for_its_length_until_it_is_known",
        on_transformers("<5.24"),
        "static caches cannot be cropped before transformers 5.24",
    ),
    Skip(
        r"test_graphs\.py::test_generate_with_its_own_compilation",
        on_torch("<2.13"),
        "torch 2.9 makes a graph for each static cache, and generate a cache for each call, of the untouched model too",
    ),
    Skip(
        r"test_graphs\.py::test_what_a_family_gives_attention_besides_comes_along\[with_position_bias\]",
        on_torch("<2.13"),
        "torch 2.9 cannot trace copy.deepcopy, which T5 calls: graphs of the untouched model end there too",
    ),
    Skip(r"test_generation\.py::test_cache_implementations\[offloaded_static\]", NO_GPU, "offloaded caches need a GPU"),
    Skip(r"::test_cuda_(equals_the_reference|kernels_give_the_numbers)", NO_GPU, "needs a CUDA device"),
]


def reason_to_skip(test: str) -> str | None:
    return next((skip.reason for skip in SKIPS if skip.when and re.search(skip.tests, test)), None)
