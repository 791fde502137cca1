"""A run of one to two workers uses a machine that joins, survives its loss, and keeps its plans."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray.cluster_utils import Cluster

from rayprune.engine.storage.run_folder import read_metrics, read_selection
from rayprune.engine.train.driver import train
from tests.support.runs import results, run_config, scores_of, user

BATCH, CHECKPOINT_STEPS = 8, 2
# Ray looks for room to grow every 15 s by default.
COMMAND = """
import sys
from rayprune.cli.main import main
from rayprune.engine.train import run
run._RESIZE_S = float(sys.argv.pop(1))
main()
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster of its own beside the session's: one machine with one CPU."""
    # Beside the session's Ray, which is on the loopback interface, Ray would put the head there, too. A command that
    # connects to 127.0.0.1 looks for it at the public address.
    head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": public_address()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def public_address() -> str:
    """Return this machine's first IPv4 address other than 127.0.0.1, which it has without a network."""
    found = [each.address for each in chain(*psutil.net_if_addrs().values()) if each.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), "127.0.0.1")


class ElasticRun:
    """The command on a cluster; its model logs the number of ranks at every step.

    Args:
        folder: parent of the run folder.
        address: of the cluster.
        epochs: of the run.
        resize_s: how often Ray looks for room to grow.
        pauses_s: the pause in each step, before the run grows and with two ranks.
    """

    def __init__(
        self, folder: Path, address: str, epochs: int, *, resize_s: float, pauses_s: tuple[float, float]
    ) -> None:
        self.folder, self.epochs, self._pauses_s = folder / "elastic", epochs, pauses_s
        self._log = folder / "ranks"
        self._log.touch()
        self._sections: dict[str, dict[str, Any]] = {
            "train": {"epochs": epochs, "batch_size": BATCH},
            "method": {"name": "infobatch", "ema": 0.5, "anneal_start": 1.0},
            "run": {"checkpoint_steps": CHECKPOINT_STEPS, "keep_selections": epochs, "address": address},
        }
        scaling = {"num_workers": [1, 2], "cpus_per_worker": 1, "threads": 1, "stream": "ray"}
        config = run_config(folder, "elastic", model=self._model(self._log), scaling=scaling, **self._sections)
        (folder / "config.yaml").write_text(config.to_yaml())
        environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", COMMAND, str(resize_s), "train", str(folder / "config.yaml")]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def __enter__(self) -> ElasticRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _model(self, log: Path) -> dict[str, Any]:
        pause_s, grown_pause_s = self._pauses_s
        return {"name": user("grows"), "log": str(log), "pause_s": pause_s, "grown_pause_s": grown_pause_s}

    @property
    def ranks(self) -> str:
        """The number of ranks at each step, a digit per step."""
        return self._log.read_text()

    def wait(self, reached: Callable[[str], bool], event: str, seconds: float = 300) -> None:
        """Wait until `reached` is true of the numbers of ranks."""
        end = time.monotonic() + seconds
        while not reached(self.ranks):
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                output, _ = self._process.communicate()
                pytest.fail(f"{event} did not happen within {seconds} s:\n{output.decode()[-3000:]}")
            time.sleep(0.02)

    def finish(self) -> None:
        """Wait for a successful end."""
        output, _ = self._process.communicate(timeout=300)
        assert self._process.returncode == 0, output.decode()[-3000:]

    def check_plans(self, num_changes: int) -> None:
        """Assert that plans and visits are complete, and those of a run without changes up to the first change."""
        metrics = read_metrics(self.folder)
        selections = [read_selection(self.folder, epoch) for epoch in range(self.epochs)]
        assert [line["kept"] for line in metrics] == [selection.num_kept for selection in selections]
        assert [line["samples_trained"] for line in metrics] == np.cumsum([line["kept"] for line in metrics]).tolist()
        visits = np.max([np.where(one.codes > 0, epoch, -1) for epoch, one in enumerate(selections)], axis=0)
        assert scores_of(self.folder)["last_visit"].tolist() == visits.tolist()
        # Unbiased: the weights of the kept samples stand for all samples.
        assert all(0.9 < selection.weights.sum() / 301 < 1.1 for selection in selections)
        ends = np.cumsum([-(-line["kept"] // BATCH) for line in metrics])
        # At each change, only the steps since the last checkpoint are repeated, also inside an epoch.
        assert len(self.ranks) - ends[-1] <= 2 * num_changes * CHECKPOINT_STEPS, (len(self.ranks), ends.tolist())
        # Sums over two ranks are rounded differently, so plans are compared up to the epoch of the first change.
        log = self._log.with_name("alone.ranks")
        log.write_bytes(b"2")  # no pauses
        scaling = {"num_workers": 0, "threads": 1}
        alone = train(run_config(log.parent, "alone", model=self._model(log), scaling=scaling, **self._sections))
        same = 1 + int(np.searchsorted(ends, self.ranks.index("2") - CHECKPOINT_STEPS, side="right"))
        keys = ("plan_hash", "kept", "samples_trained")
        assert results(metrics[:same], keys) == results(alone.metrics[:same], keys)


def test_a_machine_joins_inside_an_epoch(tmp_path: Path, cluster: Cluster) -> None:
    """The short form only grows: after the loss of a machine Ray alone waits for more than 20 s."""
    with ElasticRun(tmp_path, cluster.address, epochs=2, resize_s=1, pauses_s=(0.3, 0.0)) as run:
        run.wait(lambda ranks: len(ranks) > 3, "the first steps on one machine")
        cluster.add_node(num_cpus=1, node_ip_address=public_address())
        run.finish()
        assert run.ranks.strip("1").strip("2") == "", f"one, two: {run.ranks}"
        assert run.ranks.endswith("2"), "the run ended before it grew"
        run.check_plans(num_changes=1)


@pytest.mark.scenario
def test_machines_join_and_leave_inside_epochs(tmp_path: Path, cluster: Cluster) -> None:
    with ElasticRun(tmp_path, cluster.address, epochs=8, resize_s=15, pauses_s=(0.15, 0.15)) as run:
        run.wait(lambda ranks: len(ranks) > 3, "the first steps on one machine")
        second = cluster.add_node(num_cpus=1, node_ip_address=public_address())
        run.wait(lambda ranks: ranks.count("2") > 4, "the steps on two machines")
        cluster.remove_node(second, allow_graceful=False)
        run.finish()
        assert run.ranks.lstrip("1").rstrip("1").strip("2") == "", f"one, two, one: {run.ranks}"
        assert run.ranks.endswith("1"), "the run ended before the second machine was lost"
        run.check_plans(num_changes=2)
