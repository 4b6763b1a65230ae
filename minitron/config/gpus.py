"""NVIDIA's GPUs by their data sheets: SXM modules and L40S, dense figures without sparsity."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Gpu(StrEnum):
    """GPUs with known figures."""

    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"
    l40s = "l40s"


@dataclass(frozen=True)
class GpuFigures:
    """What a GPU has, and reaches at best.

    Attributes:
        capability: CUDA compute capability.
        memory_bytes: Its memory.
        bandwidth: Bytes/s of it.
        tflops: 10^12 FLOP/s by number format: of the tensor cores, for fp32 of the others; a format that the GPU does
            not have is absent.
    """

    capability: tuple[int, int]
    memory_bytes: float
    bandwidth: float
    tflops: Mapping[str, float]


GPUS = {
    Gpu.a100: GpuFigures((8, 0), 80e9, 2039e9, {"fp32": 19.5, "bf16": 312.0}),
    Gpu.h100: GpuFigures((9, 0), 80e9, 3350e9, {"fp32": 67.0, "bf16": 989.0, "fp8": 1979.0}),
    Gpu.h200: GpuFigures((9, 0), 141e9, 4800e9, {"fp32": 67.0, "bf16": 989.0, "fp8": 1979.0}),
    Gpu.b200: GpuFigures((10, 0), 180e9, 8000e9, {"fp32": 75.0, "bf16": 2250.0, "fp8": 4500.0}),
    Gpu.l40s: GpuFigures((8, 9), 48e9, 864e9, {"fp32": 91.6, "bf16": 362.0, "fp8": 733.0}),
}
