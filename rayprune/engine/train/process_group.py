"""The workers' process group, on the network that Ray uses.

Ray Train forms the group, but Gloo chooses its own address: that to which the machine's host name resolves. On Debian
and Ubuntu, /etc/hosts says 127.0.1.1, and if the name does not resolve, Gloo takes 127.0.0.1. Workers on several
machines then wait for each other at their own loopback, and training fails after half a minute.
"""

from __future__ import annotations

import os

import psutil
import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_VARIABLE = "GLOO_SOCKET_IFNAME"


class ProcessGroup(TorchConfig):
    """A TorchConfig whose Gloo listens on the interface of Ray's address, unless GLOO_SOCKET_IFNAME names one."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets up the workers."""
        return _OnRaysNetwork


class _OnRaysNetwork(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]  # Ray's own types differ
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(_VARIABLE, name)


def interface_of(address: str) -> str | None:
    """Return the network interface with an IP address; None if it is another machine's, such as a translated one."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in {each.address.partition("%")[0] for each in addresses}:
            return name
    return None
