"""Stored configs are read again without running code, or using secrets, that the user has not named."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprune.config import Config, make_config
from rayprune.config.code import code_digest, code_references, file_digests
from rayprune.engine.storage.run_folder import write_whole
from rayprune.engine.storage.stored_config import read_like, read_trusted
from rayprune.errors import ConfigError
from tests.support.foreign_folder import code_with_a_mark
from tests.support.runs import run_config

# Every place of a config where a reference runs code.
PLACES = (
    "method.name",
    "method.of.name",
    "model.name",
    "data.source",
    "data.dataset",
    "train.step.name",
    "collect.embedder",
    "collect.model.name",
    "collect.train.step",
    "audit.train.step",
    "compare.methods",
    "sweep.space",
)


def at(place: str, reference: str) -> dict[str, Any]:
    """Return settings that name code in one place."""
    if place == "compare.methods":
        return {"compare": {"methods": ["infobatch", {"name": reference}]}}
    if place == "sweep.space":
        return {"sweep": {"space": {"method.name": [reference]}}}
    tree: Any = reference
    for key in reversed(place.split(".")):
        tree = {key: tree}
    if place == "method.of.name":
        tree["method"]["name"] = "shuffled"
    return dict(tree)


def stored(folder: Path, tree: dict[str, Any], **environment: Any) -> Path:
    """Write a run folder; return its config.yaml."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder / "config.yaml"


def test_a_config_reads_back(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    write_whole(tmp_path / "config.yaml", config.to_yaml())
    assert read_like(tmp_path / "config.yaml", config) == config
    assert read_trusted(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("content", [None, "a: [1", "train: {epoch: 3}", "garbage", "- 1"])
def test_a_config_that_cannot_be_read_is_one_line(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml can't be read \(.*\): restore it or choose") as caught:
        read_like(file, run_config(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_stored_config_does_not_run_unasked(place: str, tmp_path: Path) -> None:
    reference = code_with_a_mark(tmp_path)
    file = stored(tmp_path / "run", at(place, reference), code=file_digests(at(place, reference)))
    code = rf"{place}.* = {re.escape(reference)} \(digest [0-9a-f]{{32}}\)"
    with pytest.raises(ConfigError, match=rf"config\.yaml names code, {code}: read it, then add --trust"):
        read_trusted(file)
    with pytest.raises(ConfigError, match=r"\(digest [0-9a-f]{32}, not 0{32}\)"):
        read_trusted(file, trust="0" * 32)
    assert read_like(file, Config()) is None
    assert not (tmp_path / "executed").exists()


def test_trusted_code_runs_and_a_digest_is_of_this_code_alone(tmp_path: Path) -> None:
    tree = at("method.name", code_with_a_mark(tmp_path))
    file, digest = stored(tmp_path / "run", tree), code_digest(code_references(tree))
    assert read_trusted(file, trust=digest).method["name"] == tree["method"]["name"]
    assert (tmp_path / "executed").exists()
    assert read_trusted(file, trust=True).method["name"] == tree["method"]["name"]
    (tmp_path / "evil.py").write_text("# changed")
    with pytest.raises(ConfigError, match=f"not {digest}"):
        read_trusted(file, trust=digest)


def test_code_that_the_user_names_runs_if_it_has_not_changed(tmp_path: Path) -> None:
    reference = code_with_a_mark(tmp_path)
    tree = at("method.name", reference)
    file = stored(tmp_path / "run", tree, code=file_digests(tree))
    assert read_trusted(file, [f"method.name={reference}"]).method["name"] == reference
    (tmp_path / "evil.py").write_text("# changed")
    with pytest.raises(ConfigError, match="read it, then add --trust"):
        read_trusted(file, [f"method.name={reference}"])


def test_a_run_continues_with_the_users_code_where_it_now_lies(tmp_path: Path) -> None:
    theirs, mine = code_with_a_mark(tmp_path / "theirs"), code_with_a_mark(tmp_path / "mine")
    own = make_config(at("method.name", mine))
    like = read_like(stored(tmp_path / "run", at("method.name", theirs)), own)
    assert like is not None
    assert like.method["name"] == mine
    assert like.digest() == own.digest()
    assert not (tmp_path / "theirs" / "executed").exists()


def test_a_module_counts_as_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code_with_a_mark(tmp_path, "evil_module")
    with pytest.raises(ConfigError, match=r"data\.source = evil_module:Mine"):
        read_trusted(stored(tmp_path / "run", at("data.source", "evil_module:Mine")))
    assert not (tmp_path / "executed").exists()


def test_a_digest_is_sha_256_of_the_file(tmp_path: Path) -> None:
    reference = code_with_a_mark(tmp_path)
    digest = hashlib.sha256((tmp_path / "evil.py").read_bytes()).hexdigest()
    assert digest.startswith(file_digests(at("model.name", reference))[reference])


def test_a_stored_url_without_its_secret_is_named_again(tmp_path: Path) -> None:
    url = "s3://key:secret@bucket/a?region=eu"
    config = make_config({"data": {"source": "parquet", "path": url}})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert "secret" not in file.read_text()
    with pytest.raises(
        ConfigError, match=r"does not hold the secret of data\.path: name it again, data\.path=…, or take"
    ):
        read_trusted(file)
    assert read_trusted(file, [f"data.path={url}"]) == config
    like = read_like(file, config)
    assert like is not None
    assert like.shown() == config.shown()
