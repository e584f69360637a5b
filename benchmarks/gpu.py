"""What reattend does and costs on a GPU: right or wrong, and times beside the untouched call or model, as one page of Markdown.

    python benchmarks/gpu.py                     # four minutes; prints the page and writes it to gpu.md
    python benchmarks/gpu.py --seconds 800       # a slow card: all rows get more time
    python benchmarks/gpu.py --only calls,models # some sections, which share the time
    python benchmarks/gpu.py --dry-run           # every section on the CPU with toy sizes: tries the code, measures nothing

Each section runs in a process of its own, so that a fault of the device (or a compiler that does not end) costs one section. What has been
measured is in the file at once: a run that is killed leaves it. Needs torch and transformers; diffusers, the tests beside this folder and
the zoo where a section uses them; nothing from a network.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

START = time.monotonic()

# the process that starts the sections must not touch the device: they are copies of it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gpu_calls  # noqa: E402
import gpu_compiled  # noqa: E402
import gpu_edits  # noqa: E402
import gpu_lengths  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_models  # noqa: E402
import gpu_recipes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gpu_parts import Part, said  # noqa: E402
from gpu_targets import targets  # noqa: E402

GRACE = 20.0  # seconds that a section may take to end a row that it has begun


@dataclass(frozen=True)
class Section:
    """share: its part of the time; what it leaves is for those after it."""

    title: str
    share: float
    measure: Callable[[Part], None]


SECTIONS = {
    "machine": Section("Machine", 0.01, gpu_machine.measure),
    "edits": Section("Correctness of edits", 0.12, gpu_edits.measure),
    "recipes": Section("Correctness of recipes", 0.10, gpu_recipes.measure),
    "calls": Section("One call of attention", 0.15, gpu_calls.measure),
    "models": Section("End to end, eager Python", 0.36, gpu_models.measure),
    "compiled": Section("End to end, compiled", 0.20, gpu_compiled.measure),
    "lengths": Section("Decode over key lengths that the process has not seen", 0.06, gpu_lengths.measure),
}


class Page:
    """The parts of all sections as one file. folder: where the parts are kept meanwhile."""

    def __init__(self, out: Path, folder: Path, title: str, dry: bool) -> None:
        self.out, self.folder, self.title, self.dry = out, folder, title, dry
        self.ends: dict[str, str] = {}

    def part(self, name: str) -> dict:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"markdown": "", "figures": {}}

    def section(self, name: str) -> str:
        text = self.part(name)["markdown"] or f"## {SECTIONS[name].title}"
        return text + (f"\n\n**{self.ends[name]}**" if name in self.ends else "")

    def figures(self) -> dict[str, float]:
        return {key: value for name in SECTIONS for key, value in self.part(name)["figures"].items()}

    def write(self) -> None:
        begun = [name for name in SECTIONS if (self.folder / f"{name}.json").is_file() or name in self.ends]
        blocks = [self.title, *map(self.section, begun), targets(self.figures(), self.dry)]
        self.out.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def run(name: str, file: Path, until: float, dry: bool) -> None:
    """One section, in a process of its own."""
    with contextlib.suppress(OSError):
        os.setsid()
    end_with_parent()
    # what libraries print is no part of the page
    os.dup2(2, 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1 if dry else min(8, os.cpu_count() or 1))
    section, device = SECTIONS[name], torch.device("cpu" if dry else "cuda")
    part = Part(section.title, file, until, device, dry)
    try:
        with torch.no_grad():
            section.measure(part)
    except Exception as error:
        traceback.print_exc()
        part.say(f"**This section ended early: {said(error)}**")


def end_with_parent() -> None:
    """Nobody else would end a section whose run was killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def beside(name: str, page: Page, until: float, dry: bool, start: str) -> str:
    """Starts a section and waits for it, while the page is kept up to date. What ended it early, "" if nothing did."""
    sys.stdout.flush()
    process = get_context(start).Process(target=run, args=(name, page.folder / f"{name}.json", until, dry))  # type: ignore[attr-defined]
    process.start()
    try:
        while process.is_alive():
            if time.monotonic() > until + GRACE:
                return f"This section was ended {GRACE:.0f} seconds after its time was used up; its last row had not come to an end."
            page.write()
            process.join(0.5)
    finally:
        if process.is_alive():
            # with the processes that it began (compilers)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    code = process.exitcode
    if code and code < 0:
        return f"The process of this section was ended by {signal.Signals(-code).name}."
    return f"The process of this section ended with {code}." if code else ""


def use_gpu() -> None:
    """For a process that is to find out whether it can."""
    sys.exit(0 if torch.cuda.is_available() and torch.ones(1, device="cuda").item() == 1 else 1)


def start_method(dry: bool) -> str | None:
    """How sections are started: as copies of this process, which saves them the imports, or anew; None where there is no GPU.

    This process never touches the device. Where an import of it did, a copy cannot use it.
    """
    methods = [method for method in ("fork", "spawn") if method in get_all_start_methods()]
    if dry:
        return methods[0]
    if torch.version.cuda is None and torch.version.hip is None:
        return None
    for method in methods:
        process = get_context(method).Process(target=use_gpu)  # type: ignore[attr-defined]
        process.start()
        process.join()
        if process.exitcode == 0:
            return method
    return None


def chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names] or list(SECTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="file of the page; gpu.md, or gpu-dry-run.md")
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything, imports included")
    parser.add_argument("--only", type=chosen, default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with toy sizes: times mean nothing")
    given = parser.parse_args()
    start = start_method(given.dry_run)
    if start is None:
        print("there is no GPU here that torch can use: nothing was measured (--dry-run tries the code on the CPU)")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = given.out or Path("gpu-dry-run.md" if given.dry_run else "gpu.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"# On a GPU, {date.today().isoformat()}"
    if given.dry_run:
        title = "# A dry run on the CPU with toy sizes: no figure here says anything about any device"
    with tempfile.TemporaryDirectory(prefix="reattend-gpu-") as folder:
        page = Page(out, Path(folder), title, given.dry_run)
        print(title, flush=True)
        # what the sections have in common is imported once, and counted
        begun = time.monotonic()
        budget, used = max(given.seconds - (begun - START), 1.0), 0.0
        whole = sum(SECTIONS[name].share for name in given.only)
        for name in given.only:
            used += SECTIONS[name].share / whole
            until = begun + budget * used
            print(f"{name}: until {until - START:.0f} s", file=sys.stderr, flush=True)
            why = beside(name, page, until, given.dry_run, start)
            if why:
                page.ends[name] = why
            page.write()
            print("\n" + page.section(name), flush=True)
        print("\n" + targets(page.figures(), given.dry_run), flush=True)
    print(f"\nThis took {time.monotonic() - START:.0f} seconds; the page is in {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
