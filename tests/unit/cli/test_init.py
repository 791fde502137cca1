"""`rayprune init` as a user types it: what it writes and prints, and how it refuses."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from rayprune.cli.init import init
from rayprune.cli.main import cli
from rayprune.config.shipped import shipped_configs
from rayprune.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> str:
    done = CliRunner().invoke(init, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_without_a_name_it_lists_every_config_in_one_line() -> None:
    lines = run().splitlines()
    for name, file in shipped_configs().items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        about = line.removeprefix(name).strip()
        assert file.read_text().startswith(f"# {about}\n")
        assert about.endswith((".", "?")), "the first line of a config says in one sentence what it is for"
        assert len(line) <= 120
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("name", shipped_configs())
def test_it_copies_a_config_and_names_the_next_command(name: str) -> None:
    printed = run(name)
    assert Path(f"{name}.yaml").read_bytes() == shipped_configs()[name].read_bytes()
    wrote, following = printed.splitlines()
    assert wrote == f"wrote {name}.yaml"
    program, command, *words = shlex.split(following.removeprefix("next: "))
    assert (program, words[0]) == ("rayprune", f"{name}.yaml")
    assert cli.commands[command].make_context(command, list(words))
    if not name.startswith("digits"):
        assert words[1].startswith("data.path=/path/to/")


def test_a_recipe_may_be_named_with_its_folder() -> None:
    assert run("recipes/cifar10_infobatch").startswith("wrote cifar10_infobatch.yaml\n")
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "cifar10_infobatch.yaml"]


def test_it_writes_to_another_place() -> None:
    assert "rayprune train 'my config.yaml'" in run("digits_full", "my config.yaml")
    assert "wrote one/two/digits_full.yaml" in run("digits_full", "one/two")
    assert Path("my config.yaml").read_text() == Path("one/two/digits_full.yaml").read_text()


def test_it_overwrites_nothing() -> None:
    Path("digits_full.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"digits_full\.yaml exists: .*rayprune init digits_full PATH"):
        run("digits_full")
    assert Path("digits_full.yaml").read_text() == "mine"


def test_an_unknown_name_gets_the_list_and_the_closest_name() -> None:
    done = CliRunner().invoke(init, ["digits_infobach"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'digits_infobatch'?" in str(done.exception)
    assert all(name in done.output for name in shipped_configs())


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_named(place: str) -> None:
    Path("file").touch()
    with pytest.raises(ConfigError, match="can't be made"):
        run("digits_full", place)


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("digits_full", "~/mine.yaml")
    assert (tmp_path / "home" / "mine.yaml").is_file()
