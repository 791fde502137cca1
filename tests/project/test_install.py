"""The wheel works alone: built from a copy of the tree, installed in a fresh environment, run outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from rayprune.engine.storage.run_folder import read_metrics
from tests.support.paths import ROOT

TREE = ("pyproject.toml", "README.md", "LICENSE", "rayprune", "configs", "tests")
# Without the checkout and the running environment's packages on PYTHONPATH.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def call(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    """Build a wheel of a tree or an sdist, with the setuptools of this environment."""
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder]
    call(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source.parent)
    (wheel,) = folder.glob("rayprune-*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree, as builds write into it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of a fresh environment with the wheel.

    Its dependencies are those of the running environment, but not that one's rayprune: an editable install lies in a
    .pth file, and Python does not read the .pth files of a folder that a .pth file names.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(packages) + "\n")
    imported = call(python, "-c", "import rayprune, torch; print(rayprune.__file__)", cwd=folder)
    assert Path(imported.strip()) == own / "rayprune" / "__init__.py"
    return folder / "bin"


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = [path.relative_to(ROOT) for path in (ROOT / "rayprune").rglob("*.*") if path.suffix != ".pyc"]
    shipped = [path for pattern in ("*.yaml", "recipes/*.yaml") for path in (ROOT / "configs").glob(pattern)]
    configs = [Path("rayprune") / path.relative_to(ROOT) for path in shipped]
    assert names == {path.as_posix() for path in [*package, *configs] if (ROOT / path).is_file()}
    assert {"rayprune/py.typed", "rayprune/report/page.html.j2", "rayprune/configs/digits_full.yaml"} <= names
    assert "rayprune/configs/recipes/cifar10_infobatch.yaml" in names


def test_an_sdist_gives_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    call(sys.executable, "-c", build, cwd=tree)
    (sdist,) = tmp_path.glob("rayprune-*.tar.gz")
    again = build_wheel(sdist, tmp_path / "wheel")
    contents = [
        {info.filename: info.CRC for info in zipfile.ZipFile(file).infolist() if not info.filename.endswith("RECORD")}
        for file in (wheel, again)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.scenario)])
def test_the_main_job_runs_outside_the_checkout(workers: int, programs: Path, tmp_path: Path) -> None:
    rayprune = programs / "rayprune"
    printed = call(rayprune, "init", "digits_infobatch", cwd=tmp_path)
    assert "next: rayprune train digits_infobatch.yaml" in printed
    small = ["train.epochs=3", f"scaling.num_workers={workers}", "scaling.threads=1"]
    call(rayprune, "train", "digits_full", "digits_infobatch.yaml", *small, cwd=tmp_path)
    call(rayprune, "report", "runs", cwd=tmp_path)
    full, pruned = (read_metrics(folder)[-1] for folder in sorted((tmp_path / "runs").glob("digits_*")))
    assert pruned["samples_trained"] < full["samples_trained"]
    assert pruned["val_accuracy"] > 0.2
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "digits_infobatch" in page
    assert "data:image/" in page or "<svg" in page
