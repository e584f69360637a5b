"""The wheel works in an empty environment without the repository in sight, and importing stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "interventions",
    "interventions/edits",
    "hooks",
    "recipes",
    "recipes/profiling",
    "comparison",
    "analysis",
    "zoo",
    "zoo/worlds",
    "zoo/train",
    "evaluation",
    "evaluation/suites",
    "evaluation/material",
    "evaluation/metrics",
    "command_line",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "reattend"
    # built from a copy of what git knows, so that build folders of the working tree play no part
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, source) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, cwd=out)
    return next(out.glob("reattend-*.whl"))


def test_wheel_holds_every_room_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for room in ROOMS:
        for path in (ROOT / room).iterdir():
            if path.suffix in (".py", ".pyi", ".html", ".json", ".yaml", ".txt"):
                assert f"reattend/{room}/{path.name}" in names, f"{path} is missing from the wheel"
    assert {"reattend/__init__.py", "reattend/__main__.py", "reattend/py.typed"} <= set(names)
    assert not [
        n for n in names if n.endswith("setup.py") or "/tests/" in n or n.startswith(("tests", "benchmarks", "examples"))
    ]


@pytest.fixture(scope="module")
def editable(tmp_path_factory, source) -> tuple[Path, str]:
    """(the interpreter of an environment that holds nothing but an editable install, what the build said)."""
    out = tmp_path_factory.mktemp("editable")
    code = f"from setuptools import build_meta; build_meta.build_editable({str(out)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    venv.create(out / "env", with_pip=False)
    site_packages = next((out / "env").rglob("site-packages"))
    zipfile.ZipFile(next(out.glob("reattend-*.whl"))).extractall(site_packages)
    return out / "env" / "bin" / "python", built.stdout + built.stderr


def without_python_settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def test_an_editable_install_shows_what_a_wheel_holds(editable, source, tmp_path):
    """The root holds setup.py and tests, too; neither belongs to the package, and importing the first would run a build."""
    python, said = editable
    code = (
        "import importlib.util, reattend; print(reattend.__file__);"
        "print([n for n in ('setup', 'tests', 'benchmarks', 'hooks') if importlib.util.find_spec('reattend.' + n)])"
    )
    found = subprocess.run([python, "-c", code], cwd=tmp_path, env=without_python_settings(), capture_output=True, text=True)
    where, names = found.stdout.splitlines()
    assert Path(where).resolve() == (source / "__init__.py").resolve() and names == "['hooks']"
    # a file that is new in a room is there at once
    new = source / "hooks" / "new.py"
    new.touch()
    try:
        assert (Path(where).parent / "hooks" / "new.py").exists()
    finally:
        new.unlink()


def test_an_editable_install_warns_of_nothing(editable):
    assert "Warning" not in editable[1]


def test_a_type_checker_finds_an_editable_install(editable, tmp_path):
    python, _ = editable
    (tmp_path / "user.py").write_text("import reattend\nfrom reattend.hooks import Session\nreveal_type(Session.remove)\n")
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(python), str(tmp_path / "user.py")]
    said = subprocess.run(command, cwd=tmp_path, env=without_python_settings(), capture_output=True, text=True).stdout
    assert "(self: Session) -> None" in said and " 0 errors" in f" {said.splitlines()[-1]}", said


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    # the heavy dependencies come from this environment; reattend itself only from the wheel
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, cwd=tmp_path)
    import torch

    site_packages = Path(torch.__file__).resolve().parents[1]
    probe = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    # a .pth line puts the dependencies on the path, but not the editable finder of this working tree
    (Path(probe.stdout.strip()) / "dependencies.pth").write_text(f"import sys; sys.path.append({str(site_packages)!r})\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = without_python_settings()
    listed = subprocess.run(
        [python, "-m", "reattend", "list"], cwd=empty, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "streaming" in listed and "emphasise" in listed
    where = subprocess.run(
        [python, "-c", "import reattend; print(reattend.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(tmp_path) in where
    loads = (
        "import reattend; [print(type(reattend.zoo.load(n)).__name__) for n, m in reattend.zoo.MODELS.items() if not m.around]"
    )
    loaded = subprocess.run(
        [python, "-c", loads], cwd=empty, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    kinds = ["tuple", "StableDiffusionPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline"]
    assert loaded == kinds, "the zoo's models load from the wheel"


def test_import_is_light():
    code = "import sys, reattend; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_language_users_need_no_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None; import reattend; reattend.list_recipes(); reattend.sites; reattend.apply"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
