"""Secrets: which names have them, where they are refused, and that messages hide them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.cli import main
from rechub_dist.cli.checkpoint import _settings
from rechub_dist.config import StorageConfig, read_run, run_from, stored_run
from rechub_dist.config.secrets import from_environment
from rechub_dist.data.parquet.storage import locate
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.launching.search import read_space
from rechub_dist.redaction import is_secret, redacted
from rechub_dist.reporting.logs import log_to

PLANTED = "planted-7Qz"
SECRET = [
    "secret_key", "access_key", "session_token", "account_key", "sas_token", "key", "secret", "password", "passphrase",
    "clientSecret", "SharedAccessSignature", "X-Amz-Signature", "sig", "connection_string", "access_token", "api-key",
]  # fmt: skip
HARMLESS = {
    "region": "eu", "account_name": "shop", "role_arn": "arn:aws:iam::1:role/x", "scheme": "http", "key_file": "k.pem",
    "token": "anon", "credentials": "/var/run/key.json", "background_writes": True, "username": "shop",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name, PLANTED)
    assert not is_secret(name, {"env": "NAME"})


@pytest.mark.parametrize("name", HARMLESS)
def test_names_of_what_may_be_seen(name: str) -> None:
    assert not is_secret(name, HARMLESS[name])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("s3://user:planted-7Qz@host/x?region=eu", "s3://user:***@host/x?region=eu"),
        ("at s3://b/x?secret_key=planted-7Qz&region=eu.", "at s3://b/x?secret_key=***&region=eu."),
        ("https://a.blob/x?sv=1&sig=planted-7Qz: 403", "https://a.blob/x?sv=1&sig=***: 403"),
        ("got {'secret_key': 'planted-7Qz', 'region': 'eu'}", "got {'secret_key': '***', 'region': 'eu'}"),
        ("--set data.storage.options.password=planted-7Qz", "--set data.storage.options.password=***"),
        ("AccountName=x;AccountKey=a;account_key=planted-7Qz", "AccountName=x;AccountKey=***;account_key=***"),
    ],
)
def test_messages_hide_secrets(said: str, told: str) -> None:
    assert redacted(said) == told == str(UserError(said)) == redacted(told)


@pytest.mark.parametrize(
    "said",
    [
        "abfs://container@account.dfs.core.windows.net/x: unknown", "http://minio:9000/x?region=eu", "[fd00::1]:29400",
        "features.token: unknown key 'size'", "key: must be a name", "run.yaml: missing key 'data'", "hdfs://u@host:8020",
    ],
)  # fmt: skip
def test_messages_without_secrets_stay(said: str) -> None:
    assert redacted(said) == said


def tree(**data: Any) -> dict[str, Any]:
    return {"output_dir": "out", "data": {"root": "data", **data}, "model": {"name": "DeepFM"}}


OPTIONS = {"options": {"secret_key": PLANTED}}
NESTED = {"options": {"client_kwargs": {"proxies": [f"http://u:{PLANTED}@proxy:3128"]}}}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (tree(storage=OPTIONS), "data.storage.options.secret_key is a secret"),
        (tree(storage=NESTED), "data.storage.options.client_kwargs.proxies.0 is an address with a secret"),
        ({**tree(), "checkpoint": {"storage": OPTIONS}}, "checkpoint.storage.options.secret_key is a secret"),
        (tree(train=["train", f"s3://b/x?secret_key={PLANTED}"]), "data.train.1 is an address with a secret"),
        (tree(dataset={"tables": {"a": {"vocabulary": f"sftp://u:{PLANTED}@host/x"}}}), "data.dataset.tables.a.voc"),
    ],
)
def test_a_run_file_with_a_secret_is_refused(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    for read in (lambda: read_run(path), lambda: run_from(given)):
        with pytest.raises(UserError) as refused:
            read()
        assert named in str(refused.value)
        assert "AWS_SECRET_ACCESS_KEY" in str(refused.value)
        assert PLANTED not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        f"data.storage.options.secret_key={PLANTED}",
        f"data.storage={{options: {{secret_key: {PLANTED}}}}}",
        f"data.root=s3://b?secret_key={PLANTED}",
        f"data.storage.options.secret_key=[{PLANTED}",  # no YAML
    ],
)
def test_an_option_with_a_secret_is_refused(override: str) -> None:
    with pytest.raises(UserError, match="--set") as refused:
        run_from(tree(), [override])
    assert PLANTED not in str(refused.value)


def test_a_schema_and_the_storage_option_with_a_secret_are_refused(tmp_path: Path) -> None:
    schema = {"features": {"a": {"kind": "sparse", "vocabulary": f"s3://b/v?sas_token={PLANTED}"}}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(schema))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree(), "data": {"root": str(tmp_path)}}))
    with pytest.raises(UserError, match=r"features\.a\.vocabulary is an address with a secret") as refused:
        load_run(tmp_path / "run.yaml")
    assert PLANTED not in str(refused.value)
    with pytest.raises(UserError, match=r"--storage: options\.secret_key is a secret") as refused:
        _settings(json.dumps(OPTIONS))
    assert PLANTED not in str(refused.value)


def test_a_search_space_with_a_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"data.storage.options.secret_key": {"choice": [PLANTED, "other"]}}))
    with pytest.raises(UserError, match=r"secret_key is a secret") as refused:
        read_space(path, run_from(tree()), 1)
    assert PLANTED not in str(refused.value)


@pytest.mark.parametrize("address", [f"s3://b/x?secret_key={PLANTED}", f"sftp://u:{PLANTED}@host/x"])
def test_an_address_with_a_secret_is_not_opened(address: str) -> None:
    with pytest.raises(UserError, match="an address with a secret") as refused:
        locate(address, StorageConfig())
    assert PLANTED not in str(refused.value)


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "secret_key": {"env": "RECHUB_SECRET_A"},
        "client_kwargs": {"auth": {"env": "RECHUB_SECRET_A"}, "verify": False},
        "region": "eu",
    }
    config = run_from(tree(storage={"options": given}))
    assert yaml.safe_load(config.dump())["data"]["storage"]["options"] == given
    monkeypatch.setenv("RECHUB_SECRET_A", PLANTED)
    found = from_environment(config.data.storage.options)
    assert found == {"secret_key": PLANTED, "client_kwargs": {"auth": PLANTED, "verify": False}, "region": "eu"}
    monkeypatch.delenv("RECHUB_SECRET_A")
    with pytest.raises(UserError, match="the environment variable RECHUB_SECRET_A, which is not set"):
        locate("s3://bucket/x", config.storage)


def test_a_checkpoint_cannot_ask_for_any_variable() -> None:
    """It names the endpoint, too, to which the value would be sent."""
    with pytest.raises(UserError, match="only those that begin with RECHUB_SECRET_ may be used"):
        from_environment({"client_kwargs": {"key": {"env": "AWS_SECRET_ACCESS_KEY"}}})


def test_a_run_of_before_loads_and_does_not_hand_its_secrets_on() -> None:
    options = {"secret_key": PLANTED, "region": "eu"}
    text = yaml.safe_dump({**tree(storage={"options": options}), "checkpoint": {"storage": {"options": options}}})
    config = stored_run(text, "step 7", ["train.epochs=3"])
    assert config.data.storage.options == options
    for dumped in (config.dump(), config.dump_given()):
        assert PLANTED not in dumped
        assert stored_run(dumped, "step 8").data.storage.options == {"region": "eu"}
    assert PLANTED not in repr(config)


def test_an_unexpected_exception_hides_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise OSError(f"https://a/x?sig={PLANTED}")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(main, "run_app", fail)
    with pytest.raises(OSError, match="sig") as raised:
        main.main()
    sys.excepthook(raised.type, raised.value, raised.tb)
    told = capsys.readouterr().err
    assert told.endswith("OSError: https://a/x?sig=***\n")
    assert PLANTED not in told.splitlines()[-1]


def test_logs_hide_secrets(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers, root.level
    try:
        log_to(tmp_path, 0)
        try:
            raise OSError(f"https://a/x?sig={PLANTED}")
        except OSError:
            logging.getLogger("some.client").exception("GET https://u:%s@host/x", PLANTED)
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, _ = before
        root.setLevel(before[1])
    (line,) = (tmp_path / "rank-0.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["message"] == "GET https://u:***@host/x"
    assert "sig=***" in found["exc_info"]
    assert PLANTED not in line
