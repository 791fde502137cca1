"""Configs: reading, mistakes in one line, digests."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rayprune.cli.schema import Key, all_choices, keys_of
from rayprune.config import Config, load_config, make_config
from rayprune.config.schema import Augmentation
from rayprune.config.shipped import shipped_configs
from rayprune.config.yaml import read_yaml
from rayprune.errors import ConfigError
from tests.support.paths import ROOT

DIGITS = {"data": {"source": "digits"}}
CONFIGS = list(shipped_configs().values())
DIGITS_FULL = ROOT / "configs" / "digits_full.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_reads_back_to_itself(path: Path) -> None:
    config = load_config(path)
    assert Config.model_validate(read_yaml(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"data": 3}, ["data = 3"]),
        ({**DIGITS, "trian": {}}, ["'trian'", "'train'"]),
        ({**DIGITS, "train": {"epohcs": 3}}, ["'train.epohcs'", "'epochs'"]),
        ({**DIGITS, "train": {"epochs": 0}}, ["train.epochs", "0", "at least 1"]),
        ({**DIGITS, "train": {"epochs": "many"}}, ["train.epochs", "'many'", "must be a whole number"]),
        ({**DIGITS, "method": {"name": "infobach"}}, ["'infobach'", "'infobatch'"]),
        ({**DIGITS, "method": {"name": "infobatch", "prune_ratio": 1.0}}, ["1.0", "[0, 1)"]),
        ({**DIGITS, "method": {"name": "infobatch", "prune_ratoi": 0.5}}, ["'method.prune_ratoi'", "'prune_ratio'"]),
        ({**DIGITS, "train": {"batch_size": 33}, "scaling": {"num_workers": 2}}, ["33", "2 workers", "32"]),
        ({**DIGITS, "optim": {"schedule": "cosin"}}, ["optim.schedule", "'cosin'", "'cosine'"]),
        ({**DIGITS, "scaling": {"threads": 0}}, ["scaling.threads", "above 0"]),
        ({**DIGITS, "run": {"name": "a/b"}}, ["run.name", "run.storage_path"]),
    ],
)
def test_a_mistake_is_one_line_with_the_cure(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        make_config(tree)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["optim.lr=true"], "optim.lr = True: must be a number"),
        (["train.epochs=true"], "train.epochs = True: must be a whole number"),
        (
            ["scaling.num_workers=true"],
            "scaling.num_workers = True: must be a whole number or a list of 2 whole numbers",
        ),
        (["scaling.num_workers=[0, 2]"], "scaling.num_workers = [0, 2]: must be at least 0, or [min, max]"),
        (['train.epochs="2"'], "train.epochs = '2': must be a whole number"),
        (['optim.lr="5e-4"'], "optim.lr = '5e-4': must be a number"),
        (["optim.lr=.inf"], "optim.lr = inf: must be a finite number"),
        (["optim.gamma=.inf"], "optim.gamma = inf: must be a finite number"),
        (["optim.weight_decay=.nan"], "optim.weight_decay = nan: must be a finite number"),
        (["train.clip_norm=.inf"], "train.clip_norm = inf: must be a finite number or null"),
        (["train.seed=9223372036854775808"], "train.seed = 9223372036854775808: must be less than 92233720"),
        (["optim.betas=[2, 3]"], "optim.betas = 2: must be less than 1"),
        (["optim.betas=[.9]"], "optim.betas = [0.9]: must be a list of 2 numbers"),
        (["optim.milestones=[.5, .2]"], "optim.milestones = [0.5, 0.2]: must ascend between 0 and 1"),
        (["optim.milestones=[30, 60]"], "optim.milestones = [30, 60]: must ascend between 0 and 1"),
        (["optim.milestones=.5"], "optim.milestones = 0.5: must be a list of numbers"),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov = True needs momentum: set optim.momentum=0.9"),
        (["optim.schedule=onecycle"], "optim.warmup = 0.05: schedule onecycle warms up by itself, set optim.warmup=0"),
        (["scaling.threads=1.5"], "scaling.threads = 1.5: must be auto or a whole number"),
        (["train.channels_last=3"], "train.channels_last = 3: must be auto, true or false"),
        (["data.augment={flip: 3}"], "data.augment.flip = 3: must be true or false"),
        (["data.augment={crop: -1}"], "data.augment.crop = -1: must be at least 0"),
        (["data.augment={resized_crop: -8}"], "data.augment.resized_crop = -8: must be at least 0"),
        (["data.augment={crop: 4, resized_crop: 224}"], "data.augment.crop and resized_crop exclude each other"),
        (["data.augment={scale: [0.5, 0.1]}"], "data.augment.scale = [0.5, 0.1]: must be [low, high]"),
        (["data.augment={scale: 0.5}"], "data.augment.scale = 0.5: must be a list of 2 numbers"),
        (["data.augment={flop: true}"], "unknown key 'data.augment.flop' of the augmentation: did you mean 'flip'"),
        (["data.augment={1: 2}"], "data.augment = {1: 2}: must be auto or a mapping of keys"),
        (["data.augment=crop"], "data.augment = 'crop': must be auto or a mapping of keys"),
        (["train.epochs=1", "train.epochs=2"], "override 'train.epochs=2': 'train.epochs' appears twice"),
        (["train.epochs=1", "train={seed: 1}"], "override 'train={seed: 1}': 'train' appears twice"),
        (["train=null"], "train = None: must be a mapping of keys"),
        (["method=null"], "method = None: must be a name or a mapping"),
        (["method={1: 2, name: infobatch}"], "unknown key 'method.1' of method 'infobatch'"),
        (["method={name: infobatch, ema: abc}"], "method.ema = 'abc': must be a number"),
        (["run.name=2024"], "run.name = 2024: must be text or null"),
    ],
)
def test_a_mistake_in_an_override_is_one_line(words: list[str], start: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(DIGITS_FULL, words)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(start)


def test_unusual_but_valid_overrides_are_accepted() -> None:
    words = ["optim.lr=5e-4", "optim.weight_decay=0", "optim.schedule=onecycle", "optim.warmup=0", "train={seed: 1}"]
    config = load_config(DIGITS_FULL, [*words, "train.epochs=2", "train.clip_norm=1"])
    assert (config.optim.lr, config.optim.schedule, config.train.clip_norm) == (0.0005, "onecycle", 1.0)
    assert (config.train.seed, config.train.epochs) == (1, 2)


def test_the_run_name_depends_on_settings_that_affect_the_result(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {source: digits}\n")
    name = load_config(file).run.name
    assert name is not None
    assert name.startswith("mine-")
    assert load_config(file, ["scaling.num_workers=2"]).run.name == name
    assert load_config(file, ["train.seed=1"]).run.name != name
    assert load_config(file, ["run.name=kept"]).run.name == "kept"


def test_the_path_of_the_data_does_not_affect_the_digest() -> None:
    data = {"source": "parquet", "path": "data/cifar10", "label_column": "y"}
    digest = make_config({"data": data}).digest()
    for other in ({"path": "/elsewhere"}, {"path": "./data/cifar10"}, {"cache_dir": "/tmp"}):
        assert make_config({"data": data | other}).digest() == digest
    for other in ({"label_column": "z"}, {"limit": 9}, {"source": "arrays"}):
        assert make_config({"data": data | other}).digest() != digest


def test_the_path_of_a_users_file_becomes_absolute_and_does_not_affect_the_digest(
    tmp_path: Path, monkeypatch: Any
) -> None:
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        config = make_config({**DIGITS, "model": {"name": "nets.py:mine"}})
        assert config.model.name == f"{folder}/nets.py:mine"
        digests.append(config.digest())
    assert digests[0] == digests[1]


def test_the_default_is_a_full_run_on_digits() -> None:
    config = make_config({})
    assert (config.data.source, config.method["name"]) == ("digits", "full")


def test_an_unreadable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nope\.yaml.*No such file"):
        load_config(tmp_path / "nope.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(
        ValueError, match=r"broken\.yaml.*not valid YAML \(line 1, column 6: expected .*\): correct it$"
    ):
        load_config(broken)
    broken.write_bytes(b"a: \xe9")
    with pytest.raises(ValueError, match=r"broken\.yaml.*not valid UTF-8: save it as UTF-8$"):
        load_config(broken)
    with pytest.raises(ValueError, match=r"Is a directory: name a \.yaml file"):
        load_config(tmp_path)
    broken.write_text("just words")
    with pytest.raises(ValueError, match="has no sections"):
        load_config(broken)


def test_the_json_schema_has_every_section() -> None:
    assert set(Config.model_json_schema()["properties"]) == {
        "data", "model", "method", "train", "optim", "scaling", "run", "collect", "audit", "compare", "sweep",
    }  # fmt: skip


def test_the_path_of_a_data_sets_function_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config({"data": {"source": "torch_dataset", "dataset": "mine.py:make", "path": "images"}})
    assert config.data.source_keys == {"dataset": f"{tmp_path}/mine.py:make", "path": "images"}


def test_the_path_of_an_audit_becomes_absolute_and_names_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config({"data": {"relabel": "runs/a/audit.parquet"}})
    assert config.data.relabel == f"{tmp_path}/runs/a/audit.parquet"
    assert make_config(yaml.safe_load(config.to_yaml())) == config
    at = make_config({"data": {"relabel": "runs/a/audit.parquet", "relabel_at": 0.9}})
    assert len({config.digest(), at.digest(), make_config({}).digest()}) == 3
    assert "relabel" not in str(make_config({}).identity())
    with pytest.raises(ConfigError, match=r"data.relabel_at = 0.9 needs an audit: set data.relabel="):
        make_config({"data": {"relabel_at": 0.9}})
    with pytest.raises(ConfigError, match=r"data.relabel_at = 0: "):
        make_config({"data": {"relabel": "a", "relabel_at": 0}})


def test_another_train_step_drops_the_old_ones_options(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: {step: {name: l2w, epsilon: 0.5}}\ndata: {source: digits, hold_out: 0.2}\n")
    other = load_config(file, ["train.step={name: exits, score: mean}", "data.source=cifar10"])
    assert other.train.step_options == {"score": "mean", "confident": 0.9}
    assert other.data.hold_out == 0.2
    assert load_config(file, ["train.step.p=20"]).train.step_options["epsilon"] == 0.5


def integer_keys() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (section, key, the other keys that it needs) of every whole number in a config."""
    sections = {name: field.annotation for name, field in Config.model_fields.items() if name != "method"}
    keys = [(name, key.name, {}) for name, section in sections.items() for key in keys_of(section) if is_integer(key)]
    choices = all_choices()
    keys += [("data.augment", key.name, {}) for key in keys_of(Augmentation) if is_integer(key)]
    for section in ("method", "method.prune_ratio", "train.step"):
        for name, own in choices[section].own.items():
            keys += [(section, key.name, {choices[section].key: name}) for key in own if is_integer(key)]
    return keys


def is_integer(key: Key) -> bool:
    return int in {key.hint, *get_args(key.hint)}


# These are compared with other numbers, or start a random generator.
ANY_NUMBER = {"limit", "seed", "max_nonfinite", "checkpoint_steps", "max_failures"}
ANY_NUMBER |= {"checkpoint_epochs", "keep_checkpoints", "keep_selections"}


@pytest.mark.parametrize("value", [10**9, 10**12])
@pytest.mark.parametrize(("section", "key", "others"), integer_keys(), ids=str)
def test_a_number_that_would_fill_the_memory_is_refused(section, key, others, value) -> None:
    tree: dict[str, Any] = {**others, key: value}
    for name in reversed(section.split(".")):
        tree = {name: tree}
    if section == "method.prune_ratio":
        tree["method"]["name"] = "random_epoch"
    started = time.perf_counter()
    tracemalloc.start()
    legitimate = key in ANY_NUMBER and (section, key, value) != ("sweep", "seed", 10**12)
    with nullcontext() if legitimate else pytest.raises(ConfigError, match=rf"^[^\n]*{key}[^\n]*$"):
        make_config(tree)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert allocated < 10e6
    assert time.perf_counter() - started < 1
