"""What a type checker, and so an editor, shows in a user's file: nobody runs it, so the lazy root must be seen without that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reattend

# expression -> its type as pyright says it
SHOWN = {
    "pipe": "WrappedTextGeneration",
    'pipe("Once")': "list[dict[str, str]]",
    'pipe.use("emphasise", text="a", alpha=0.3)': "Session",
    'pipe.compare("streaming", text="a")': "Report",
    'pipe.compare(["streaming", "act"], text="a")': "Sweep",
    "pipe.sites()": "SiteTable",
    "reattend.wrap(pipe)": "WrappedTextGeneration",
    'reattend.wrap(pipeline("image-text-to-text", "x"))': "WrappedImageTextToText",
    'reattend.wrap(AutoModelForCausalLM.from_pretrained("x"))': "WrappedModel",
    "session.stats": "dict[str, dict[str, int]]",
    'reattend.apply(pipe, "streaming", window=512)': "Session",
    'reattend.apply(pipe, name, ("emphasise", {"alpha": 0.3}))': "Session",
    'reattend.recipe("emphasise", text="a").alpha': "float | None",
    'reattend.compare(pipe, "streaming")': "Report",
    'reattend.compare(pipe, ["streaming", "act"])': "Sweep",
    'sd("a tree")': "StableDiffusionPipelineOutput | tuple[Unknown, ...]",
    "sd.unet": "Any",
    'sd.use("softpag")': "Session",
}
USER = """
import reattend
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import AutoModelForCausalLM, pipeline

name = input()
pipe = reattend.wrap(pipeline("text-generation", "x"))
sd = reattend.wrap(StableDiffusionPipeline.from_pretrained("x"))
with pipe.use("streaming", window=512) as session:
    print(pipe("Once"))
"""


@pytest.mark.slow
def test_a_users_file_shows_types(tmp_path):
    pytest.importorskip("diffusers")
    lines = [*USER.splitlines(), *(f"reveal_type({expression})" for expression in SHOWN), "reveal_type(reattend.apply)"]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    # where the package of this run lies, also where it is on the path by other means than an install
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"include": ["user.py"], "extraPaths": [str(Path(reattend.__file__).parents[1])]})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    said = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout)["generalDiagnostics"]
    assert not [d["message"] for d in said if d["severity"] == "error"]
    types = {d["range"]["start"]["line"]: d["message"].rsplit(' is "', 1)[1].removesuffix('"') for d in said}
    first = len(USER.splitlines())
    assert {expression: types[first + place] for place, expression in enumerate(SHOWN)} == SHOWN
    # the names and parameters of recipes, which an editor completes from
    whole = types[first + len(SHOWN)]
    assert all(f"name: Literal['{slug}']" in whole for slug in reattend.list_recipes())
    assert "**parameters: **EmphasiseParameters" in whole


def test_the_lazy_root_is_the_same_for_a_type_checker():
    """What is imported for type checkers alone, and the list of names, go with the names that are found on first use."""
    import ast

    tree = ast.parse(Path(reattend.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    named = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == {"guiders", "zoo", *reattend._LAZY}
    assert set(reattend.__all__) == {"__version__", "zoo", *reattend._LAZY}
    assert all(getattr(reattend, name) is not None for name in reattend.__all__)
