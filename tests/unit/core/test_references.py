"""References `module:name` and `path/to/file.py:name`: what they may name, and how the current folder counts."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rayprune.core.references import DRIVER_FOLDER, UserCode, load_object, names_code, user_modules
from rayprune.errors import ConfigError
from tests.support.command_line import environment


@pytest.fixture
def forget() -> object:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("text", ["os", "a:", ":b", "https://host/x", "s3://key:secret@bucket/a", "a-b:c", "a:b.c", 3])
def test_only_one_form_names_code(text: object) -> None:
    assert not names_code(text)
    if isinstance(text, str):
        with pytest.raises(ConfigError, match="is not a reference"):
            load_object(text)


@pytest.mark.usefixtures("forget")
def test_the_current_folder_is_last_and_only_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colorsys.py").write_text("raise ImportError('hides a library')")
    (tmp_path / "of_the_folder.py").write_text("import colorsys, sys\nlast = sys.path[-1]\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before = list(sys.path)
    assert load_object("of_the_folder:last") == str(tmp_path)
    assert sys.path == before
    # Workers get the modules of the folder by value, and not those of libraries.
    assert [module.__name__ for module in user_modules() if module.__name__ in ("of_the_folder", "colorsys")] == [
        "of_the_folder"
    ]


@pytest.mark.usefixtures("forget")
def test_a_module_that_fails_leaves_the_path_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text("raise OSError('no device')")
    before = list(sys.path)
    with pytest.raises(OSError, match="no device"):
        load_object("broken_module:x")
    with pytest.raises(ConfigError, match="module 'of_nobody' was not found"):
        load_object("of_nobody:x")
    assert sys.path == before


@pytest.mark.usefixtures("forget")
def test_a_worker_looks_in_the_folder_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_driver.py").write_text("x = 1")
    monkeypatch.syspath_prepend(f"{DRIVER_FOLDER}{tmp_path}")
    assert load_object("of_the_driver:x") == 1


ELSEWHERE = """
import pickle, sys
from pathlib import Path
from rayprune.core.references import load_object, user_modules
code, *references = sys.argv[1:]
carried = pickle.loads(Path(code).read_bytes())
Path(code).write_bytes(pickle.dumps(carried))
for reference in references:
    print(load_object(reference))
again = {module.__name__ for module in user_modules()}
assert {"shapes.sizes", "net_of_mine"} <= again, again
try:
    raise ValueError(load_object("net_of_mine:fail")())
except ZeroDivisionError as error:
    print(error.__traceback__.tb_next.tb_frame.f_code.co_filename)
"""


def test_modules_of_the_folder_and_files_load_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    (here / "shapes").mkdir(parents=True)
    other.mkdir()
    (here / "shapes" / "__init__.py").write_text("")
    (here / "shapes" / "sizes.py").write_text("width = 7\n")
    (here / "no_init").mkdir()
    (here / "no_init" / "units.py").write_text("unit = 'mm'\n")
    (here / "net_of_mine.py").write_text(
        "from no_init.units import unit\nfrom shapes.sizes import width\n"
        "name = f'of {width} {unit}'\n\ndef fail():\n    1 / 0\n"
    )
    (here / "real.py").write_text("name = 'a file'\n")
    (here / "file.py").symlink_to(here / "real.py")
    monkeypatch.chdir(here)
    before = set(sys.modules)
    references = ["net_of_mine:name", f"{here / 'file.py'}:name"]
    try:
        assert [load_object(reference) for reference in references] == ["of 7 mm", "a file"]
        (tmp_path / "code").write_bytes(pickle.dumps(UserCode()))
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    shutil.rmtree(here)
    command = [sys.executable, "-P", "-c", ELSEWHERE, str(tmp_path / "code"), *references]
    for _ in range(2):  # the first process passes the code on to the second, before it loads it
        done = subprocess.run(command, cwd=other, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["of 7 mm", "a file", str(here / "net_of_mine.py")]
