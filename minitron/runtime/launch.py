"""Start the ranks of a job with torch's elastic launcher: all on this machine, or this host's share of them."""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from minitron.config.launch import LaunchConfig
from minitron.errors import PlatformError
from minitron.log import complain
from minitron.runtime.env import place_environment, set_rank_environment

WORKER_MODULE = "minitron.cli.worker"

_POLL_S = 0.2
_HERE = "localhost"
"""Where the ranks of one host meet: its own name, torch's choice, leads nowhere in many a container."""


def launch_ranks(arguments: list[str], launch: LaunchConfig, *, nodes: int, ranks_per_node: int, name: str) -> int:
    """Run the worker on every rank of this host and wait.

    Args:
        arguments: What every rank's worker gets (see `minitron.cli.worker.main`).
        launch: Where hosts meet, and how often lost ranks are started again.
        nodes: Hosts; the same command runs on each.
        ranks_per_node: Processes to start here.
        name: Name of the job, the same on every host.

    Returns:
        0, or the exit code of the rank that failed first (its message is already printed).

    Raises:
        PlatformError: The other hosts did not come, or the first cannot be reached.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints tracebacks of its own
    set_rank_environment(ranks_per_node, num_hosts=nodes)
    several = nodes > 1
    if several:
        _wait_for_first_host(launch, nodes)
    meeting = {"join_timeout": launch.join_timeout_s} if several else {}
    if several and launch.is_host is not None:
        meeting["is_host"] = launch.is_host
    config = ElasticConfig(
        min_nodes=nodes,  # the layout is for all of them
        max_nodes=nodes,
        nproc_per_node=ranks_per_node,
        run_id=name if several else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rendezvous if several else f"{_HERE}:0",
        rdzv_configs=meeting,
        local_addr=launch.local_address if several else _HERE,
        max_restarts=launch.max_restarts,
        monitor_interval=0.2,
    )
    command = ["-m", WORKER_MODULE, *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = failures[0].exitcode
        if code < 0:
            complain(f"error: rank {failures[0].local_rank} was killed by signal {-code}")
        return code if code > 0 else 128 - code
    except RendezvousError as error:
        why = str(error) or type(error).__name__
        raise _did_not_meet(launch, nodes, why) from error
    except SignalException as error:
        complain("stopped; what is done is kept, the same command goes on from there")
        return 128 + int(error.sigval)
    return 0


def _wait_for_first_host(launch: LaunchConfig, nodes: int) -> None:
    """Wait on the other hosts until the first one listens: torch's own attempts take minutes, whatever its timeouts.

    Raises:
        PlatformError: Nobody did within ``launch.join_timeout_s``.
    """
    host, _, port = launch.rendezvous.rpartition(":")
    host = host.strip("[]")
    if _matches_machine_hostname(host) if launch.is_host is None else launch.is_host:
        return
    deadline = time.monotonic() + launch.join_timeout_s
    while True:
        left_s = deadline - time.monotonic()
        try:
            socket.create_connection((host, int(port)), timeout=max(left_s, _POLL_S)).close()
            return
        except OSError as error:
            if left_s <= 0:
                why = f"{error.strerror or error}, tried for {launch.join_timeout_s} s"
                raise _did_not_meet(launch, nodes, why) from error
        time.sleep(_POLL_S)


def _did_not_meet(launch: LaunchConfig, nodes: int, why: str) -> PlatformError:
    return PlatformError(
        f"the {nodes} hosts did not meet at launch.rendezvous={launch.rendezvous} ({why}); "
        "start the same command on each, the first one included; launch.join_timeout_s is how long they wait"
    )


def launch_side_by_side(
    jobs: Sequence[list[str]], *, num_ranks: int, num_places: int, logs: Path, uses_cuda: bool
) -> int:
    """Run several workers at once, each on ranks and devices of its own, and wait for all.

    What they print goes to ``<logs>/worker_<n>.log``, their errors to standard error. When one fails the others are
    stopped: what they have done is kept.

    Args:
        jobs: Arguments of each job (see `minitron.cli.worker.main`).
        num_ranks: Processes of each job.
        num_places: Jobs that the machine is divided for.
        logs: Folder of the logs.
        uses_cuda: Whether each job needs GPUs of its own.

    Returns:
        0, or the exit code of the first job that failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        running = []
        for place, arguments in enumerate(jobs):
            log = stack.enter_context((logs / f"worker_{place}.log").open("a", encoding="utf-8"))
            command = [sys.executable, "-m", __name__, str(num_ranks), *arguments]
            environ = place_environment(place, num_places, num_ranks, uses_cuda=uses_cuda)
            running.append(subprocess.Popen(command, stdout=log, env=environ))
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            return _wait_for_all(running)
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in running:
                if process.poll() is None:
                    process.terminate()
            for process in running:
                process.wait()


def _leave(number: int, _frame: object) -> None:
    """Let a request to end run the clean-up: the jobs must not outlive this process."""
    raise SystemExit(128 + number)


def _wait_for_all(running: Sequence["subprocess.Popen[bytes]"]) -> int:
    while True:
        codes = [process.poll() for process in running]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(launch_ranks(sys.argv[2:], LaunchConfig(), nodes=1, ranks_per_node=int(sys.argv[1]), name="worker"))
