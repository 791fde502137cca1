"""Draw the figures of the docs from real runs: `python docs/make_figures.py [FOLDER]`, about five minutes on two cores.

docs/figures/digits_compare.png   the arms of a comparison over 20 seeds, relative to full training
docs/figures/report.png           the first part of a report, in Chromium (not redrawn without it)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
BROWSER = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,1500",
)


def rayprune(*words: str) -> None:
    """Run a command of rayprune, from the project's root."""
    subprocess.run([sys.executable, "-m", "rayprune", *words], cwd=ROOT, check=True)


def screenshot(page: Path, picture: Path) -> bool:
    """Take a picture of the first part of a page; return whether a browser was found."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, *BROWSER, f"--user-data-dir={profile}", f"--screenshot={picture}", page.resolve().as_uri()]
        subprocess.run(words, check=True, capture_output=True, timeout=120)
    return picture.exists()


def main(folder: Path) -> None:
    """Train, compare, and draw into docs/figures."""
    FIGURES.mkdir(exist_ok=True)
    compared = folder / "compared"
    rayprune(
        "compare", "configs/digits_compare.yaml", "compare.seeds=20", f"run.storage_path={folder}", "run.name=compared"
    )
    shutil.copy(compared / "compare.png", FIGURES / "digits_compare.png")
    configs = ["configs/digits_full.yaml", "configs/digits_infobatch.yaml"]
    rayprune("train", *configs, f"run.storage_path={folder / 'demo'}")
    rayprune("report", str(folder / "demo"))
    if not screenshot(folder / "demo" / "report.html", FIGURES / "report.png"):
        print("no Chromium found: docs/figures/report.png was not redrawn")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/figures"))
