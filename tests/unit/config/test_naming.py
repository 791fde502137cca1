"""The names of run folders: what they tell, and that the same command finds its folder again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayprune.config import load_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "digits_infobatch.yaml"
    file.write_text("method: {name: infobatch, prune_ratio: 0.5}\ntrain: {epochs: 20}\n")
    return file


def label(config: Path, *overrides: str) -> str:
    """Return what a run's name has between the config's name and the digest."""
    loaded = load_config(config, overrides)
    name = str(loaded.run.name)
    assert name.startswith(f"{config.stem}-")
    assert name.endswith(f"-{loaded.digest()}")
    return name.removeprefix(config.stem).removesuffix(loaded.digest()).strip("-")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ""),
        (["train.epochs=20", "method.prune_ratio=0.5"], ""),  # as in the file
        (["scaling.num_workers=0", "train.stop_after=3", "run.max_failures=1"], ""),  # not in the digest
        (["train.epochs=5"], "epochs_5"),
        (["train.seed=1", "optim.lr=1e-3"], "lr_0.001-seed_1"),
        (["method.name=random_epoch"], "random_epoch"),
        (["method={name: random_epoch, prune_ratio: 0.3}"], "random_epoch-prune_ratio_0.3"),
        (["method.prune_ratio={schedule: linear, start: 0.0, end: 0.6}"], "prune_ratio_linear"),
        (["optim.schedule=step", "optim.name=adamw"], "optim_adamw-schedule_step"),
        (["train.step=l2w", "model.name=msdnet"], "model_msdnet-step_l2w"),
        (["data.source=nets/mine.py:make data"], "data_make_data"),
        (["train.record=[el2n, margin]"], "record_el2n_margin"),
    ],
)
def test_a_name_tells_the_method_and_what_was_changed(config: Path, overrides: list[str], expected: str) -> None:
    assert label(config, *overrides) == expected


def test_the_method_is_named_if_the_name_of_the_config_lacks_it(config: Path) -> None:
    assert label(config.rename(config.with_name("mine.yaml"))) == "infobatch"


def test_a_config_that_needs_its_overrides_is_named(config: Path) -> None:
    config.write_text("method: {name: infobatch}\ntrain: {batch_size: 30}\nscaling: {num_workers: 4}\n")
    assert label(config, "train.batch_size=40") == "batch_size_40"


def test_a_long_name_is_cut_between_words_and_keeps_its_digest(config: Path) -> None:
    keys = ("momentum", "weight_decay", "warmup", "gamma", "lr")
    words = label(config, *(f"optim.{key}=0.123456789" for key in keys), "train.label_smoothing=0.123456789")
    assert len(words) <= 80
    assert words.split("-") == ["gamma_0.1235", "lr_0.1235", "momentum_0.1235", "warmup_0.1235", "weight_decay_0.1235"]


def test_the_order_of_the_overrides_does_not_matter(config: Path) -> None:
    words = ["train.epochs=5", "optim.lr=0.2"]
    assert load_config(config, words).run.name == load_config(config, words[::-1]).run.name


def test_a_run_keeps_the_folder_that_it_has(config: Path) -> None:
    digest = load_config(config, ["train.epochs=5"]).digest()
    old = Path("runs") / f"{config.stem}-{digest}"
    old.mkdir(parents=True)
    (old.parent / f"other-{digest}").mkdir()
    assert load_config(config, ["train.epochs=5"]).run.name == old.name
    assert load_config(config, ["train.epochs=6"]).run.name != old.name
    old.rename(old.with_name(named := f"{config.stem}-epochs_5-{digest}"))
    config.write_text("method: {name: infobatch, prune_ratio: 0.5}\ntrain: {epochs: 5}\n")
    assert load_config(config).run.name == named  # the same settings, now in the file


def test_a_name_that_the_user_gives_wins(config: Path) -> None:
    assert load_config(config, ["train.epochs=5", "run.name=kept"]).run.name == "kept"
