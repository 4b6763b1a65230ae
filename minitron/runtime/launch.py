"""Start the ranks of a job on this machine with torch's elastic launcher, or find out that one started us."""

import contextlib
import logging
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from minitron.log import complain
from minitron.runtime.env import place_environment, set_rank_environment

WORKER_MODULE = "minitron.cli.worker"

_POLL_S = 0.2


def launch_local(arguments: list[str], *, num_ranks: int) -> int:
    """Run the worker on every rank and wait.

    Args:
        arguments: What every rank's worker gets (see `minitron.cli.worker.main`).
        num_ranks: Processes to start.

    Returns:
        0, or the exit code of the rank that failed first (its message is already printed).
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints tracebacks of its own
    set_rank_environment(num_ranks)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
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
    except SignalException as error:
        complain("stopped; what is done is kept, the same command goes on from there")
        return 128 + int(error.sigval)
    return 0


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
    sys.exit(launch_local(sys.argv[2:], num_ranks=int(sys.argv[1])))
