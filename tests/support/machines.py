"""Several machines on one kernel, for tests of clusters: own network, processes, host name and temporary folders.

Each machine has an address of its own on a virtual Ethernet switch, sees only its own processes, and has its own /tmp,
/dev/shm and home directory, which no other machine can read. They share the kernel, the CPUs, and the rest of the file
system, as machines share an image. Linux only; root, or the right to create namespaces, is needed.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.slow_cable import SlowCable, in_network_of

GCS_PORT = 6379
_OWN = ["--net", "--pid", "--mount", "--uts"]
_FIRST_ADDRESS = "10.77.0."
_HOME = "/tmp/home"
# What is mounted before a machine is used; `wait` keeps the first process of its process namespace alive.
_BOOT = """
set -e
hostname {name}
mount -t proc proc /proc
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs -o size=4g tmpfs /tmp
mkdir -p {home}
ip link set lo up
echo ready
exec sleep infinity
"""


def can_make_machines() -> bool:
    """Return whether this process may create namespaces and network devices."""
    probe = "ip link add rp0 type veth peer name rp1 && ip link set lo up"
    try:
        return subprocess.run(["unshare", *_OWN, "--fork", "sh", "-c", probe], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@dataclass
class Machine:
    """One machine.

    Attributes:
        name: its host name.
        address: its IP address.
        environment: the variables of its processes.
        holder: the process outside whose child is the first process of the machine; its end is the machine's.
        cable: to the switch, if it can be slow.
    """

    name: str
    address: str
    environment: dict[str, str]
    holder: subprocess.Popen[str]
    cable: SlowCable | None = None

    @property
    def pid(self) -> int:
        """The number, outside, of the machine's first process."""
        return int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0])

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on the machine."""
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", "-u", *words]

    def start(self, *words: str, cwd: str = "/tmp") -> subprocess.Popen[str]:
        """Start a program on the machine, in a session of its own."""
        script = f"cd {shlex.quote(cwd)} && exec {shlex.join(words)}"
        return subprocess.Popen(
            self.command(["sh", "-c", script]),
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *words: str, cwd: str = "/tmp", timeout: float = 300) -> str:
        """Run a program on the machine to its successful end; return what it prints."""
        started = self.start(*words, cwd=cwd)
        try:
            printed, _ = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            started.kill()
            raise
        assert started.returncode == 0, f"{shlex.join(words)}:\n{printed[-4000:]}"
        return printed

    def start_ray(self, head: Machine, num_cpus: int) -> None:
        """Start a Ray node, the head node if `head` is this machine."""
        common = [f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", "--object-store-memory=200000000"]
        if head is self:
            role = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
        else:
            role = [f"--address={head.address}:{GCS_PORT}"]
        self.run(str(Path(sys.executable).with_name("ray")), "start", *role, *common, "--disable-usage-stats")

    def kill(self) -> None:
        """End the machine at once, with all its processes and files."""
        if self.holder.poll() is None:
            os.kill(self.pid, 9)  # the first process: the kernel kills all others of its namespace
        self.holder.wait()


class Machines:
    """The switch and the machines at it.

    Attributes:
        switch_address: the switch's own address, where this process can `listen`.
        environment: the variables of all machines' processes; those added later count for machines added later.
    """

    switch_address = f"{_FIRST_ADDRESS}254"

    def __init__(self) -> None:
        self._started: list[Machine] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        own = {"HOME": _HOME, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "120"}
        self.environment = {**clean, **own}
        self._switch = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own_network, its = (Path(f"/proc/{pid}/ns/net") for pid in ("self", self._switch.pid))
        end = time.monotonic() + 10
        while its.readlink() == own_network.readlink():
            assert time.monotonic() < end, "the switch did not start"
            time.sleep(0.01)
        self._at_switch("ip", "link", "set", "lo", "up")
        self._at_switch("ip", "link", "add", "br0", "type", "bridge")
        self._at_switch("ip", "address", "add", f"{self.switch_address}/24", "dev", "br0")
        self._at_switch("ip", "link", "set", "br0", "up")

    def _at_switch(self, *words: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._switch.pid), "-n", *words], check=True)

    def add(self, *, delayed: bool = False) -> Machine:
        """Start a machine with the next free address, and a SlowCable if it is `delayed`."""
        number = len(self._started) + 1
        name = f"machine{number}"
        boot = _BOOT.format(name=name, home=_HOME)
        holder = subprocess.Popen(
            ["unshare", *_OWN, "--propagation", "private", "--fork", "--kill-child", "sh", "-c", boot],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare remarks on its end
        )
        machine = Machine(name, f"{_FIRST_ADDRESS}{number}", dict(self.environment), holder)
        self._started.append(machine)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", f"{name} did not start"
        plug = f"veth{number}"
        if delayed:
            machine.cable = SlowCable((self._switch.pid, plug), (machine.pid, "eth0"))
        else:
            peer = ["type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)]
            self._at_switch("ip", "link", "add", plug, *peer)
        self._at_switch("ip", "link", "set", plug, "master", "br0", "up")
        subprocess.run(machine.command(["ip", "address", "add", f"{machine.address}/24", "dev", "eth0"]), check=True)
        subprocess.run(machine.command(["ip", "link", "set", "eth0", "up"]), check=True)
        return machine

    def listen(self) -> socket.socket:
        """Return a socket of this process that listens at the switch, on a free port of `switch_address`."""
        return in_network_of(self._switch.pid, lambda: socket.create_server((self.switch_address, 0)))

    def close(self) -> None:
        """End all machines."""
        for machine in self._started:
            if machine.cable is not None:
                machine.cable.close()
            machine.kill()
        self._switch.kill()
        self._switch.wait()


@contextmanager
def machines() -> Iterator[Machines]:
    """Make a switch without machines; end it and the machines that were added when the block ends."""
    switch = Machines()
    try:
        yield switch
    finally:
        switch.close()
