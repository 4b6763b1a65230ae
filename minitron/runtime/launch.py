"""Start the ranks of a job on this machine with torch's elastic launcher, or find out that one started us."""

import logging
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from minitron.log import complain
from minitron.runtime.env import set_rank_environment

WORKER_MODULE = "minitron.cli.worker"


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
