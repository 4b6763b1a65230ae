"""Several hosts on this machine: each has its own network, host name, /etc/hosts and processes; the disk is shared."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# Process 1 of a host: it names the host, adopts and buries orphans, and takes every process with it when it dies.
_INIT = 'hostname "$1" && mount --bind "$2" /etc/hosts && echo up && { sleep infinity & wait; }'


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One host of a `Network`."""

    def __init__(self, name: str, address: str, namespace: str, hosts_file: Path) -> None:
        self.name, self.address = name, address
        self._namespace, self._hosts_file = namespace, hosts_file
        self._init: subprocess.Popen[str] | None = None

    def boot(self) -> None:
        """Start its process 1."""
        separate = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{self._namespace}", *separate]
        command += ["bash", "-c", _INIT, "init", self.name, str(self._hosts_file)]
        self._init = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "up\n", f"{self.name} does not start"

    def crash(self) -> None:
        """Kill every process of the host at once."""
        if self._init is not None:
            self._init.kill()
            self._init.communicate()
            self._init = None

    @property
    def init_pid(self) -> int:
        """Its process 1, as this machine numbers it."""
        assert self._init is not None, f"{self.name} is down"
        pid = self._init.pid
        (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(first)

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line that runs another one on this host."""
        return [
            "nsenter",
            "--target",
            str(self.init_pid),
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--wdns=/",
            "--",
            *words,
        ]

    def run(self, words: Sequence[str], **settings: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with_defaults: dict[str, object] = {"capture_output": True, "text": True, "check": False, **settings}
        return subprocess.run(self.command(words), **with_defaults)  # type: ignore[call-overload,no-any-return]

    def start(self, words: Sequence[str], log: IO[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command; its output goes to ``log``."""
        return subprocess.Popen(
            self.command(words), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True
        )


class Network:
    """Hosts joined by a switch.

    Args:
        names: Names of the hosts; the first has the address ``<subnet>.1``.
        folder: For their hosts file.
        prefix: Of the kernel's names for the namespaces, unique on this machine.
        subnet: First three numbers of the addresses.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, prefix: str, subnet: str) -> None:
        self._switch = f"{prefix}-switch"
        self._namespaces = {name: f"{prefix}-{name}" for name in names}
        addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, start=1)}
        hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        hosts_file.write_text("\n".join(lines) + "\n")
        self.hosts = {name: Host(name, addresses[name], space, hosts_file) for name, space in self._namespaces.items()}

    def up(self) -> None:
        """Make the switch, the wires and the hosts."""
        self._remove()  # what an interrupted test has left
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for number, (name, space) in enumerate(self._namespaces.items()):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", f"port{number}", "netns", self._switch)
            _ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{self.hosts[name].address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            self.hosts[name].boot()

    def down(self) -> None:
        """End every host and take the wires away."""
        for host in self.hosts.values():
            host.crash()
        self._remove()

    def _remove(self) -> None:
        for space in (*self._namespaces.values(), self._switch):
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def wait_until(what: str, condition: object, *, timeout_s: float, interval_s: float = 0.1) -> None:
    """Wait for a condition to hold.

    Args:
        what: In words, for the failure.
        condition: Called again and again.
        timeout_s: How long.
        interval_s: How often.
    """
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(interval_s)
