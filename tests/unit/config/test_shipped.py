"""The shipped configs: found by name, and never instead of a file of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayprune.config import load_config, read_config
from rayprune.config.shipped import find_config, shipped_configs
from tests.support.paths import ROOT


def test_every_config_of_the_checkout_is_shipped() -> None:
    examples, recipes = (sorted((ROOT / "configs").glob(pattern)) for pattern in ("*.yaml", "recipes/*.yaml"))
    assert len(recipes) > 10
    # A name shared by an example and a recipe would leave out one of them.
    assert [file.resolve() for file in shipped_configs().values()] == [*examples, *recipes]


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_is_found_and_valid_in_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(name, ["data.path=here"])
    copied = tmp_path / "elsewhere" / f"{name}.yaml"
    copied.parent.mkdir()
    copied.write_text(shipped_configs()[name].read_text())
    assert load_config(copied, ["data.path=here"]) == shipped
    assert shipped.run.name.startswith(name)
    assert shipped.run.name.endswith(f"-{shipped.digest()}")


def test_a_recipe_is_found_with_and_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = shipped_configs()["cifar10_infobatch"]
    assert recipe.parent.name == "recipes"
    assert find_config("cifar10_infobatch") == find_config("recipes/cifar10_infobatch") == recipe
    assert find_config("recipes/digits_full") == Path("recipes/digits_full")
    assert load_config("recipes/cifar10_infobatch") == load_config("cifar10_infobatch")
    Path("recipes").mkdir()
    Path("recipes/cifar10_infobatch.yaml").write_text("train: {epochs: 7}")
    assert read_config("recipes/cifar10_infobatch").train.epochs == 7


def test_a_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits_full").mkdir()
    assert find_config("digits_full") == shipped_configs()["digits_full"]
    Path("digits_full.yaml").write_text("train: {epochs: 7}")
    assert read_config("digits_full").train.epochs == 7
    Path("digits_full").rmdir()
    Path("digits_full").write_text("train: {epochs: 9}")
    assert read_config("digits_full").train.epochs == 9
    Path("mine.yaml").write_text("train: {epochs: 8}")
    assert read_config("mine").train.epochs == 8


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("nope.yaml", "No such file or directory: rayprune init lists the shipped configs"),
        ("digits_infobach", "did you mean 'digits_infobatch'?"),
        ("configs/digits_full.yaml", "named 'digits_full'.* rayprune init digits_full"),
        ("configs/recipes/cifar10_dynams.yaml", "named 'cifar10_dynams'.* rayprune init cifar10_dynams"),
        ("digits_full.yaml", "named 'digits_full'.* rayprune init digits_full"),
    ],
)
def test_a_missing_config_is_named_with_the_cure(
    path: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"config '{path}' can't be read: .*{cure}"):
        read_config(path)


def test_a_name_with_a_dot_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("v1.2.yaml").write_text("method: full\n")
    assert find_config("v1.2") == Path("v1.2.yaml")
