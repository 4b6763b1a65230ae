"""How fast each rank computes and each pair of ranks talks, measured on the default process group."""

import socket
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

_REPEATS = 3
_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Reduction:
    """An all-reduce over all ranks, as one of them saw it.

    Attributes:
        gbs: Bus bandwidth, 10^9 bytes a second.
        is_right: Whether it left the sum it should.
    """

    gbs: float
    is_right: bool


@dataclass(frozen=True)
class Figures:
    """What one rank measured.

    Attributes:
        rank: Its number.
        host: Name of its machine.
        reductions: By backend, ``nccl`` and ``gloo`` on a GPU and ``gloo`` on a CPU; empty when alone.
        links_gbs: Bandwidth to each neighbour, in one direction while both send.
        tflops: Matrix products, 10^12 FLOPs a second.
    """

    rank: int
    host: str
    reductions: Mapping[str, Reduction]
    links_gbs: Mapping[int, float]
    tflops: float


def measure(device: torch.device, *, num_bytes: int) -> Figures:
    """Measure; all ranks call it together.

    Args:
        device: This rank's. On a GPU NCCL carries the tensors; the signals and whatever else is on the CPU go over
            gloo, which may take another network.
        num_bytes: Size of the messages.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    tflops = _tflops(device)
    carried_by = {"nccl": device} if device.type == "cuda" else {}
    carried_by["gloo"] = torch.device("cpu")
    reductions = {name: _all_reduce(at, num_bytes) for name, at in carried_by.items()} if size > 1 else {}
    links: dict[int, float] = {}
    for neighbour in (neighbour_of(rank, size, turn) for turn in (0, 1)):
        dist.barrier()  # pairs talk at the same time, but no rank to two others
        if neighbour is not None and neighbour not in links:
            links[neighbour] = _exchange(device, num_bytes, neighbour)
    return Figures(rank, socket.gethostname(), reductions, links, tflops)


def neighbour_of(rank: int, size: int, turn: int) -> int | None:
    """Whom a rank talks to: in turn 0 the pairs are (0, 1), (2, 3), ..., in turn 1 (1, 2), (3, 4), ..., (last, 0).

    Args:
        rank: The rank.
        size: Number of ranks; with an odd number one rank has nobody in a turn.
        turn: 0 or 1.
    """
    other = rank + 1 if rank % 2 == turn else rank - 1
    if size % 2 == 0:
        other %= size
    return other if 0 <= other < size and other != rank else None


def outliers(figures: Mapping[str, float], share: float) -> list[str]:
    """Names and values of the figures that are less than a part of the median, the smallest first.

    Args:
        figures: By name.
        share: The part.
    """
    if len(figures) < 2:
        return []
    limit = share * statistics.median(figures.values())
    slow = sorted((value, name) for name, value in figures.items() if value < limit)
    return [f"{name}: {value:.3g}" for value, name in slow]


def clock_offsets() -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, known on rank 0; elsewhere empty.

    A rank answers with its time; half of the round trip counts as the way there. The shortest of a few round trips
    is taken. All ranks call it together.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    message = torch.zeros(1, dtype=torch.float64)
    if rank != 0:
        for _ in range(_CLOCK_ROUNDS):
            dist.recv(message, 0)
            message[0] = time.time()
            dist.send(message, 0)
        return []
    offsets = [0.0]
    for other in range(1, size):
        trips = []
        for _ in range(_CLOCK_ROUNDS):
            start = time.time()
            dist.send(message, other)
            dist.recv(message, other)
            end = time.time()
            trips.append((end - start, message.item() - (start + end) / 2))
        offsets.append(min(trips)[1])
    return offsets


def _all_reduce(device: torch.device, num_bytes: int) -> Reduction:
    size = dist.get_world_size()
    values = torch.full((max(1, num_bytes // 4),), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(values)
    expected = size * (size + 1) / 2
    is_right = bool((values == expected).all())
    seconds = _best(device, lambda: dist.all_reduce(values.zero_()))
    return Reduction(2 * (size - 1) / size * num_bytes / seconds / 1e9, is_right)


def _exchange(device: torch.device, num_bytes: int, neighbour: int) -> float:
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def both_ways() -> None:
        operations = [dist.P2POp(dist.isend, sent, neighbour), dist.P2POp(dist.irecv, received, neighbour)]
        for transfer in dist.batch_isend_irecv(operations):
            transfer.wait()

    both_ways()
    return num_bytes / _best(device, both_ways) / 1e9


def _tflops(device: torch.device) -> float:
    on_cpu = device.type == "cpu"
    side, dtype = (256, torch.float32) if on_cpu else (8192, torch.bfloat16)
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = torch.ones_like(left)
    out = left @ right
    return 2 * side**3 / _best(device, lambda: torch.mm(left, right, out=out)) / 1e12


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few times."""
    times = []
    for _ in range(_REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
