"""Random damage to files: of their bytes, and of the values that they hold."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 10**9, 10**12, 2**63, -(2**63), 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", " ", "0", "auto", "none", "x[/b]/", "\x1b[31mred", "a\nb", "\0", "ü" * 300, "../..", "evil.py:Evil", "{}",
    [], [1, 64], [[]], ["a"] * 50, {}, {"name": "infobatch"}, {"a": {"b": {"c": 1}}},
)  # fmt: skip
BYTES = "at byte"  # stands in what was done to bytes, and not in what was done to values


class Payload:
    """Runs a command when it is unpickled, as a foreign file would."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """Return the call that unpickling makes."""
        return os.system, ("touch foreign-code-ran",)


def damage_file(file: Path, rng: random.Random) -> str:
    """Damage a file: its bytes, or its values in its own format; return what was done."""
    rewrite = _REWRITERS.get(file.suffix)
    if rewrite is not None and rng.random() < 0.5:
        try:
            return f"{file.name}: {rewrite(file, rng)}"
        except (OSError, ValueError, TypeError, OverflowError, IndexError):
            pass  # the file, or this format, cannot hold the value; damage the bytes instead
    content, done = damage_bytes(file.read_bytes(), rng)
    file.write_bytes(content)
    return f"{file.name}: {done}"


def damage_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return damaged content, and what was done."""
    place, length = rng.randrange(len(content) + 1), rng.choice((1, 4, 64, 4096))
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "repeat", "insert", "remove", "empty", "random"))
    before, after = content[:place], content[place:]
    if kind == "flip" and after:
        changed = before + bytes([after[0] ^ (1 << rng.randrange(8))]) + after[1:]
    elif kind == "cut":
        changed = before
    elif kind == "zero":
        changed = before + bytes(min(length, len(after))) + after[length:]
    elif kind == "repeat":
        changed = before + after[:length] + after
    elif kind == "insert":
        changed = before + rng.randbytes(length) + after
    elif kind == "remove":
        changed = before + after[length:]
    elif kind == "random":
        changed = rng.randbytes(len(content))
    else:
        changed = b""
    return changed, f"{kind} {BYTES} {place} of {len(content)}, {length} long"


def damage_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a tree of mappings and lists with one value replaced or removed, and what was done."""
    paths = list(_paths(tree))
    path, value = rng.choice(paths), rng.choice(JUNK)
    if not path:
        return value, f"all = {value!r}"
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    name = ".".join(map(str, path))
    if rng.random() < 0.2:
        del holder[path[-1]]
        return tree, f"without {name}"
    holder[path[-1]] = value
    return tree, f"{name} = {value!r}"


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _paths(value, (*path, key))


def _rewrite_json(file: Path, rng: random.Random) -> str:
    tree, done = damage_tree(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(tree))
    return done


def _rewrite_lines(file: Path, rng: random.Random) -> str:
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    tree, done = damage_tree(json.loads(lines[number]), rng)
    lines[number] = json.dumps(tree)
    file.write_text("\n".join(lines) + "\n")
    return f"line {number}: {done}"


def _rewrite_yaml(file: Path, rng: random.Random) -> str:
    tree, done = damage_tree(yaml.safe_load(file.read_text()), rng)
    file.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return done


def damage_array(array: np.ndarray, rng: random.Random) -> tuple[np.ndarray | None, str]:
    """Return an array of another shape, dtype or content (None: no array), and what was done."""
    kind = rng.choice(("empty", "longer", "shorter", "dtype", "fill", "axis", "pickle", "missing"))
    if kind == "empty":
        return array[:0] if array.ndim else np.empty(0), kind
    if kind == "longer":
        return np.concatenate([np.atleast_1d(array)] * 2), kind
    if kind == "shorter":
        return np.atleast_1d(array)[:-1], kind
    if kind == "dtype":
        dtype = rng.choice(("S4", "float16", "int8", "complex64", "bool", "U3"))
        return array.astype(dtype), f"{kind} {dtype}"
    if kind == "fill":
        value = rng.choice((float("nan"), -1, 2**31 - 1, 1e30))
        with np.errstate(invalid="ignore"):
            return np.full_like(array, np.array(value).astype(array.dtype)), f"{kind} {value}"
    if kind == "axis":
        return array[None], kind
    if kind == "pickle":
        return np.array([Payload()], dtype=object), kind
    return None, kind


def _rewrite_npy(file: Path, rng: random.Random) -> str:
    array, done = damage_array(np.load(file, allow_pickle=False), rng)
    if array is None:
        file.unlink()
    else:
        np.save(file, array, allow_pickle=True)
    return done


def _rewrite_npz(file: Path, rng: random.Random) -> str:
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(sorted(arrays))
    array, done = damage_array(arrays[name], rng)
    arrays = {
        **{key: value for key, value in arrays.items() if key != name},
        **({} if array is None else {name: array}),
    }
    np.savez(file, allow_pickle=True, **arrays)
    return f"{name}: {done}"


def _rewrite_tensors(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        torch.save(Payload(), file)
        return "a pickle that runs a command"
    tree = torch.load(file, weights_only=True)
    paths = [path for path in _paths(tree) if path]
    path = rng.choice(paths)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    value, name = holder[path[-1]], ".".join(map(str, path))
    if isinstance(value, torch.Tensor):
        array, done = damage_array(value.numpy(), rng)
        if array is None:
            del holder[path[-1]]
        else:
            holder[path[-1]] = Payload() if array.dtype == object else torch.from_numpy(np.ascontiguousarray(array))
    else:
        holder[path[-1]] = junk = rng.choice(JUNK)
        done = repr(junk)
    torch.save(tree, file)
    return f"{name}: {done}"


def _rewrite_parquet(file: Path, rng: random.Random) -> str:
    table = pq.read_table(file)
    name = rng.choice(table.column_names)
    index, column = table.column_names.index(name), table[name]
    kind = rng.choice(("drop", "rename", "text", "null", "huge", "nan", "twice", "empty", "metadata"))
    if kind == "drop":
        table = table.drop_columns([name])
    elif kind == "rename":
        table = table.rename_columns([f"{each}[/b]" if each == name else each for each in table.column_names])
    elif kind == "text":
        table = table.set_column(index, name, pa.array(["x"] * len(table)))
    elif kind == "null":
        table = table.set_column(index, name, pa.array([None] * len(table), type=column.type))
    elif kind in ("huge", "nan"):
        value = 10**12 if kind == "huge" else float("nan")
        table = table.set_column(index, name, pa.array([value] * len(table)))
    elif kind == "twice":
        table = pa.concat_tables([table, table])
    elif kind == "empty":
        table = table.slice(0, 0)
    else:
        table = table.replace_schema_metadata(dict.fromkeys(table.schema.metadata or {}, b"{}"))
    stream = io.BytesIO()
    pq.write_table(table, stream)
    file.write_bytes(stream.getvalue())
    return f"{kind} {name}"


_REWRITERS: dict[str, Callable[[Path, random.Random], str]] = {
    ".json": _rewrite_json,
    ".jsonl": _rewrite_lines,
    ".yaml": _rewrite_yaml,
    ".npy": _rewrite_npy,
    ".npz": _rewrite_npz,
    ".pt": _rewrite_tensors,
    ".parquet": _rewrite_parquet,
}
