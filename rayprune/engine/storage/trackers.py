"""Send a run's metrics lines to experiment trackers: TensorBoard always, MLflow and W&B if run.trackers names them.

Rank 0 tracks, in a thread for each tracker: a client's call can hang for minutes and can't be interrupted, so in a
shared thread a slow server would cost the other trackers their lines. Training waits for the threads only at its end,
and only for a limited time. A tracker that fails costs one line and is not used again until the workers' next start.
Each tracker's progress is kept in `run.json` of its folder inside the run folder. A resumed run continues the same
tracker run and first sends it the epochs that it has missed.

MLflow and W&B are used through their own clients. Ray's `setup_mlflow` and `setup_wandb` would name a new run at each
start of the workers, and `setup_wandb` asks for a key unless it is offline.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

from rayprune.config import Config
from rayprune.config.yaml import flatten
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.errors import ConfigError, one_line
from rayprune.paths import ObjectPath, copy_file

logger = logging.getLogger(__name__)

_CLOSE_S = 60.0  # the longest wait at the end of a run, for all trackers together
_LONGEST_PARAM = 500  # MLflow 2 refuses longer ones
_PROJECT = "rayprune"
# The variable that names another place than the run folder.
_PLACES = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_DIR"}


def check_trackers(config: Config) -> None:
    """Refuse a tracker that is not installed, or that would need local files where there are none.

    Raises:
        ConfigError: one line with the cure.
    """
    for name in config.run.trackers:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is a namespace package without an origin
            raise ConfigError(f"run.trackers has {name}, which is not installed: pip install 'rayprune[{name}]'")
        variable = _PLACES[name]
        if isinstance(config.run.storage_folder(), ObjectPath) and variable not in os.environ:
            raise ConfigError(
                f"run.trackers has {name}, whose own files can't be on an object store, and run.storage_path is "
                f"{config.run.storage_path}: set {variable}, or use a local folder"
            )


def failures(run_folder: Path, config: Config) -> list[str]:
    """Return a line for each tracker that has failed since the last start of the workers."""
    states = {name: _read_state(run_folder / name) for name in _names(config)}
    return [
        f"{name} has failed ({state['failed']}); the run is not affected, and its next start sends {name} the rest"
        for name, state in states.items()
        if state.get("failed")
    ]


class Trackers:
    """All trackers of a run (rank 0); their threads start with the first line."""

    def __init__(self, run_folder: Path, config: Config) -> None:
        self._run_folder, self._config = run_folder, config
        self._threads: list[_TrackerThread] = []

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line that metrics.jsonl already holds to all trackers; does not wait."""
        if not self._threads:
            self._threads = [_TrackerThread(self._run_folder, name, self._config) for name in _names(self._config)]
        for thread in self._threads:
            thread.lines.put(line)

    def close(self) -> None:
        """Close the trackers, and wait for them for a limited time."""
        for thread in self._threads:
            thread.lines.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                thread.mark_failed(f"no answer within {_CLOSE_S:g} s of the end")


class _TrackerThread(threading.Thread):
    """Open one tracker and send it the lines that it does not have yet, until None comes."""

    def __init__(self, run_folder: Path, tracker: str, config: Config) -> None:
        super().__init__(name=f"rayprune-{tracker}", daemon=True)  # a hanging client must not keep the process alive
        self.lines: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._run_folder, self._folder, self._tracker, self._config = run_folder, run_folder / tracker, tracker, config
        self.start()

    def run(self) -> None:
        try:
            # Those of MLflow and W&B have the run's settings.
            self._folder.mkdir(mode=0o777 if self._tracker == "tensorboard" else 0o700, exist_ok=True)
            state = _read_state(self._folder)
            state.pop("failed", None)
            tracker = _OPEN[self._tracker](self._run_folder, self._config, state)
            self._send(tracker, state, read_metrics(self._run_folder))
            for line in iter(self.lines.get, None):
                self._send(tracker, state, [line])
            tracker.close(state["epoch"] + 1 == self._config.last_epoch)
        except Exception as error:  # of any kind: training does not depend on trackers
            logger.debug("%s failed", self._tracker, exc_info=True)
            self.mark_failed(f"{type(error).__name__}: {one_line(error)}")

    def _send(self, tracker: Tracker, state: dict[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            if line["epoch"] > state.get("epoch", -1):
                tracker.log(line["epoch"], scalars(line))
                state["epoch"] = line["epoch"]
        _write_state(self._folder, state)

    def mark_failed(self, reason: str) -> None:
        """Write down why the tracker failed, for `failures`."""
        try:
            self._folder.mkdir(exist_ok=True)
            _write_state(self._folder, {**_read_state(self._folder), "failed": reason})
        except OSError:
            logger.warning("%s has failed (%s); training continues", self._tracker, reason)


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of metrics.jsonl.

    >>> scalars({"epoch": 3, "lr": 0.5, "val_loss": None, "plan_hash": "ab", "seconds": {"train": 2.0}})
    {'lr': 0.5, 'seconds/train': 2.0}
    """
    values = {name: value for name, value in line.items() if name != "epoch"}
    values |= {f"seconds/{name}": value for name, value in line["seconds"].items()}
    return {name: v for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _names(config: Config) -> tuple[str, ...]:
    return ("tensorboard", *config.run.trackers)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError):
        return {}


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    write_whole(folder / "run.json", json.dumps(state) + "\n")


class Tracker(Protocol):
    """One run of an experiment tracker."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log an epoch's numbers."""

    def close(self, finished: bool) -> None:
        """End the tracker run; if it is not finished, it may be continued."""


def _require(folder: Path) -> None:
    """Refuse to start a tracker whose client would create the folder, and the run's folder above it, once more."""
    if not isinstance(folder, ObjectPath) and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is gone")


class _ExistingFolder:
    """How tensorboardX opens its file: in a folder that exists; by default, it creates the folder and all above it."""

    scheme = "rayprune-existing"

    def open(self, path: str) -> IO[bytes]:
        return Path(path.removeprefix(f"{self.scheme}:")).open("wb")

    def directory_check(self, path: str) -> None:
        pass


class _TensorBoard:
    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        self._folder = run_folder / "tensorboard"
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(run_folder, ObjectPath):  # nothing can be appended there: the file is written again each epoch
            self._local = tempfile.TemporaryDirectory(prefix="rayprune-")
            self._writer = SummaryWriter(self._local.name)
            return
        register_writer_factory(_ExistingFolder.scheme, _ExistingFolder())
        self._writer = SummaryWriter(f"{_ExistingFolder.scheme}:{self._folder}")

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()
        if self._local is not None:
            for file in Path(self._local.name).iterdir():
                copy_file(file, self._folder / file.name)

    def close(self, finished: bool) -> None:
        self._writer.close()
        if self._local is not None:
            self._local.cleanup()


class _MLflow:
    """A run in the server that MLFLOW_TRACKING_URI names, or in an SQLite file of the run folder."""

    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # otherwise it logs each table that it creates
        from mlflow import MlflowClient

        _require(run_folder / "mlflow")
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            folder = run_folder / "mlflow"
            (folder / "mlflow.db").touch(mode=0o600)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if state.get("uri") != _without_password(uri):  # another server does not have the run
            state.clear()
            state |= {"uri": _without_password(uri), "run": self._new_run(run_folder, config, artifacts)}
        self._run = state["run"]
        self._client.update_run(self._run, status="RUNNING")

    def _new_run(self, run_folder: Path, config: Config, artifacts: str | None) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name, artifacts)
        run = str(self._client.create_run(experiment_id, run_name=_display_name(run_folder)).info.run_id)
        settings = flatten(config.shown())
        self._client.log_batch(run, params=[Param(key, str(v)[:_LONGEST_PARAM]) for key, v in settings.items()])
        return run

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = time.time_ns() // 10**6
        self._client.log_batch(self._run, metrics=[Metric(name, v, now_ms, epoch) for name, v in values.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class _Wandb:
    """An offline run in the run folder's `wandb`, unless WANDB_MODE or WANDB_DIR say otherwise."""

    def __init__(self, run_folder: Path, config: Config, state: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        _require(run_folder / "wandb")
        state.setdefault("run", uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=state["run"],
            resume="allow",
            name=_display_name(run_folder),
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(run_folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # W&B checks the value
            config=config.shown(),
            reinit="create_new",  # for runs that train at the same time in one process
            # Its metadata has the words of the command, which may have secrets.
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True),
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


def _display_name(run_folder: Path) -> str:
    """Return a run's name in its tracker; a scoring run is inside its run's folder."""
    return f"{run_folder.parent.name}/{run_folder.name}" if run_folder.name == "collect" else run_folder.name


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
