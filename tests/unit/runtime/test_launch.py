"""Hosts that wait for the first one, before torch's elastic launcher starts."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitron.config.launch import LaunchConfig, LaunchKind
from minitron.errors import PlatformError
from minitron.runtime import launch as launching
from minitron.runtime.launch import launch_ranks


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine at which nobody listens: it is taken, so that nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that got as far as torch's launcher, which is not started."""
    names: list[str] = []

    def elastic_launch(config: object, _executable: str) -> object:
        names.append(config.run_id)  # type: ignore[attr-defined]
        return lambda *_words: None

    monkeypatch.setattr(launching, "elastic_launch", elastic_launch)
    monkeypatch.setattr(launching, "set_rank_environment", lambda *_args, **_kwargs: None)
    return names


def _launch(port: int, *, is_host: bool | None, host: str = "127.0.0.1", join_timeout_s: int = 1) -> int:
    launch = LaunchConfig(
        kind=LaunchKind.torchrun,
        nodes=2,
        rendezvous=f"{host}:{port}",
        is_host=is_host,
        join_timeout_s=join_timeout_s,
    )
    return launch_ranks([], launch, nodes=2, ranks_per_node=1, name="job")


def test_a_first_host_that_is_absent(closed_port: int, started: list[str]) -> None:
    with pytest.raises(PlatformError) as caught:
        _launch(closed_port, is_host=False)
    expected = (
        f"the 2 hosts did not meet at launch.rendezvous=127.0.0.1:{closed_port} (Connection refused, tried for 1 s); "
        "start the same command on each, the first one included; launch.join_timeout_s is how long they wait"
    )
    assert str(caught.value) == expected
    assert started == []


def test_a_first_host_whose_name_leads_nowhere(started: list[str]) -> None:
    with pytest.raises(PlatformError, match=re.escape("launch.rendezvous=host.invalid:1 (")) as caught:
        _launch(1, is_host=False, host="host.invalid")
    assert "\n" not in str(caught.value)
    assert started == []


def test_a_first_host_that_is_late(closed_port: int, started: list[str]) -> None:
    """The other one waits for it, and leaves its connection."""
    accepted = []

    def first_host() -> None:
        with socket.create_server(("127.0.0.2", closed_port)) as server:
            connection, _ = server.accept()
            with connection:
                accepted.append(connection.recv(1))

    late = threading.Timer(0.7, first_host)
    late.start()
    assert _launch(closed_port, is_host=False, host="127.0.0.2", join_timeout_s=60) == 0
    late.join()
    assert accepted == [b""]
    assert started == ["job"]


@pytest.mark.parametrize("is_host", [True, None])
def test_the_first_host_itself_waits_for_no_port(closed_port: int, started: list[str], is_host: bool | None) -> None:
    assert _launch(closed_port, is_host=is_host) == 0
    assert started == ["job"]


def test_ranks_of_one_host_do_not_ask_for_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In many a container it leads nowhere; ranks that look for it would wait for minutes."""
    monkeypatch.setattr(socket, "getfqdn", lambda *_: "host.invalid")
    monkeypatch.setattr(launching, "set_rank_environment", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(launching, "WORKER_MODULE", "timeit")  # runs a line of Python; so no model is built
    told = f"import os; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['MASTER_ADDR'])"
    launched = launch_ranks(["--number=1", "--repeat=1", told], LaunchConfig(), nodes=1, ranks_per_node=2, name="job")
    assert launched == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["localhost", "localhost"]
