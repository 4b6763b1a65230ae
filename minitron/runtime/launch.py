"""Start the ranks of a job with torch's elastic launcher: all on this machine, or this host's share of them."""

import logging
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from minitron.config.launch import LaunchConfig
from minitron.errors import PlatformError
from minitron.log import complain
from minitron.runtime.env import set_rank_environment

WORKER_MODULE = "minitron.cli.worker"


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
    meeting = {"join_timeout": launch.join_timeout_s} if several else {}
    if several and launch.is_host is not None:
        meeting["is_host"] = launch.is_host
    config = ElasticConfig(
        min_nodes=nodes,  # the layout is for all of them
        max_nodes=nodes,
        nproc_per_node=ranks_per_node,
        run_id=name if several else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rendezvous if several else "localhost:0",
        rdzv_configs=meeting,
        local_addr=launch.local_address if several else None,
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
        raise PlatformError(
            f"the {nodes} hosts did not meet at launch.rendezvous={launch.rendezvous} ({why}); "
            "start the same command on each, the first one included; launch.join_timeout_s is how long they wait"
        ) from error
    except SignalException as error:
        complain("stopped; what is done is kept, the same command goes on from there")
        return 128 + int(error.sigval)
    return 0
