"""One voice for many ranks: who prints an error that several of them meet, and how a rank ends after one."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from minitron.errors import MinitronError, StoppedError
from minitron.log import complain
from minitron.runtime.env import DistEnv

_BEHIND_RANK_0_S = 20.0
"""Ranks start this far apart at worst, on a busy machine."""
_BEHIND_A_PEER_S = 2.0
"""The launcher needs less to see that a rank has ended, and to stop the others."""


@contextmanager
def in_turn(env: DistEnv | None) -> Iterator[None]:
    """Hold this rank's error back while another may have the one to print: the launcher then stops this rank.

    torchrun does, and srun with ``--kill-on-bad-exit``.

    Rank 0 speaks first, so an error that all ranks meet is printed once. An error that is no user's waits on rank 0
    too: most often it is a broken connection to a rank that has just said what is wrong. To be used inside the
    process group: leaving that is what breaks the others' connections.

    Args:
        env: This process's rank; None when it is alone.
    """
    try:
        yield
    except StoppedError:  # all ranks stop at once, and none in error
        raise
    except Exception as error:
        if env is not None and env.world_size > 1:
            if env.rank != 0:
                time.sleep(_BEHIND_RANK_0_S)
            elif not isinstance(error, MinitronError):
                time.sleep(_BEHIND_A_PEER_S)
        raise


def report_error(error: MinitronError, env: DistEnv | None) -> None:
    """Print a user's error in one line; that the job was stopped, rank 0 says for all."""
    if isinstance(error, StoppedError):
        if env is None or env.rank == 0:
            complain(str(error))
        return
    where = f" (rank {env.rank})" if env is not None and env.rank else ""
    complain(f"error{where}: {error}")


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run an entry point, and end this process with its exit code.

    Where an error has left the groups of several GPUs standing (`minitron.runtime.device.process_group`), it ends at
    once: Python's own way out takes them down, which waits for the other ranks, while the launcher waits for this one.

    Args:
        main: Returns the exit code.
    """
    try:
        code = main()
    except Exception:
        if not _group_stands():
            raise
        traceback.print_exc()
        code = 1
    if _group_stands():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _group_stands() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported for the sake of the question
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
