"""Other versions than those of constraints.txt: the floors of pyproject.toml, other Pythons, and the newest of everything.

    python tests/versions.py floors     # make floors: one environment for each entry of `recorded`, the subset of tests in each; writes
                                        # docs/versions.json and docs/support.md
    python tests/versions.py newest     # make newest: beyond the caps, in .venv-newest; writes nothing, exits 1 where a test failed

It needs Python 3.11 and the standard library only. An environment that is already there is brought up to date, not made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import support_page

ROOT = Path(__file__).resolve().parents[1]
# what other versions break first: kernels, passes and caches, branches, denoisers, one recipe per kind of door, the command line
SUBSET = (
    "tests/interventions/test_exactness.py",
    "tests/hooks/test_generation.py",
    "tests/hooks/test_branch.py",
    "tests/hooks/test_pipelines.py",
    "tests/hooks/test_sessions.py",
    "tests/recipes/test_emphasise.py",
    "tests/recipes/test_streaming.py",
    "tests/recipes/test_pai.py",
    "tests/recipes/test_softpag.py",
    "tests/test_command_line.py",
)
# what the tests themselves need; never a floor of ours
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "sentencepiece", "setuptools>=77")


@dataclass
class Environment:
    """python: a version as 3.11; packages: what pip is told to install; options: further arguments of pip."""

    name: str
    python: str
    packages: list[str]
    options: list[str] = field(default_factory=list)


def requirements() -> list[str]:
    """Of the package and of image generation, as pyproject.toml states them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["diffusion"]]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[ ]", requirement, maxsplit=1)[0]


def lowest_python() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["requires-python"].removeprefix(">=")


def floors() -> list[str]:
    """Each requirement at its lowest version, all at once. Raises ValueError for a requirement without a floor."""
    found = []
    for requirement in requirements():
        lowest = re.search(r">=([\w.]+)", requirement)
        if lowest is None:
            raise ValueError(f"pyproject.toml: {requirement} has no lowest version")
        found.append(f"{name_of(requirement)}=={lowest[1]}")
    return found


def recorded() -> list[Environment]:
    """What `make floors` runs and writes down. The pinned torch first, so that no other build of it is pulled in."""
    named = [name_of(r) for r in requirements()]
    pinned = ["-c", "constraints.txt"]
    return [
        Environment("every floor", lowest_python(), floors()),
        Environment("constraints.txt", "3.12", named, pinned),
        Environment("constraints.txt", "3.13", named, pinned),
    ]


def newest_torch(python: Path) -> str:
    """The newest build for the CPU where the index has such builds, else the newest: on Linux PyPI's carries CUDA's libraries along."""
    listed = run([python, "-m", "pip", "index", "versions", "torch"], capture=True)
    available = re.search(r"Available versions: (.*)", listed)
    versions = available[1].split(", ") if available else []
    return next((f"torch=={v}" for v in versions if v.endswith("+cpu")), "torch")


def run(command: list, capture: bool = False, check: bool = True) -> str:
    """Runs from the repository's root, without whatever Python settings this process has."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    output = subprocess.PIPE if capture else None
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, stdout=output, text=True, check=check)
    return done.stdout or ""


def interpreter(version: str) -> str:
    """A Python of this version: this one, one on the path, or one of pyenv's. Raises SystemExit where there is none."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")
    if found is None:
        raise SystemExit(f"no Python {version} found: install it, or leave the environments that need it out with --only")
    return found


def make(environment: Environment, folder: Path) -> Path:
    """The environment's interpreter, everything installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        run([interpreter(environment.python), "-m", "venv", folder])
        run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
    install = [python, "-m", "pip", "install", "--quiet", *environment.options]
    run([*install, *(p for p in environment.packages if name_of(p) == "torch")])
    run([*install, *environment.packages, *TOOLS])
    # without its requirements: their caps are what `newest` goes beyond
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."])
    return python


def test(python: Path, folder: Path, limit: int) -> dict:
    """Runs the subset; {python, versions, passed, skipped, failed}."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-n", "2", "--dist", "loadfile", "-m", "not slow", f"--junitxml={report}", "--tb=short"]
    log = folder / "tests.log"
    with log.open("w") as out:
        command = [str(python), "-m", "pytest", *options, *SUBSET]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            return {**facts(python), "passed": 0, "skipped": 0, "failed": [f"not finished after {limit} s"]}
    if not report.exists():
        return {**facts(python), "passed": 0, "skipped": 0, "failed": [f"pytest did not run, see {log}"]}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{c.get('classname', '').split('.')[-1]}::{c.get('name')}" for c in cases if {x.tag for x in c} & {"failure", "error"}
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {**facts(python), "passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def facts(python: Path) -> dict:
    code = "import json, platform, sys; from importlib.metadata import version as v; "
    code += (
        "print(json.dumps({'python': platform.python_version(), 'versions': {n: v(n).split('+')[0] for n in sys.argv[1:]}}))"
    )
    return json.loads(run([python, "-c", code, *(name_of(r) for r in requirements())], capture=True))


def newest(folder: Path, torch: str | None, limit: int) -> int:
    named = [name_of(r) for r in requirements() if name_of(r) != "torch"]
    python = folder / "bin" / "python"
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", folder])
    run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
    torch = torch or newest_torch(python)
    make(Environment("newest", "", [torch, *named]), folder)
    found = test(python, folder, limit)
    listed = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"newest: {listed}\nnewest: {found['passed']} tests of the subset passed, these did not: {found['failed'] or 'none'}")
    return 1 if found["failed"] else 0


def keep(label: str, found: dict) -> None:
    """Writes a run into the record, in the order of `recorded`, and the page anew."""
    record = json.loads(support_page.VERSIONS.read_text(encoding="utf-8")) if support_page.VERSIONS.exists() else {}
    record[label] = found
    order = [label_of(environment) for environment in recorded()]
    record = {name: record[name] for name in order if name in record}
    support_page.VERSIONS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    support_page.write()


def label_of(environment: Environment) -> str:
    return f"{environment.name}, Python {environment.python}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["floors", "newest"])
    parser.add_argument("--folder", type=Path, help="where environments are made (.venv-floors, .venv-newest)")
    parser.add_argument("--only", nargs="*", help="floors: only environments whose name or Python is one of these")
    parser.add_argument("--torch", help="newest: another torch than the index's newest for the CPU, as torch==2.13.0")
    parser.add_argument("--limit", type=int, default=3600, help="seconds that the tests of one environment may take")
    given = parser.parse_args()
    if given.what == "newest":
        return newest((given.folder or ROOT / ".venv-newest").resolve(), given.torch, given.limit)
    failed = False
    for environment in recorded():
        label = label_of(environment)
        if given.only and not {environment.name, environment.python} & set(given.only):
            continue
        folder = (given.folder or ROOT / ".venv-floors").resolve() / label.replace(", ", "-").replace(" ", "-")
        print(f"{label}: {folder}", flush=True)
        found = test(make(environment, folder), folder, given.limit)
        failed = failed or bool(found["failed"])
        print(f"{label}: {found['passed']} tests passed, failed: {found['failed'] or 'none'}", flush=True)
        keep(label, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
