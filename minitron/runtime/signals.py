"""The request to stop: a signal to any rank, on which all ranks agree before any of them acts.

SLURM sends SIGUSR1 some minutes before the time limit (``--signal``), to every process of the step. It is blocked,
not handled: a blocked signal waits until it is asked for, threads and children that start later inherit the block
(a tokenizer's worker or a tracker's service would die of it), and nothing is interrupted. SIGTERM keeps its default:
a rank that waits in native code for one that is gone never runs a Python handler, and its launcher would wait for it.
"""

import contextlib
import datetime
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from minitron.errors import StoppedError

if TYPE_CHECKING:  # the signal is blocked before torch is imported, which takes seconds
    import torch

STOP_SIGNAL = signal.SIGUSR1

_LONGEST_STEP = datetime.timedelta(hours=2)
"""A rank that asks waits this long at most for the others to have asked too."""

_EXCHANGE_EVERY_S = 5.0
"""Between two questions of a rank that works alone to those that wait for it."""


def hold_stop_signal() -> None:
    """Keep the signal for `stop_was_asked`, from here on; to be called before anything starts a thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP_SIGNAL})


def stop_was_asked() -> bool:
    """Whether this process was sent the signal. It stays asked."""
    return STOP_SIGNAL in signal.sigpending()


def any_rank_was_asked() -> bool:
    """Whether any rank was, known to all; for moments at which the ranks wait for each other anyway."""
    return _on_any_rank(stop_was_asked())[0]


def work_of_one[T](work: Callable[[Callable[[], bool]], T], *, is_main: bool) -> T | None:
    """Let rank 0 work while the others wait, for longer than a collective may take; called by all ranks.

    Args:
        work: What rank 0 does. It is given a question to ask again and again, at least once in the timeout of a
            collective: shall it stop? When any rank was asked to, it should save and raise the error.
        is_main: Whether this is rank 0.

    Returns:
        What the work returned, on rank 0.

    Raises:
        StoppedError: Rank 0's work did, on all ranks.
    """
    if not is_main:
        done = stopped = False
        while not done:
            _, done, stopped = _on_any_rank(stop_was_asked(), False, False)
        if stopped:
            raise StoppedError("stopped with rank 0")
        return None
    asked, next_exchange = False, 0.0

    def should_stop() -> bool:
        nonlocal asked, next_exchange
        asked = asked or stop_was_asked()
        if not asked and time.monotonic() >= next_exchange:
            asked, *_ = _on_any_rank(False, False, False)
            next_exchange = time.monotonic() + _EXCHANGE_EVERY_S
        return asked

    try:
        result = work(should_stop)
    except StoppedError:
        _on_any_rank(True, True, True)
        raise
    _on_any_rank(False, True, False)
    return result


def _on_any_rank(*here: bool) -> list[bool]:
    """Whether each of some things is so on any rank."""
    import torch

    found = torch.tensor([int(value) for value in here], dtype=torch.int32, device="cpu")
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in found.tolist()]


@contextlib.contextmanager
def stop_agreement() -> Iterator[Callable[[], bool]]:
    """A question for the end of every step, called by all ranks: shall all of us stop now?

    Neither the device nor the host waits for it: each call starts a reduction of one number between the hosts and
    takes the result of the call before, so the answer is a step late.
    """
    import torch

    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_STEP)
    running: list[tuple[torch.distributed.Work, torch.Tensor]] = []

    def agreed() -> bool:
        if running:
            work, asked = running.pop()
            work.wait()
            if asked.item():
                return True
        asked = _asked()
        work = torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        running.append((work, asked))
        return False

    yield agreed
    for work, _ in running:
        work.wait()
    torch.distributed.destroy_process_group(group)  # not after an error: other ranks might not come to it


def _asked() -> "torch.Tensor":
    import torch

    return torch.tensor(int(stop_was_asked()), dtype=torch.int32, device="cpu")
