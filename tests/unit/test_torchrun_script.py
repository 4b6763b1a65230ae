"""What launch/torchrun.sh makes of its first three words; `echo` stands for minitron."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"


def _run(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {"MINITRON": "/bin/echo", "PATH": path or "/usr/sbin:/usr/bin:/sbin:/bin"}
    command = [shutil.which("bash") or "bash", str(SCRIPT), *words, "compress"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuchhost", "2", "1"), "ADDRESS is 'nosuchhost', not an IPv4 address; write the first host's as the oth"),
        (("10.0.0.256", "2", "1"), "ADDRESS is '10.0.0.256', not an IPv4 address"),
        (("10.0.0.1:", "2", "1"), "ADDRESS is '10.0.0.1:', not an IPv4 address"),
        (("10.0.0.1:29500", "two", "1"), "HOSTS is 'two'; write their number, 2 or more"),
        (("10.0.0.1", "1", "1"), "HOSTS is '1'; write their number, 2 or more"),
        (("10.0.0.1", "2", "0"), "RANKS_PER_HOST is '0'; write the processes on each host, 1 or more"),
        (("10.0.0.1", "2", "8x"), "RANKS_PER_HOST is '8x'; write the processes"),
    ],
)
def test_refused_in_one_line(words: tuple[str, str, str], message: str) -> None:
    done = _run(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {message}")


def test_without_the_program_ip(tmp_path: Path) -> None:
    done = _run("10.0.0.1", "2", "1", path=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the program ip is missing; install iproute2" in done.stderr


@pytest.mark.skipif(shutil.which("ip", path="/usr/sbin:/usr/bin:/sbin:/bin") is None, reason="needs iproute2")
@pytest.mark.parametrize(("address", "port"), [("127.0.0.1", "29500"), ("127.0.0.1:1234", "1234")])
def test_the_first_host_knows_itself(address: str, port: str) -> None:
    done = _run(address, "3", "8")
    assert done.stdout.split() == [
        "compress",
        "launch=torchrun",
        "launch.nodes=3",
        "launch.nproc_per_node=8",
        f"launch.rendezvous=127.0.0.1:{port}",
        "launch.is_host=true",
        "launch.local_address=127.0.0.1",
    ]
