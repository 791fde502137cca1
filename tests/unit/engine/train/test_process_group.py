"""The network interface of the workers' process group; tests/scenarios/cluster/test_machines.py trains over it."""

from __future__ import annotations

import psutil
import pytest

from rayprune.engine.train import process_group
from rayprune.engine.train.process_group import interface_of


def test_the_interface_is_that_of_the_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[loopback]}
    assert interface_of("203.0.113.7") is None, "an address for documentation, of no machine"


def test_an_interface_that_is_named_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    process_group._choose_interface()
    assert process_group.os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    process_group._choose_interface()
    assert process_group.os.environ["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
