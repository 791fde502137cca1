"""Runs on a cluster of four machines that share nothing but an S3 server.

Each machine has its own address, processes, /tmp and Ray object store (`tests.support.machines`). The commands start on
the head node, whose working folder alone has the model's file. The images lie on the server, and each machine keeps its
own decoded cache.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import numpy as np
import pandas as pd
import pytest

from rayprune.engine.storage.run_folder import read_metrics
from rayprune.paths import as_path
from rayprune.sources import open_data
from tests.support.machines import GCS_PORT, Machine, Machines, can_make_machines, machines
from tests.support.object_store import BUCKET, ObjectStore, object_store
from tests.support.runs import results, same_weights, scores_of, weights_of
from tests.support.sources import encode_image

pytestmark = [
    pytest.mark.scenario,
    pytest.mark.skipif(not can_make_machines(), reason="this process may not create namespaces and networks"),
]

RUNS, DATA = as_path(BUCKET) / "runs", as_path(BUCKET) / "data"
EPOCHS, SAMPLES = 4, 320
RAYPRUNE = str(Path(sys.executable).with_name("rayprune"))
PLANS = ("epoch", "kept", "samples_trained", "plan_hash", "lr")
MODEL = """
import time
from torch import nn

class Slow(nn.Flatten):
    def __init__(self, pause_s):
        super().__init__()
        self.pause_s = pause_s

    def forward(self, rows):
        time.sleep(self.pause_s)
        return super().forward(rows)

def mlp(*, num_classes, input_shape, pause_s):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(Slow(pause_s), nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, num_classes))
"""


class Cluster:
    """A switch, an S3 server and the machines of a Ray cluster, the first of which is the head node.

    Args:
        switch: without machines.
        store: the server, which this process uses too.
        cpus: of each machine, for Ray.
    """

    def __init__(self, switch: Machines, cpus: tuple[int, ...]) -> None:
        self._switch = switch
        self.start(cpus)

    def start(self, cpus: tuple[int, ...]) -> None:
        """Start new machines, the third with a slow cable, and a Ray cluster of them."""
        self.machines = [self._switch.add(delayed=number == 2) for number in range(len(cpus))]
        for machine, num_cpus in zip(self.machines, cpus, strict=True):
            machine.start_ray(self.head, num_cpus)
        self.head.run(sys.executable, "-c", f"open('net.py', 'w').write({MODEL!r})")

    @property
    def head(self) -> Machine:
        return self.machines[0]

    def command(self, name: str, workers: int, stream: str = "local", pause_s: float = 0.0) -> list[str]:
        """Return the words of `rayprune train` on all machines."""
        sections = _config(workers, stream)
        words = [f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
        place = [f"run.address={self.head.address}:{GCS_PORT}", f"run.storage_path={RUNS}", f"run.name={name}"]
        model = ["model.name=net:mlp", f"model.pause_s={pause_s}"]
        return [RAYPRUNE, "train", "digits_infobatch", *words, *model, *place]

    def hosts_of(self, title: str) -> list[Machine]:
        """Return the machines that run a process with this title, one for each process."""
        listed = [(machine, machine.run("ps", "ax", "-o", "args")) for machine in self.machines[1:]]
        return [machine for machine, printed in listed for line in printed.splitlines() if title in line]


def _config(workers: int, stream: str) -> dict[str, dict[str, str]]:
    scaling = {"num_workers": str(workers), "cpus_per_worker": "1", "threads": "1", "stream": stream}
    return {
        "data": {"source": "parquet", "path": str(DATA), "cache": "disk", "augment.flip": "false"},
        "method": {"ema": "0.5", "anneal_start": "1.0"},
        "optim": {"lr": "0.02"},
        "train": {"epochs": str(EPOCHS), "batch_size": "32"},
        "run": {"checkpoint_steps": "2", "stall_seconds": "20"},
        "scaling": scaling if workers > 1 else {**scaling, "cpus_per_worker": "auto"},
    }


@pytest.fixture(scope="module")
def cluster() -> None:
    """Start no Ray in this process."""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        write_images()
        yield running


def write_images() -> None:
    """Write 320 digits to the server, as PNG files in Parquet."""
    digits = open_data("digits", limit=SAMPLES).train
    (pixels,) = (rows for name, rows in digits.take(np.arange(SAMPLES)).items() if name != "label")
    gray = (255 * pixels.reshape(-1, 8, 8) / pixels.max()).astype(np.uint8)
    images = [{"bytes": encode_image(row, mode="L"), "path": None} for row in gray]
    table = pd.DataFrame({"image": images, "label": digits.labels})
    for name, part in (("train", table), ("test", table[:40])):
        content = io.BytesIO()
        part.to_parquet(content)
        (DATA / f"{name}.parquet").write_bytes(content.getvalue())


@pytest.fixture(scope="module")
def four(store: ObjectStore) -> Iterator[Cluster]:
    """Four machines for eight workers; Ray Data needs one CPU more."""
    with ExitStack() as stack:
        switch = stack.enter_context(machines())
        switch.environment.update(stack.enter_context(store.also_at(switch.listen())))
        yield Cluster(switch, (3, 2, 2, 2))


def assert_close(name: str, other: str) -> None:
    """Assert the same plans, and weights and scores that differ only by rounding."""
    assert results(read_metrics(RUNS / name), PLANS) == results(read_metrics(RUNS / other), PLANS)
    ours, theirs = weights_of(RUNS / name), weights_of(RUNS / other)
    for key, tensor in theirs.items():
        assert np.allclose(ours[key], tensor, rtol=1e-3, atol=1e-5), key
    ours, theirs = scores_of(RUNS / name), scores_of(RUNS / other)
    assert np.allclose(ours["loss"], theirs["loss"], rtol=1e-3, atol=1e-5)
    assert ours["last_visit"].tolist() == theirs["last_visit"].tolist()


def assert_equal(name: str, other: str) -> None:
    """Assert the same plans, weights and scores, bit for bit."""
    assert results(read_metrics(RUNS / name)) == results(read_metrics(RUNS / other))
    assert same_weights(RUNS / name, RUNS / other)
    pd.testing.assert_frame_equal(scores_of(RUNS / name), scores_of(RUNS / other), check_exact=True)


@pytest.fixture(scope="module")
def undisturbed(four: Cluster) -> str:
    """The name of a run of four workers."""
    four.head.run(*four.command("local4", 4))
    return "local4"


def wait_for_epoch(running: Popen[str], number: int) -> None:
    """Wait for the line of an epoch, and for half a second of the next one."""
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if line.startswith(f"  {number}/{EPOCHS} "):
            time.sleep(0.5)
            return
    raise AssertionError("".join(lines))


def finish(running: Popen[str]) -> str:
    """Wait for the successful end; return what was printed since the last wait."""
    printed, _ = running.communicate(timeout=300)
    assert running.returncode == 0, printed
    return printed


def test_four_and_eight_workers_have_the_plans_of_one(four: Cluster, undisturbed: str) -> None:
    four.head.run(*four.command("one", 1))
    four.head.run(*four.command("ray4", 4, "ray"))
    for stream in ("local", "ray"):
        four.head.run(*four.command(f"{stream}8", 8, stream))
    assert_equal("ray4", undisturbed)
    assert_equal("ray8", "local8")
    assert_close(undisturbed, "one")
    assert_close("local8", "one")
    assert read_metrics(RUNS / "ray8")[-1]["world_size"] == 8


def test_a_slow_network_changes_nothing(four: Cluster, undisturbed: str) -> None:
    """30 ms each way to one machine that has two of the workers."""
    cable = four.machines[2].cable
    assert cable is not None
    cable.delay_s = 0.03
    try:
        four.head.run(*four.command("slow", 8, "ray"), timeout=400)
    finally:
        cable.delay_s = 0.0
    assert_close("slow", undisturbed)


def test_trials_of_a_sweep_run_on_other_machines(four: Cluster) -> None:
    sweep = ["sweep.space={method.prune_ratio: [0.1, 0.3, 0.5, 0.7]}", "sweep.max_concurrent=4"]
    words = [word for word in four.command("sweep", 0)[3:] if not word.startswith("method.")]
    running = four.head.start(RAYPRUNE, "sweep", "digits_sweep", *words, *sweep)
    hosts: set[str] = set()
    while running.poll() is None:
        hosts |= {machine.name for machine in four.hosts_of("ray::ResourceTrainable")}
        time.sleep(1)
    finish(running)
    assert hosts
    with (RUNS / "sweep" / "results.parquet").open("rb") as stream:
        assert set(pd.read_parquet(stream)["status"]) == {"finished"}


def test_a_machine_that_is_lost_changes_nothing(four: Cluster, undisturbed: str) -> None:
    running = four.head.start(*four.command("lost", 4, "ray", pause_s=0.2))
    wait_for_epoch(running, 2)
    lost = four.hosts_of("RayTrainWorker")[0]
    lost.kill()
    finish(running)
    assert_close("lost", undisturbed)  # a restart with more than two ranks changes how sums are rounded


def test_the_same_command_continues_on_another_cluster_after_the_head_node_is_lost(
    four: Cluster, undisturbed: str
) -> None:
    running = four.head.start(*four.command("moved", 4, "ray", pause_s=0.2))
    wait_for_epoch(running, 2)
    for machine in four.machines:
        machine.kill()
    running.wait(30)
    four.start((3, 2))
    printed = four.head.run(*four.command("moved", 4, "ray", pause_s=0.2))
    assert f"  1/{EPOCHS} " not in printed, "it started again"
    assert_close("moved", undisturbed)
