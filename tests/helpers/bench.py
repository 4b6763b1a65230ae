"""What the benchmarks share: paired timings, peak memory, and ranks that may start processes of their own."""

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Case = Callable[[], Any]


@dataclass(frozen=True)
class Ratio:
    """Ratio of two timings that were taken in turn, pair by pair.

    Attributes:
        median: Median over the pairs.
        low, high: Quartiles over the pairs: the spread that a busy machine gives.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def in_turn(
    cases: Mapping[str, Case], repeats: int, before: Mapping[str, Case] = MappingProxyType({})
) -> dict[str, list[float]]:
    """Seconds of each case, ``repeats`` times; every round runs all of them, forwards and backwards by turns.

    ``before`` has what some of them need first, which is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats):
        for name in reversed(list(cases)) if number % 2 else cases:
            if name in before:
                before[name]()
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(case: Case) -> tuple[int, Any]:
    """Most memory that PyTorch's CPU allocator gave out during the call beyond what it held before, and the result.

    It is the running sum of the profiler's allocation events, so temporaries inside kernels count. Only what the
    matrix libraries keep for themselves does not.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints each start and stop
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = case()
    assert trace.profiler is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def run_ranks[T](fn: Callable[..., T], world_size: int, threads: int, /, *args: Any) -> list[T]:
    """Call a module-level function on every rank of a new gloo group, with the CPU layer in force.

    The ranks are processes of their own that may start others, as Megatron's checkpoint writer does; the test pool's
    may not.

    Args:
        fn: the function.
        world_size: number of ranks.
        threads: torch's threads in each.
        *args: picklable arguments.

    Returns:
        The function's result on each rank.

    Raises:
        RuntimeError: with the traceback of a rank that failed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.Queue()
        processes = [
            context.Process(target=_rank, args=(answers, fn, rank, world_size, threads, f"file://{folder}/store", args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        try:
            while len(results) < world_size:
                rank, ok, result = answers.get()
                if not ok:
                    raise RuntimeError(f"rank {rank}:\n{result}")
                results[rank] = result
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(
    answers: Any,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    threads: int,
    store: str,
    args: tuple[Any, ...],
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        import torch

        from minitron.compat.cpu import CPU_LAYER

        torch.set_num_threads(threads)
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        CPU_LAYER.apply()
        answers.put((rank, True, fn(*args)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
