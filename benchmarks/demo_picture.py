"""The picture of the demo's report in the README, as a browser shows it. Needs Chromium (or Chrome) on the PATH.

    python benchmarks/demo_picture.py                                   # runs the demo first, and writes docs/demo.png
    python benchmarks/demo_picture.py --report reattend-demo/report.html --dark --width 390 --out narrow.png

The other picture of the docs is drawn by `benchmarks/effect_attention.py --picture docs/attention.png`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1100, 1400
# Browsers have no narrower window than this; a narrower page is framed in it.
NARROWEST = 500


def screenshot(page: Path, out: Path, width: int, height: int, dark: bool) -> None:
    """The top of a page as PNG."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser found on the PATH: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, "frame.html")
        frame.write_text(
            f'<meta name="color-scheme" content="light dark"><body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
            f'style="width:{width}px;height:{height}px;border:0"></iframe>'
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder}/profile"]
        options += [f"--window-size={max(width, NARROWEST)},{height}", f"--screenshot={out.resolve()}", frame.as_uri()]
        subprocess.run([browser, *options], check=True, capture_output=True, timeout=120)
    with Image.open(out) as picture:
        cut = picture.convert("RGB").crop((0, 0, width, height))
    cut.quantize().save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=None, help="a report that is there; default: that of the demo, run now")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = given.report
        if page is None:
            from reattend.comparison.demo import demo

            _, page = demo(Path(folder), quiet=True)
        screenshot(page, given.out, given.width, given.height, given.dark)
    print(given.out)


if __name__ == "__main__":
    main()
