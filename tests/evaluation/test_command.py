"""`reattend eval`, in this process, in one of its own, and shared by two."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import reattend
import torch
from reattend import __main__ as command_line
from reattend.command_line import console
from typer.testing import CliRunner

# prints no more than it must, asks little: what is tested here is the command, not the model
SMALL = ["--suite", "chair:tokens=4", "--count", "5", "--batch", "2", "--resamples", "50"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from reattend.zoo.train.shapes_llava import build_model, build_processor

    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.dim() == 2:
            parameter.data *= 4
    where = tmp_path_factory.mktemp("models") / "untrained"
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return str(where)


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setitem(console.state, "debug", False)
    return lambda *arguments: CliRunner().invoke(command_line.app, ["eval", *arguments])


def test_a_run_and_its_files(call, folder, tmp_path):
    recipes = ["--recipes", "none,var:move=0.9", "--set", "var.sink_dims=[1, 5]", "--set", "tau=1.0", "--set", "summ=0.0"]
    arguments = ["--model", folder, *SMALL, *recipes, "--set", "chair.noise=0.2", "--out", str(tmp_path)]
    first = call(*arguments, "--json")
    assert first.exit_code == 0, first.output
    data = json.loads(first.stdout)
    assert data["suites"] == [
        {
            "name": "chair",
            "version": 1,
            "noise": 0.2,
            "contrast": 0.5,
            "patches": 3,
            "habits": "kept",
            "side": 48,
            "crowded": False,
            "tokens": 4,
        }
        | {"prompt": "describe the image ."}
    ]
    plain, steered = data["cells"]
    assert plain["recipe"] == "none" and steered["recipe"] == "var(sink_dims=[1, 5], tau=1.0, summ=0.0, move=0.9)"
    assert plain["changes"] is None and set(steered["changes"]) == set(steered["metrics"]) and steered["edits_applied"] > 0
    assert data == json.loads((tmp_path / "results.json").read_text())
    answers = [json.loads(line) for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()]
    assert sum(len(line["records"]) for line in answers if "records" in line) == 10
    assert json.loads(call(*arguments, "--json").stdout) == data, (
        "the second run reads what the first one wrote, times included"
    )
    table = call(*arguments)
    assert table.exit_code == 0 and "chair_i" in table.stdout and "results.json" in table.stdout


def test_without_a_suite_they_are_listed(call):
    listed = json.loads(call("--json").stdout)
    assert {"pope", "chair", "questions"} <= set(listed) and listed["pope"]
    assert "chair" in call().stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "chair"], "--model"),
        (["--suite", "chiar", "-m", "x"], "did you mean 'chair'"),
        (["--suite", "chair", "-m", "x", "-r", "streeming"], "did you mean 'streaming'"),
        (["--suite", "chair", "-m", "x", "--set", "move=1"], "--set move: write name.key=value"),
        (["--suite", "chair", "-m", "x", "-r", "var", "--set", "vhr.move=1"], "'vhr' is none of: chair, var"),
        (["--suite", "chair", "-m", "x", "--set", "chair.nois=1"], "nois is not a parameter of 'chair'"),
        (["--suite", "chair", "-m", "zoo:shapes-lava"], "did you mean 'shapes-llava'"),
    ],
)
def test_bad_input_is_one_line(call, arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and words in result.stderr and "Traceback" not in result.stderr


def test_in_python_it_is_one_call():
    assert reattend.evaluate.__name__ == "evaluate"


@pytest.mark.slow
def test_two_processes_share_the_work(call, folder, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    ask = ["--model", folder, *SMALL, "--recipes", "none", "--json"]
    command = [*launch, "-m", "reattend", "eval", *ask, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    alone = json.loads(call(*ask, "--out", str(tmp_path / "one")).stdout)
    assert shared["environment"]["processes"] == 2 and alone["environment"]["processes"] == 1
    for a, b in zip(shared["cells"], alone["cells"], strict=True):
        assert a["metrics"] == b["metrics"] and a["items"] == b["items"] == 5
    # 3 batches: two by the first process, one by the second
    files = sorted((tmp_path / "two" / "answers").iterdir())
    held = [[json.loads(line) for line in file.read_text().splitlines()][1:] for file in files]
    assert [len(lines) for lines in held] == [2, 1]
    # one process alone goes on from what two have done: nothing is left to do
    again = json.loads(call(*ask, "--out", str(tmp_path / "two")).stdout)
    assert again["cells"] == shared["cells"] and sorted((tmp_path / "two" / "answers").iterdir()) == files
