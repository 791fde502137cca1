"""What is fuzzed: each target makes good files once, and for each example damages a copy and runs a command on it."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from rayprune.cli.schema import Key, all_choices, keys_of
from rayprune.config import schema as sections
from rayprune.engine.storage.checkpoint import damage as checkpoint_damage
from tests.support.runs import RESULT_KEYS
from tests.support.sources import encode_image, smooth_pixels

from .damages import BYTES, JUNK, damage_bytes, damage_file, damage_tree
from .sandbox import Outcome, Sandbox

BASE: dict[str, Any] = {
    "data": {"source": "digits", "limit": 64},
    "model": {"name": "mlp"},
    "method": {"name": "infobatch"},
    "train": {"epochs": 2, "batch_size": 32},
    "scaling": {"num_workers": 0, "threads": 1, "use_gpu": False},
    "run": {"storage_path": "runs", "name": "run"},
}
REFUSED, TRAINED, FAILED = 2, 0, 1
# Keys that need a network, a compiler, a cluster or another folder, and so cannot be tried in a process of limits.
_LEFT_OUT = {
    ("data", "download"), ("model", "pretrained"), ("train", "compile"), ("scaling", "num_workers"),
    ("run", "storage_path"), ("run", "address"), ("run", "trackers"), ("data", "cache_dir"), ("collect", "embedder"),
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One kind of files to damage.

    Attributes:
        name: of the target.
        make: makes the good files in an empty folder; may run commands.
        damage: damages a copy of the files in place, and returns what was done.
        commands: one is drawn for each example.
        codes: the exit codes that are right.
        check: finds what else is wrong after the command, given the folder, the outcome and the damage.
    """

    name: str
    make: Callable[[Path, Sandbox], None]
    damage: Callable[[Path, random.Random], str]
    commands: Sequence[Sequence[str]] = (("train", "config.yaml"),)
    codes: frozenset[int] = frozenset({TRAINED, REFUSED, FAILED})
    check: Callable[[Path, Outcome, str], list[str]] = field(default=lambda folder, outcome, damage: [])


@dataclass(frozen=True)
class Example:
    """One damaged folder and what a command did with it."""

    damage: str
    words: Sequence[str]
    outcome: Outcome
    problems: list[str]

    def __str__(self) -> str:
        words = " ".join(self.words)
        return f"rayprune {words}\n  {self.damage}\n  {self.problems}\n  {self.outcome.err.strip()[-1500:]}"


def run_example(target: Target, good: Path, folder: Path, sandbox: Sandbox, seed: int) -> Example:
    """Damage a copy of the good files in `folder`, run a command, and check what it left."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    done = target.damage(folder, rng)
    words = rng.choice(list(target.commands))
    before = _digests(folder)
    outcome = sandbox.run(folder, *words)
    after = _digests(folder)
    problems = outcome.problems(sandbox.limits, target.codes)
    problems += [f"{name} was changed" for name in before if _is_input(name) and before[name] != after.get(name)]
    written = [name for name in after if before.get(name) != after[name]]
    problems += [f"{name} is half-written" for name in written if not _is_whole(folder / name)]
    problems += target.check(folder, outcome, done)
    return Example(done, words, outcome, problems)


def _digests(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".sandbox" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).digest() for file in files}


def _is_input(name: str) -> bool:
    return not name.startswith("runs/") and "cache" not in name


def _is_whole(file: Path) -> bool:
    """Return whether a file that a command wrote can be read, and is no temporary file left over."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".parquet": pq.read_table,
        ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
        ".png": lambda path: Image.open(path).verify(),
    }
    if ".tmp" in file.name:
        return False
    try:
        readers.get(file.suffix, Path.read_bytes)(file)
    except Exception:
        return False
    return True


# Configs


def _make_config(folder: Path, _: Sandbox, **data: Any) -> None:
    config = {**BASE, "data": data or BASE["data"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _damage_config(folder: Path, rng: random.Random) -> str:
    """Change one to three keys, drawn from all that the models of the config know."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    done = []
    choices = all_choices()
    for _ in range(rng.randint(1, 3)):
        section = rng.choice(sorted(sections_of_configs()))
        keys = list(sections_of_configs()[section])
        chosen = tree.setdefault(section, {})
        if not isinstance(chosen, dict):
            continue
        if section in choices:
            options = choices[section]
            name = rng.choice(sorted(options.options))
            if rng.random() < 0.3:
                chosen[options.key] = name
                done.append(f"{section}.{options.key} = {name}")
            keys += options.own.get(str(chosen.get(options.key)), [])
        key = rng.choice(keys)
        if (section, key.name) in _LEFT_OUT:
            continue
        chosen[key.name] = value = _value(key, rng)
        done.append(f"{section}.{key.name} = {value!r}")
    if rng.random() < 0.1:
        tree, more = damage_tree(tree, rng)
        done.append(more)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True))
    return "; ".join(done)


def sections_of_configs() -> dict[str, list[Key]]:
    """Return section → the keys that it takes with every name in it."""
    models = {
        "data": sections.DataSection, "model": sections.ModelSection, "train": sections.TrainSection,
        "optim": sections.OptimSection, "scaling": sections.ScalingSection, "run": sections.RunSection,
        "collect": sections.CollectSection,
    }  # fmt: skip
    return {**{name: keys_of(model) for name, model in models.items()}, "method": all_choices()["method"].shared}


def _value(key: Key, rng: random.Random) -> Any:
    """Return a value for a key: often one of its kind, else anything."""
    if rng.random() < 0.15:
        return rng.choice(JUNK)
    hint = str(key.hint)
    kinds: list[Any] = [key.default] if isinstance(key.default, (int, float, str, bool)) else []
    if "Literal" in hint:
        kinds += [word.strip(" '") for word in hint[hint.index("[") + 1 :].strip("]").split(",")]
    if "int" in hint:
        kinds += [0, 1, 2, 3, 8, 10**9]
    if "float" in hint:
        kinds += [0.0, 0.1, 0.5, 0.999, 1.0, 3.0]
    if "bool" in hint:
        kinds += [True, False]
    if "str" in hint:
        kinds += ["", "x", "data.csv", "runs"]
    if "Schedule" in hint:
        kinds += [{"schedule": name} for name in all_choices()["method.prune_ratio"].options]
    return rng.choice(kinds or list(JUNK))


_BOMBS = {
    "aliases": b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
    "nested lists": b"[" * 5000,
    "nested mappings": b"{" * 5000,
    "a Python object": b"method: !!python/object/apply:os.system ['touch foreign-code-ran']\n",
    "a long name": b"method: " + b"x" * 10**6,
}


def _damage_yaml(folder: Path, rng: random.Random) -> str:
    file = folder / "config.yaml"
    content, done = damage_bytes(file.read_bytes(), rng)
    if rng.random() < 0.2:
        name = rng.choice(sorted(_BOMBS))
        content, done = _BOMBS[name], name
    file.write_bytes(content)
    return done


# Data


def _damage_one(pattern: str) -> Callable[[Path, random.Random], str]:
    def damage(folder: Path, rng: random.Random) -> str:
        return damage_file(rng.choice(sorted(file for file in folder.glob(pattern) if file.is_file())), rng)

    return damage


def _make_images(folder: Path, sandbox: Sandbox) -> None:
    for number, (part, name, kind) in enumerate(
        (part, name, kind) for part in ("train", "val") for name in "ab" for kind in ("JPEG", "PNG", "WEBP", "GIF")
    ):
        (folder / "data" / part / name).mkdir(parents=True, exist_ok=True)
        file = folder / "data" / part / name / f"{number}.{kind.lower()}"
        file.write_bytes(encode_image(smooth_pixels(number, (12, 10)), kind))
    _make_config(folder, sandbox, source="image_folder", path="data", image_size=8)


def _make_tar(folder: Path, sandbox: Sandbox) -> None:
    (folder / "data").mkdir()
    for part, count in (("train", 40), ("val", 16)):
        with tarfile.open(folder / "data" / f"{part}-0000.tar", "w") as archive:
            for number in range(count):
                image, label = encode_image(smooth_pixels(number), "PNG"), str(number % 2).encode()
                for suffix, content in (("png", image), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    _make_config(folder, sandbox, source="webdataset", path="data", image_size=8)


def _make_parquet(folder: Path, sandbox: Sandbox) -> None:
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 64), ("test", 16)):
        table = {f"x{number}": rng.random(count, np.float32) for number in range(3)}
        table["label"] = np.arange(count) % 3
        _write_parquet(folder / "data" / f"{part}.parquet", table)
    _make_config(folder, sandbox, source="parquet", path="data", num_classes=3)
    _keep_whole(folder, sandbox)


def _write_parquet(file: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa

    pq.write_table(pa.table(columns), file, row_group_size=16, compression="snappy", write_page_checksum=True)


def _make_arrays(folder: Path, sandbox: Sandbox, suffix: str = "") -> None:
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}_{part}": value
        for part, count in (("train", 64), ("test", 16))
        for name, value in (("x", rng.integers(0, 255, (count, 8, 8, 1), np.uint8)), ("y", np.arange(count) % 3))
    }
    if suffix:
        np.savez_compressed(folder / "data" / "data.npz", **arrays)
    else:
        for name, array in arrays.items():
            np.save(folder / "data" / f"{name}.npy", array)
    _make_config(folder, sandbox, source="arrays", path="data/data.npz" if suffix else "data")


def _make_npz(folder: Path, sandbox: Sandbox) -> None:
    _make_arrays(folder, sandbox, ".npz")
    _keep_whole(folder, sandbox)


# Run folders


def _make_run(folder: Path, sandbox: Sandbox) -> None:
    """Train a run that stopped after two of three epochs."""
    config = {**BASE, "train": {"epochs": 3, "batch_size": 32}, "run": {**BASE["run"], "keep_checkpoints": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    whole = _keep_whole(folder, sandbox)
    shutil.copytree(whole, folder / "runs" / "run")
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / "epoch-000003")


def _make_finished(folder: Path, sandbox: Sandbox) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(BASE))
    _train(folder, sandbox)
    fixed = {**BASE, "method": {"name": "fixed", "path": "chosen.parquet"}, "run": {**BASE["run"], "name": "fixed"}}
    (folder / "fixed.yaml").write_text(yaml.safe_dump(fixed))
    shutil.copy(folder / "runs" / "run" / "scores.parquet", folder / "scores.parquet")
    made = sandbox.run(folder, "select", "scores.parquet", "--keep", "0.5", "--by", "loss", "--out", "chosen.parquet")
    assert made.code == 0, made.err


def _train(folder: Path, sandbox: Sandbox) -> None:
    made = sandbox.run(folder, "train", "config.yaml")
    assert made.code == 0, made.err


def _keep_whole(folder: Path, sandbox: Sandbox) -> Path:
    """Train on the good files, and keep the run to compare with."""
    _train(folder, sandbox)
    return Path(shutil.move(folder / "runs" / "run", folder / "whole"))


def _damage_newest(folder: Path, rng: random.Random) -> str:
    return _damage_one("runs/run/checkpoints/epoch-000002/*")(folder, rng)


def _damage_signed(folder: Path, rng: random.Random) -> str:
    """Damage what a checkpoint holds, and correct its manifest of checksums."""
    newest = folder / "runs" / "run" / "checkpoints" / "epoch-000002"
    done = damage_file(rng.choice([file for file in sorted(newest.iterdir()) if file.name != "manifest.json"]), rng)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.glob("[!m]*.*")}
    sums["model.pt"] = hashlib.sha256((newest / "model.pt").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(sums))
    return f"{done}; checksums corrected"


def _goes_on_equally(folder: Path, outcome: Outcome, _: str) -> list[str]:
    """Find differences from the uninterrupted run: a damaged checkpoint costs its steps, and nothing else."""
    return [] if outcome.code or _equals_whole(folder) else ["the run ended otherwise than an uninterrupted one"]


def _reads_what_was_written(folder: Path, outcome: Outcome, damage: str) -> list[str]:
    """Find changed samples that went unnoticed, where the format has checksums."""
    silent = outcome.code == 0 and BYTES in damage and not _equals_whole(folder)
    return ["changed data was trained on without a word"] if silent else []


def _equals_whole(folder: Path) -> bool:
    ours, whole = ([*_result_lines(path / "metrics.jsonl")] for path in (folder / "runs" / "run", folder / "whole"))
    return ours == whole


def _result_lines(file: Path) -> Iterator[dict[str, Any]]:
    last = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        last[line["epoch"]] = {key: line[key] for key in RESULT_KEYS}
    yield from (last[epoch] for epoch in sorted(last))


def _leaves_whole_checkpoints(folder: Path, outcome: Outcome, _: str) -> list[str]:
    last = folder / "runs" / "run" / "checkpoints" / "epoch-000003"
    return [f"{last.name}: {damage}"] if outcome.code == 0 and (damage := checkpoint_damage(last)) else []


_SELECT = ("select", "scores.parquet", "--by", "loss", "--keep", "9", "--out", "runs/best.parquet")
TARGETS = {
    target.name: target
    for target in (
        Target("config", _make_config, _damage_config),
        Target("yaml", _make_config, _damage_yaml),
        Target("images", _make_images, _damage_one("data/*/*/*")),
        Target("tar", _make_tar, _damage_one("data/*.tar")),
        Target("parquet", _make_parquet, _damage_one("data/*.parquet"), check=_reads_what_was_written),
        Target("npy", _make_arrays, _damage_one("data/*.npy")),
        Target("npz", _make_npz, _damage_one("data/*.npz"), check=_reads_what_was_written),
        Target("scores", _make_finished, _damage_one("scores.parquet"), (_SELECT,)),
        Target("selection", _make_finished, _damage_one("chosen.parquet"), (("train", "fixed.yaml"),)),
        Target("checkpoint", _make_run, _damage_newest, codes=frozenset({TRAINED}), check=_goes_on_equally),
        Target("signed checkpoint", _make_run, _damage_signed, check=_leaves_whole_checkpoints),
        Target(
            "run folder",
            _make_finished,
            _damage_one("runs/run/*.*"),
            (
                ("train", "config.yaml"),
                ("report", "runs/run"),
                ("show", "runs/run"),
                ("evaluate", "runs/run"),
                ("select", "runs/run", "--keep", "0.5"),
            ),
        ),
    )
}
