"""docs/mistakes.md: every mistake in its tables is made here, and gives the message of its row."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import ray.train
import torch
from ray.train import DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rayprune
from rayprune.config import load_config
from rayprune.engine.train.driver import train
from tests.support import command_line
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "mistakes.md"
X = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
DATA = {"x": X, "label": (X[:, 0] > 0).astype(np.int64)}
ARGUMENTS = {"method": rayprune.InfoBatch(), "num_epochs": 3, "batch_size": 16}

# Makes a mistake in an empty folder. One of the command line returns the command's words.
Mistake = Callable[[Path], Any]
Mistakes = dict[str, Mistake | tuple[Mistake, ...]]


def load(data: Any = DATA, **changes: Any) -> rayprune.Shard:
    return rayprune.local_loader(data, **{**ARGUMENTS, **changes})


def losses_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["x"] ** 2).mean(1)


def weigh_all(shard: rayprune.Shard) -> None:
    for epoch in shard:
        for batch in epoch:
            epoch.weigh(batch, losses_of(batch))


def first_batch(shard: rayprune.Shard) -> tuple[rayprune.Epoch, dict[str, torch.Tensor]]:
    epoch = next(shard.epochs())
    return epoch, next(iter(epoch))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(X)


def give_a_dataset_dict(_: Path) -> None:
    datasets = pytest.importorskip("datasets")
    load(datasets.DatasetDict(train=datasets.Dataset.from_dict({"x": [0.0, 1.0]})))


def give_a_data_frame(_: Path) -> None:
    import pandas as pd

    load(pd.DataFrame({"x": [0.0, 1.0]}))


DATA_MISTAKES: Mistakes = {
    "a `DataLoader`": lambda _: load(DataLoader(TensorDataset(torch.from_numpy(X)))),
    "an `IterableDataset`": lambda _: load(Endless()),
    "a Hugging Face `DatasetDict`": give_a_dataset_dict,
    "a pandas `DataFrame`": give_a_data_frame,
    "columns of different lengths": lambda _: load({"x": X, "label": np.zeros(95)}),
    "a column called `id` or `weight`": (
        lambda _: load({**DATA, "id": np.arange(96)}),
        lambda _: load({**DATA, "weight": np.ones(96)}),
    ),
    "a ragged column without `collate_fn`": lambda _: first_batch(
        load({"x": [X[row, : row % 4 + 1] for row in range(96)]})
    ),
    "an option of other data": lambda _: load(image_column="image"),
}

METHOD_MISTAKES: Mistakes = {
    "`rayprune.Infobatch`": lambda _: rayprune.Infobatch,  # type: ignore[attr-defined]
    '`method="infobatch"`, or the class `InfoBatch`': (
        lambda _: load(method="infobatch"),
        lambda _: load(method=rayprune.InfoBatch),
    ),
    "`prune_ratio=50`": lambda _: rayprune.InfoBatch(prune_ratio=50),
    "`batch_size` above the number of samples": lambda _: load(batch_size=128),
    "`class_floor` without labels": lambda _: load({"x": X}, method=rayprune.InfoBatch(class_floor=0.1)),
    "`num_epochs=0`": lambda _: load(num_epochs=0),
}


def weigh_the_mean(_: Path) -> None:
    epoch, batch = first_batch(load())
    epoch.weigh(batch, losses_of(batch).mean())


def weigh_a_number(_: Path) -> None:
    epoch, batch = first_batch(load())
    epoch.weigh(batch, losses_of(batch).mean().item())  # type: ignore[arg-type]


def weigh_logits(_: Path) -> None:
    epoch, batch = first_batch(load())
    epoch.weigh(batch, batch["x"])


def swap_the_arguments(_: Path) -> None:
    epoch, batch = first_batch(load())
    epoch.weigh(losses_of(batch), batch)  # type: ignore[arg-type]


def weigh_twice(_: Path) -> None:
    epoch, batch = first_batch(load())
    for _ in range(2):
        epoch.weigh(batch, losses_of(batch))


def weigh_a_batch_of_an_earlier_epoch(_: Path) -> None:
    epochs = load().epochs()
    old = list(next(epochs))[-1]
    epoch = next(epochs)
    next(iter(epoch))
    epoch.weigh(old, losses_of(old))


def weigh_without_ids(_: Path) -> None:
    epoch = next(load().epochs())
    for x, label in epoch.iter_torch_batches(collate_fn=lambda batch: (torch.from_numpy(batch["x"]), batch["label"])):
        epoch.weigh((x, label), (x**2).mean(1))


def never_weigh(_: Path) -> None:
    for epoch in load(num_epochs=1, method=rayprune.InfoBatch(anneal_start=1.0)):
        list(epoch)


def weigh_after_the_epoch(_: Path) -> None:
    epochs = load().epochs()
    epoch = next(epochs)
    batches = list(epoch)
    next(epochs)
    epoch.weigh(batches[0], losses_of(batches[0]))


def iterate_twice(_: Path) -> None:
    epoch = next(load().epochs())
    list(epoch)
    list(epoch)


def iterate_the_epochs_twice(_: Path) -> None:
    shard = load()
    weigh_all(shard)
    weigh_all(shard)


def save_before_weighing(_: Path) -> None:
    shard = load()
    first_batch(shard)
    shard.state_dict()


def load_the_state_of_other_settings(_: Path) -> None:
    shard = load()
    epoch, batch = first_batch(shard)
    epoch.weigh(batch, losses_of(batch))
    load(num_epochs=5, batch_size=32).load_state_dict(shard.state_dict())


def weigh_for_tdds_without_logits(_: Path) -> None:
    epoch, batch = first_batch(load(method=rayprune.TDDS(prune_ratio=0.5), num_epochs=10))
    epoch.weigh(batch, losses_of(batch))


def step_without_progress(_: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress).step()


def use_a_run_folder_twice(folder: Path) -> None:
    for _ in range(2):
        weigh_all(load(run=folder / "run"))


LOOP_MISTAKES: Mistakes = {
    "losses that are averaged already": weigh_the_mean,
    "`.item()` or `.numpy()` losses": weigh_a_number,
    "logits in place of losses": weigh_logits,
    "`weigh(losses, batch)`": swap_the_arguments,
    "a batch weighed twice, or in a later epoch": (weigh_twice, weigh_a_batch_of_an_earlier_epoch),
    "a tuple from `collate_fn`, packed again without ids": weigh_without_ids,
    "no call of `weigh` (a warning)": never_weigh,
    "`weigh` after the epoch": weigh_after_the_epoch,
    "an epoch iterated twice": iterate_twice,
    "`epochs()` iterated twice": iterate_the_epochs_twice,
    "`state_dict()` before `weigh`": save_before_weighing,
    "`load_state_dict()` with other settings": load_the_state_of_other_settings,
    "TDDS without logits": weigh_for_tdds_without_logits,
    "`scheduler.step()` without progress": step_without_progress,
    "`run=` of an earlier run": use_a_run_folder_twice,
}


PRUNED: list[rayprune.PrunedData] = []  # to be closed after a test


def prune(source: Any = DATA, **changes: Any) -> rayprune.PrunedData:
    PRUNED.append(rayprune.prune(source, **{**ARGUMENTS, **changes}))
    return PRUNED[-1]


def rows() -> Any:
    return ray.data.from_items([{"id": row, "x": X[row]} for row in range(96)])


def pruned_loop() -> None:
    weigh_all(rayprune.get_dataset_shard("train"))


def plain_loop() -> None:
    for _ in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=8):
        pass


def fit(data: Any, folder: Path, loop: Callable[[], None] = pruned_loop, num_workers: int = 0, **options: Any) -> None:
    TorchTrainer(
        loop,
        datasets={"train": data},
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(name="run", storage_path=str(folder)),
        **options,
    ).fit()


def train_without_order(folder: Path) -> None:
    """With a worker, as Ray Train's local mode does not apply the DataConfig."""
    unordered = DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=False))
    fit(prune(), folder, num_workers=1, dataset_config=unordered)


RAY_MISTAKES: Mistakes = {
    "a `ray.data.Dataset` without ids": lambda _: prune(rows().drop_columns(["id"])),
    "`ray.train.get_dataset_shard` left in the loop": (
        lambda folder: fit(prune(), folder, plain_loop),
        lambda folder: fit(prune(rows()), folder, plain_loop),
    ),
    "a dataset that `prune` did not make": lambda folder: fit(ray.data.range(10), folder),
    "a batch that the workers cannot share": lambda _: prune(world_size=3),
    "`pruned.dataset` filtered or shuffled": (
        lambda folder: fit(prune().dataset.filter(lambda row: row["id"] % 2 == 0), folder),
        lambda folder: fit(prune().dataset.random_shuffle(), folder),
    ),
    "a `DataConfig` without `preserve_order`": train_without_order,
}


def run_with_a_model_that_fails(folder: Path) -> list[str]:
    (folder / "nets.py").write_text('def net(num_classes, input_shape):\n    return {}["hidden"]\n')
    return [*IN_PROCESS, "model.name=nets.py:net"]


def use_a_run_name_twice(folder: Path) -> list[str]:
    words = [*IN_PROCESS, "model.name=mlp", "train.epochs=1", "run.name=mine"]
    train(load_config(words[1], [*words[2:], f"run.storage_path={folder / 'runs'}"]))
    return [*words, "train.seed=1"]


def use_too_many_workers(_: Path) -> list[str]:
    return ["train", "digits_full", "scaling.num_workers=64"]


IN_PROCESS = ["train", "digits_full", "scaling.num_workers=0"]
COMMAND_MISTAKES: Mistakes = {
    "`rayprune train digits_infobach`": lambda _: ["train", "digits_infobach"],
    "`train.epoch=5`": lambda _: [*IN_PROCESS, "train.epoch=5"],
    "`train.epochs=many`": lambda _: [*IN_PROCESS, "train.epochs=many"],
    "`method.name=infobach`": lambda _: [*IN_PROCESS, "method.name=infobach"],
    "`data.path` of no folder": lambda _: [*IN_PROCESS, "data.source=image_folder", "data.path=nowhere"],
    "a model function that fails": run_with_a_model_that_fails,
    "more workers than CPUs": use_too_many_workers,
    "`rayprune report` of another folder": lambda _: ["report", "."],
    "`run.name` of another config": use_a_run_name_twice,
}

GROUPS = {
    "Data": DATA_MISTAKES,
    "Method and arguments": METHOD_MISTAKES,
    "The loop": LOOP_MISTAKES,
    "Ray Train": RAY_MISTAKES,
    "The command line": COMMAND_MISTAKES,
}


def tables() -> dict[str, dict[str, str]]:
    """Return the page's rows: heading → mistake → message."""
    page: dict[str, dict[str, str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        cells = [re.fullmatch(r"\| (.+?) \| (`+) ?(.+?) ?\2 \|", line) for line in lines]
        found = [(cell[1], cell[3]) for cell in cells if cell is not None]
        assert len(found) == sum(line.startswith("|") for line in lines) - 2, (
            f"{heading}: a row is not `mistake | message`"
        )
        page[heading] = dict(found)
        assert len(page[heading]) == len(found), f"{heading}: a mistake appears twice"
    return page


def cases(mistakes: Mistakes) -> list[Any]:
    """Return a parameter (mistake, function) for each way to make each mistake."""
    pairs = [(name, way) for name, ways in mistakes.items() for way in (ways if isinstance(ways, tuple) else (ways,))]
    return [pytest.param(name, way, id=name) for name, way in pairs]


def assert_in_page(group: str, mistake: str, message: str) -> None:
    """Assert that the message is the row's, where … stands for one character or more."""
    row = tables()[group][mistake]
    assert re.fullmatch(re.escape(row).replace("…", ".+"), message), f"{group}, {mistake}:\n{message}\n{row}"


def message_of(error: Exception) -> str:
    """Return an error's message; in the traceback of a Ray task or worker, that of the line that names rayprune."""
    named = re.findall(r"^rayprune\.errors\.\w+: (.+)$", str(error), flags=re.MULTILINE)
    return named[-1] if named else str(error)


@pytest.fixture(scope="module")
def cluster() -> None:
    """Replace the fixture that starts Ray for every test: here, only tests with `ray_cluster` need it."""


def test_every_row_has_its_test() -> None:
    assert {name: list(rows) for name, rows in tables().items()} == {
        name: list(mistakes) for name, mistakes in GROUPS.items()
    }


@pytest.mark.parametrize(
    ("group", "mistake", "make"),
    [
        pytest.param(group, *case.values, id=case.id)
        for group in ("Data", "Method and arguments", "The loop")
        for case in cases(GROUPS[group])
    ],
)
def test_a_mistake_in_one_process(
    group: str, mistake: str, make: Mistake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "(a warning)" in mistake:
        make(tmp_path)
        assert_in_page(group, mistake, caplog.messages[-1])
        return
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the page has the message
        make(tmp_path)
    assert_in_page(group, mistake, str(raised.value))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("mistake", "make"), cases(RAY_MISTAKES))
def test_a_mistake_with_ray_train(mistake: str, make: Mistake, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the page has the message
        make(tmp_path)
    while PRUNED:
        PRUNED.pop().close()
    assert_in_page("Ray Train", mistake, message_of(raised.value))


@pytest.mark.parametrize(("mistake", "make"), cases(COMMAND_MISTAKES))
def test_a_mistake_on_the_command_line(
    mistake: str, make: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if make is use_too_many_workers:
        request.getfixturevalue("ray_cluster")
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    done = command_line.rayprune(*make(tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    error, message = done.stderr.removesuffix("\n").split(": ", 1)
    assert error == "error"
    assert_in_page("The command line", mistake, message)


@pytest.mark.usefixtures("ray_cluster")
def test_pruned_data_is_a_dataset_of_the_trainer(tmp_path: Path) -> None:
    """`pruned.dataset` is only needed for maps."""
    data = prune()
    fit(data, tmp_path)
    assert not np.isnan(data.scores()["loss"]).any()
    PRUNED.pop().close()
