"""Secrets in settings and messages: what counts as one, and that a run is the same with another."""

from __future__ import annotations

import pytest

from rayprune.config import make_config
from rayprune.core.redaction import check_secrets, redacted_tree, secrets_of, with_secrets
from rayprune.errors import ConfigError, one_line, redacted, redacted_url

URLS = {
    "https://me:SECRET@host/a.parquet": "https://***@host/a.parquet",
    "https://SECRET@host/a": "https://***@host/a",
    "https://me:SEC@RET@host:80/a@b": "https://***@host:80/a@b",
    "s3://key:SEC/RET@bucket/a": "s3://***@bucket/a",
    "s3://key:SECRET%2F@bucket/a@2x.png": "s3://***@bucket/a@2x.png",
    "https://host/a?token=SECRET&region=eu": "https://host/a?token=***&region=eu",
    "https://host/a b?sig='SECRET x'": "https://host/a b?sig=***",
    "https://host/a?SECRET": "https://host/a?***",
    "s3://b/a?endpoint_override=http://me:SECRET@h&scheme=http": "s3://b/a?endpoint_override=***&scheme=http",
    "simplecache::https://me:SECRET@host/a": "simplecache::https://***@host/a",
    # No secrets.
    "s3://bucket/a@b?region=eu&scheme=http": "s3://bucket/a@b?region=eu&scheme=http",
    "http://host:9000/a@b": "http://host:9000/a@b",
    "data/a?b=c@d": "data/a?b=c@d",
    "nets/mine.py:Net": "nets/mine.py:Net",
}


@pytest.mark.parametrize("url", URLS)
def test_a_url_loses_user_password_and_query(url: str) -> None:
    assert redacted_url(url) == URLS[url]
    assert redacted_url(URLS[url]) == URLS[url]
    assert redacted_tree({"data": {"path": [url]}}) == {"data": {"path": [URLS[url]]}}
    if " " not in url and "://" in url:
        assert "SECRET" not in redacted(f"can't read ('{url}'): {url}, and {url}.")


def test_messages_have_no_secrets() -> None:
    line = one_line(ValueError("override 'data.path=https://me:SECRET@host/a?token=SECRET': twice"))
    assert line == "override 'data.path=https://***@host/a?token=***': twice"


@pytest.mark.parametrize("key", ["password", "api_key", "secret", "aws_secret_access_key", "HF_TOKEN", "credentials"])
def test_a_secret_key_loses_its_value(key: str) -> None:
    assert redacted_tree({"options": {key: "SECRET"}}) == {"options": {key: "***"}}
    nested = redacted_tree({"options": {key: {"user": "SECRET", "word": 5}}})
    assert nested == {"options": {key: {"user": "***", "word": "***"}}}


@pytest.mark.parametrize("key", ["num_tokens", "pad_token", "token_column", "secretary", "keys"])
def test_other_keys_keep_their_values(key: str) -> None:
    assert redacted_tree({key: "x"}) == {key: "x"}


def test_unset_secrets_stay_unset() -> None:
    tree = {"token": None, "password": "", "secret": False}
    assert redacted_tree(tree) == tree


def test_secrets_come_back_by_key_and_urls_anywhere() -> None:
    base = {"data": {"path": "s3://key:A@b/a", "token": "B"}, "sweep": {"space": {"data.path": ["s3://key:C@b/c"]}}}
    secrets = secrets_of(base)
    assert with_secrets(redacted_tree(base), secrets) == base
    assert with_secrets({"data": {"path": "s3://***@b/c"}}, secrets) == {"data": {"path": "s3://key:C@b/c"}}
    with pytest.raises(
        ConfigError, match=r"trial 1 does not hold the secret of model\.token: name it again, model\.token=…"
    ):
        check_secrets(with_secrets({"model": {"token": "***"}}, secrets), "trial 1")


def test_a_run_is_the_same_with_another_token() -> None:
    one, other = (
        make_config(
            {"data": {"source": "parquet", "path": f"https://me:{s}@h/a?sig={s}", "train_files": f"https://{s}@h"}}
        )
        for s in ("A", "B")
    )
    assert one != other
    assert one.digest() == other.digest()
    assert one.to_yaml() == other.to_yaml()
