"""launch/torchrun.sh on two hosts, one rank each, without SLURM."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import Unbroken, losses_of
from tests.launch.hosts import Host, Network, wait_until
from tests.launch.line import NAME, REPOSITORY, command, environment

pytestmark = [pytest.mark.twonode, pytest.mark.timeout(900)]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    network = Network(["host1", "host2"], tmp_path, prefix=f"two{os.getpid()}", subnet="10.83.8")
    try:
        network.up()
        yield list(network.hosts.values())
    finally:
        network.down()


def _start(host: Host, first: Host, runs_dir: Path) -> "subprocess.Popen[str]":
    """Start distill on a host by the recipe; its output is in ``<name>.log``."""
    python, *rest = command("distill", runs_dir)
    wrapper = runs_dir / "minitron"
    wrapper.write_text(f'#!/bin/bash\nexec {python} -m minitron.cli.main "$@"\n')
    wrapper.chmod(0o755)
    words = rest[rest.index("distill") :]
    recipe = [str(REPOSITORY / "launch" / "torchrun.sh"), first.address, "2", "1", *words]
    env = {**environment(), "MINITRON": str(wrapper)}
    with (runs_dir / f"{host.name}.log").open("a") as log:
        return host.start(["bash", "-c", 'cd "$0" && exec "$@"', str(REPOSITORY), *recipe], log, env=env)


def _worker(host: Host) -> int:
    """Process id, on this machine, of the rank that runs on a host."""
    namespace = os.readlink(f"/proc/{host.init_pid}/ns/pid")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            inside = os.readlink(folder / "ns" / "pid") == namespace
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if inside and b"minitron.cli.worker" in words:
            return int(folder.name)
    raise AssertionError(f"no rank on {host.name}")


def _finish(processes: "list[subprocess.Popen[str]]", runs_dir: Path) -> None:
    codes = [process.wait(timeout=400) for process in processes]
    logs = "".join(file.read_text() for file in runs_dir.glob("host*.log"))
    assert codes == [0, 0], logs


def _wait_for_step(runs_dir: Path, step: int) -> None:
    run = runs_dir / NAME
    wait_until(f"step {step}", lambda: len(losses_of(run)) >= step, timeout_s=400, interval_s=0.05)
    assert not (run / "distill").exists(), "distill is over already"


def test_a_killed_worker_costs_the_steps_since_the_last_save(
    hosts: list[Host], unbroken: Unbroken, tmp_path: Path
) -> None:
    unbroken.copy_undistilled(tmp_path)
    processes = [_start(host, hosts[0], tmp_path) for host in hosts]
    _wait_for_step(tmp_path, 50)
    os.kill(_worker(hosts[1]), signal.SIGKILL)
    _finish(processes, tmp_path)
    assert losses_of(tmp_path / NAME) == unbroken.losses


def test_a_lost_host_comes_back(hosts: list[Host], unbroken: Unbroken, tmp_path: Path) -> None:
    unbroken.copy_undistilled(tmp_path)
    first, second = (_start(host, hosts[0], tmp_path) for host in hosts)
    _wait_for_step(tmp_path, 50)
    hosts[1].crash()
    second.wait(timeout=30)
    hosts[1].boot()
    _finish([first, _start(hosts[1], hosts[0], tmp_path)], tmp_path)
    assert losses_of(tmp_path / NAME) == unbroken.losses


def test_a_rank_that_is_asked_stops_both_hosts_for_good(hosts: list[Host], unbroken: Unbroken, tmp_path: Path) -> None:
    """They end saved, with the code that says so, and the elastic launcher does not start them again."""
    unbroken.copy_undistilled(tmp_path)
    processes = [_start(host, hosts[0], tmp_path) for host in hosts]
    _wait_for_step(tmp_path, 50)
    os.kill(_worker(hosts[1]), signal.SIGUSR1)
    assert [process.wait(timeout=120) for process in processes] == [75, 75]
    assert "stopped after step" in (tmp_path / "host1.log").read_text()
    _finish([_start(host, hosts[0], tmp_path) for host in hosts], tmp_path)
    assert losses_of(tmp_path / NAME) == unbroken.losses
