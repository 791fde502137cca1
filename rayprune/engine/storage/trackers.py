"""A run's lines of metrics.jsonl in experiment trackers: TensorBoard always, MLflow and W&B where run.trackers asks.

Rank 0 tracks, each tracker in a thread of its own: training waits for none of them but a little at its end. A tracker
that fails is left alone until the next start of the workers, and costs one line. What a tracker has had is kept in
`run.json` of its folder inside the run folder: a resumed run goes on in the same tracker run, with the lines that it
has missed.

Both are used through their own clients: Ray's `setup_mlflow` and `setup_wandb` name a run for each start of the
workers, and `setup_wandb` asks for a key where it is not told to stay offline.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from rayprune.config import Config
from rayprune.config.yaml import flatten
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.errors import RunFolderError

logger = logging.getLogger(__name__)

_CLOSE_S = 30.0  # for what is not yet told when the run ends
_LONGEST_PARAM = 500  # MLflow 2 refuses longer ones
_PROJECT = "rayprune"


class Tracker(Protocol):
    """One run of an experiment tracker."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Take an epoch's numbers."""

    def close(self, finished: bool) -> None:
        """End; the run may go on later when it is not finished."""


def check_trackers(config: Config) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        RunFolderError: one line with the cure.
    """
    for name in config.run.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a plain folder of that name is no package
            raise RunFolderError(f"run.trackers has {name}, which is not installed: pip install 'rayprune[{name}]'")


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl, without those that are missing or not finite.

    >>> scalars({"epoch": 3, "lr": 0.5, "val_loss": None, "plan_hash": "ab", "seconds": {"train": 2.0}})
    {'lr': 0.5, 'seconds/train': 2.0}
    """
    named = {name: value for name, value in line.items() if name != "epoch"}
    named |= {f"seconds/{name}": value for name, value in line.get("seconds", {}).items()}
    return {name: v for name, v in named.items() if isinstance(v, int | float) and math.isfinite(v)}


def failures(run_folder: Path, config: Config) -> list[str]:
    """Return a line for each tracker that failed at the last start of the workers."""
    states = {name: _read_state(run_folder / name) for name in ("tensorboard", *config.run.trackers)}
    return [
        f"{name} has failed ({state['failed']}); the run itself is whole, and its next start tells {name} the rest"
        for name, state in states.items()
        if state.get("failed")
    ]


class Trackers:
    """Tell all trackers of a run (rank 0)."""

    def __init__(self, run_folder: Path, config: Config) -> None:
        self._feeds = [_Feed(run_folder, name, config) for name in ("tensorboard", *config.run.trackers)]

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass on a line that is in metrics.jsonl already."""
        for feed in self._feeds:
            feed.put(line)

    def close(self) -> None:
        """Let the trackers end, and wait a little for them."""
        for feed in self._feeds:
            feed.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))


class _Feed:
    """One tracker, from the first line on in a thread."""

    def __init__(self, run_folder: Path, name: str, config: Config) -> None:
        self._run_folder, self._folder, self._name, self._config = run_folder, run_folder / name, name, config
        self._lines: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, line: Mapping[str, Any] | None) -> None:
        if self._thread is None and line is not None:
            self._thread = threading.Thread(target=self._run, name=f"rayprune-{self._name}", daemon=True)
            self._thread.start()
        self._lines.put(line)

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._fail(f"no answer within {_CLOSE_S:g} s of the end")

    def _run(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            state = _read_state(self._folder)
            state.pop("failed", None)
            tracker = _OPEN[self._name](self._run_folder, self._config, state)
            last = self._told(tracker, state, read_metrics(self._run_folder))
            for line in iter(self._lines.get, None):
                last = self._told(tracker, state, [line])
            tracker.close(last + 1 == self._config.last_epoch)
        except Exception as error:  # whatever it is: training does not depend on it
            logger.debug("%s failed", self._name, exc_info=True)
            self._fail(f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}")

    def _told(self, tracker: Tracker, state: dict[str, Any], lines: list[Any]) -> int:
        """Log the epochs that the tracker has not had; return the last that it has."""
        for line in lines:
            if line["epoch"] > state.get("epoch", -1):
                tracker.log(line["epoch"], scalars(line))
                state["epoch"] = line["epoch"]
        write_whole(self._folder / "run.json", json.dumps(state) + "\n")
        return int(state.get("epoch", -1))

    def _fail(self, why: str) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            state = {**_read_state(self._folder), "failed": why}
            write_whole(self._folder / "run.json", json.dumps(state) + "\n")
        except OSError:
            logger.warning("%s has failed (%s); training goes on", self._name, why)


class _TensorBoard:
    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"))

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _MLflow:
    """A run in the server that MLFLOW_TRACKING_URI names, or in an SQLite file of the run folder."""

    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else it tells of each table that it makes
        from mlflow import MlflowClient

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            folder = run_folder / "mlflow"
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if state.get("uri") != _without_password(uri):  # another server knows nothing of the run
            state.clear()
            state |= {"uri": _without_password(uri), "run": self._new_run(run_folder, config, artifacts)}
        self._run = state["run"]
        self._client.update_run(self._run, status="RUNNING")

    def _new_run(self, run_folder: Path, config: Config, artifacts: str | None) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)
        run = str(self._client.create_run(where, run_name=_shown(run_folder)).info.run_id)
        flat = flatten(config.model_dump(mode="json"))
        self._client.log_batch(run, params=[Param(key, str(value)[:_LONGEST_PARAM]) for key, value in flat.items()])
        return run

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client.log_batch(self._run, metrics=[Metric(name, v, now, epoch) for name, v in values.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class _Wandb:
    """A run in the run folder's `wandb`, without the network, unless WANDB_MODE or WANDB_DIR say otherwise."""

    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        state.setdefault("run", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=state["run"],
            resume="allow",
            name=_shown(run_folder),
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(run_folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # W&B checks what it gets
            config=config.model_dump(mode="json"),
            reinit="create_new",  # runs that train side by side in one process
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=epoch)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_OPEN: dict[str, Callable[[Path, Config, dict[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError):
        return {}


def _shown(run_folder: Path) -> str:
    """Name a run in its tracker; a scoring run lies inside its run's folder."""
    return f"{run_folder.parent.name}/{run_folder.name}" if run_folder.name == "collect" else run_folder.name


def _without_password(uri: str) -> str:
    scheme, found, rest = uri.partition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2]}"
