"""A pool of worker processes that stay alive between the multi-process tests of a session.

Starting a worker costs seconds of imports, so workers are started when first needed and kept. Each
call gets a fresh gloo process group. A call that hangs is cut by its timeout; workers that hung or
died are replaced.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any
from unittest import mock

MAX_WORKERS = 4
_START_TIMEOUT_S = 240.0
_DIED = "the process died"


class PoolError(Exception):
    """A call failed on at least one rank; the message holds every failing rank's traceback."""


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class WorkerPool:
    """Runs a function on several ranks; use the `pool` fixture."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run[T](
        self, fn: Callable[..., T], world_size: int, /, *args: Any, timeout_s: float = 120.0, **kwargs: Any
    ) -> list[T]:
        """Call ``fn(*args, **kwargs)`` on every rank of a new gloo process group.

        Model parallelism that the function initialised is destroyed afterwards.

        Args:
            fn: a module-level function (it is pickled by name).
            world_size: number of ranks, at most `MAX_WORKERS`.
            *args: picklable arguments, equal on all ranks.
            timeout_s: after this many seconds the workers are killed; starting them does not count.
            **kwargs: picklable keyword arguments, equal on all ranks.

        Returns:
            The function's result on each rank.

        Raises:
            PoolError: the function raised on some rank, or did not return in time.
        """
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size {world_size} is not between 1 and {MAX_WORKERS}")
        self._start(world_size)
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(self._workers[:world_size]):
                call = (fn, rank, world_size, f"file://{folder}/store", timeout_s, args, kwargs)
                worker.connection.send_bytes(pickle.dumps(call))
            answers = self._receive(world_size, timeout_s)
        errors = [f"--- rank {rank} of {world_size}:\n{text}" for rank, (ok, text) in answers.items() if not ok]
        if errors:
            raise PoolError("\n".join([f"{fn.__module__}.{fn.__qualname__} failed", *errors]))
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """Kill every worker."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _start(self, num_workers: int) -> None:
        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        while len(self._workers) < num_workers:
            self._workers.append(_Worker())
        for worker in self._workers[:num_workers]:
            if not worker.ready:
                if not worker.connection.poll(_START_TIMEOUT_S):
                    raise PoolError(f"a worker did not start within {_START_TIMEOUT_S} s")
                worker.connection.recv_bytes()
                worker.ready = True

    def _receive(self, world_size: int, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank; a rank that gives none gets one that says so, and its worker is killed."""
        ranks: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while ranks and (ready := wait(list(ranks), max(0.0, deadline - time.monotonic()))):
            connection: Any
            for connection in ready:
                rank = ranks.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answers[rank] = (False, _DIED)
                if not answers[rank][0]:  # its peers may wait for it for ever: grant them a few seconds
                    deadline = min(deadline, time.monotonic() + 5)
        late = f"no answer, killed: {timeout_s} s have passed, or 5 s since another rank failed"
        answers |= dict.fromkeys(ranks.values(), (False, late))
        for rank, worker in enumerate(self._workers[:world_size]):
            if answers[rank] in ((False, late), (False, _DIED)):
                worker.stop()
        return dict(sorted(answers.items()))


def _serve(connection: Connection) -> None:
    """A worker's life: import once, then answer calls until the test session goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test session's to handle
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # No rank leaves the set-up of a group before all are connected: a function that returns at once would
    # close its connections under a slower peer, whose failed set-up leaves torch's group counter one ahead.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    import megatron.core  # noqa: F401
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: `_call` collects what came after it
    connection.send_bytes(b"ready")
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, _call(*pickle.loads(call))))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _call(
    fn: Callable[..., Any], rank: int, world_size: int, url: str, timeout_s: float, args: Any, kwargs: Any
) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size, timeout=timeout)
    try:
        return fn(*args, **kwargs)
    finally:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # A gloo group ends with its last reference, and until then its threads take time from the calls to come: models
        # hold theirs in cycles, and Megatron remembers the arguments of the last 32 rotary tables.
        RotaryEmbedding.forward.cache_clear()
        gc.collect()


@contextlib.contextmanager
def pool_with(world_size: int, **variables: str) -> Iterator[WorkerPool]:
    """A pool of its own, whose workers have environment variables that must be there before anything is imported."""
    workers = WorkerPool()
    try:
        with mock.patch.dict(os.environ, variables):
            workers.run(os.getpid, world_size)  # starts them
        yield workers
    finally:
        workers.close()
