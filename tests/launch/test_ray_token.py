"""The token of a cluster on this machine, without one."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

from rechub_dist.launch.ray_workers import _make_token


def test_a_cluster_of_this_machine_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for _ in range(2):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        _make_token()
        found.add(os.environ["RAY_AUTH_TOKEN"])
        assert "RAY_AUTH_MODE" not in os.environ  # Ray's own default is to ask for it
    assert [len(token) for token in found] == [64, 64]
    _make_token()
    assert os.environ["RAY_AUTH_TOKEN"] in found  # what is set stays
    monkeypatch.delenv("RAY_AUTH_TOKEN")


def test_a_file_with_a_token_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret/token")
    _make_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
