"""A second host on this machine: a network namespace at the end of a pair of virtual interfaces, that loses packets.

with other_host() as host:
    process = await asyncio.create_subprocess_exec(*host.command(hidden), "program")
    host.ours        the address under which that host reaches us
    host.lacking     part of it -> why it is not there: packages fail in CI, what the kernel lacks does not
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOSS = 0.01  # of packets, each way
NAMESPACE, MOUNTS, LOST = "network namespace", "mount namespace", "packet loss"


@dataclass
class OtherHost:
    """Without a namespace it is this host, and its address the loopback's."""

    ours: str = "127.0.0.1"
    namespace: str = ""
    lacking: dict[str, str] = field(default_factory=dict)

    def command(self, hidden: Path) -> list[str]:
        """What a program's command line begins with there. hidden: a directory of ours that is empty there."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        if MOUNTS in self.lacking:
            return inside
        script = 'mount -t tmpfs none "$0" && exec "$@"'
        return [*inside, "unshare", "--mount", "sh", "-c", script, str(hidden)]

    def reaches(self, host: str, port: int) -> bool:
        """Whether a connection from there is taken."""
        script = f"import socket; socket.create_connection(({host!r}, {port}), timeout=5)"
        return _run(*self.command(Path("/mnt")), shutil.which("python3") or "python3", "-c", script) == ""

    def files(self, hidden: Path) -> str:
        """What is in a directory of ours, as seen from there."""
        return subprocess.run([*self.command(hidden), "ls", "-A", hidden], capture_output=True, text=True).stdout

    def lost(self) -> int:
        """Packets dropped so far, both ways."""
        said = subprocess.run(self._iptables("-L", "-v", "-n", "-x"), capture_output=True, text=True, check=True)
        return sum(int(found) for found in re.findall(r"^\s*(\d+)\s+\d+\s+DROP", said.stdout, re.MULTILINE))

    def _iptables(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, "iptables", "-w", *arguments]

    def lose_packets(self) -> None:
        for chain in ("INPUT", "OUTPUT"):
            rule = ("-m", "statistic", "--mode", "random", "--probability", str(LOSS), "-j", "DROP")
            if problem := _run(*self._iptables("-A", chain, *rule)):
                self.lacking[LOST] = problem
                return


@contextlib.contextmanager
def other_host() -> Iterator[OtherHost]:
    host, name = OtherHost(), f"sapo-{os.getpid()}"
    if problem := _run("unshare", "--mount", "true"):
        host.lacking[MOUNTS] = problem
    if problem := _run("ip", "netns", "add", name):
        host.lacking |= {NAMESPACE: problem, LOST: f"no network namespace: {problem}"}
        yield host
        return
    try:
        if problem := _connect(host, name):
            host.lacking |= {NAMESPACE: problem, LOST: f"no network namespace: {problem}"}
        else:
            host.lose_packets()
        yield host
    finally:
        _run("ip", "netns", "del", name)  # and with it the pair of interfaces


def _connect(host: OtherHost, name: str) -> str:
    """A pair of interfaces between here and there; why not, or ""."""
    net = f"198.18.{random.randrange(256)}.{4 * random.randrange(64)}"  # for tests of networks (RFC 2544)
    here, there = (f"{net.rpartition('.')[0]}.{int(net.rpartition('.')[2]) + last}" for last in (1, 2))
    near, far = f"sn{os.getpid()}", f"sf{os.getpid()}"
    for command in (
        f"ip link add {near} type veth peer name {far}",
        f"ip link set {far} netns {name}",
        f"ip addr add {here}/30 dev {near}",
        f"ip link set {near} up",
        f"ip -n {name} addr add {there}/30 dev {far}",
        f"ip -n {name} link set {far} up",
        f"ip -n {name} link set lo up",
    ):  # fmt: skip
        if problem := _run(*command.split()):
            return problem
    host.ours, host.namespace = here, name
    return ""


def _run(*command: str) -> str:
    """ "" when it succeeds, else what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]} exited with {done.returncode}"
