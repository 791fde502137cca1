"""Commands that store on an S3 server: those that docs/cluster.md prints, a kill, a sweep, a comparison, an audit."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from rayprune.engine.storage.run_folder import read_metrics
from rayprune.paths import as_path
from rayprune.sources.tables.audits import read_audit
from tests.support.command_line import rayprune, start_group
from tests.support.object_store import BUCKET, ObjectStore, object_store
from tests.support.paths import ROOT
from tests.support.runs import same_weights, scores_of

pytestmark = pytest.mark.scenario

RUNS = as_path(BUCKET) / "runs"
EPOCHS = 5
QUICK = ["data.limit=300", "scaling.num_workers=0", f"run.storage_path={RUNS}"]


@pytest.fixture(scope="module")
def cluster() -> None:
    """Start no Ray: the commands have their own."""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def succeed(*words: str) -> str:
    done = rayprune(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_docs_run_as_printed_also_after_a_kill(store: ObjectStore, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"### Object stores\n.*?```\n(.*?)```", page, flags=re.DOTALL)
    train, *others = [shlex.split(line)[1:] for line in block.splitlines()]
    train.append(f"train.epochs={EPOCHS}")
    with store.failing(share=0.02, slow_s=0.01):
        running = start_group(*train)
        assert running.stdout is not None
        next(line for line in running.stdout if re.search(rf"  2/{EPOCHS} ", line))
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        again = start_group(*train)
        out, err = again.communicate(timeout=150)
    assert again.returncode == 0, err
    assert f"  1/{EPOCHS} " not in out
    for words in others:
        succeed(*[str(tmp_path / word) if word == "report.html" else word for word in words])
    assert (tmp_path / "report.html").exists()
    succeed(*[word for word in train if not word.startswith("run.")], f"run.storage_path={tmp_path}", "run.name=local")
    first, local = RUNS / "first", tmp_path / "local"
    assert [line["plan_hash"] for line in read_metrics(first)] == [line["plan_hash"] for line in read_metrics(local)]
    assert same_weights(first, local)
    pd.testing.assert_frame_equal(scores_of(first), scores_of(local), check_exact=True)


def test_a_sweep_a_comparison_an_audit_and_an_evaluation_work_there(store: ObjectStore) -> None:
    few = ["train.epochs=3", *QUICK]
    with store.failing(share=0.02):
        sweep = ["sweep", "digits_sweep", *few, "run.name=sweep", "sweep.space={method.prune_ratio: [0.3]}"]
        succeed(*sweep)
        assert "already finished" in succeed(*sweep)
        arms = [
            "compare.seeds=2",
            "compare.baselines=[]",
            "compare.tune=false",
            "compare.parallel=2",
            "run.name=compare",
        ]
        succeed("compare", "digits_compare", *few, *arms)
        succeed("audit", "digits_full", *few, "audit.folds=2", "run.name=audit")
        succeed("train", "digits_msdnet_l2w", *QUICK, "train.epochs=1", "data.hold_out=0.2", "run.name=exits")
        succeed("evaluate", str(RUNS / "exits"))
    with (RUNS / "sweep" / "results.parquet").open("rb") as stream:
        assert pd.read_parquet(stream)["status"].unique().tolist() == ["finished"]
    assert not (RUNS / "sweep" / ".tune").exists()
    assert (RUNS / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_audit(RUNS / "audit").table) == 300
    assert (RUNS / "exits" / "exits" / "thresholds.json").exists()
    succeed("report", str(RUNS), "--output", str(RUNS / "page.html"))
    assert b"<html" in (RUNS / "page.html").read_bytes()
