"""What the ranks of the preflight's test run. Imports no transformers: workers import this file."""

from pathlib import Path

import torch
import torch.distributed as dist

from minitron.config.preflight import PreflightConfig
from minitron.runtime.preflight import Asked, Check, preflight


def run(folders: list[Path], settings: PreflightConfig, *, wait_s: float = 10.0) -> list[Check]:
    """Check as a rank that takes a folder of its own for the run's."""
    return preflight(folders[dist.get_rank()], torch.device("cpu"), settings, Asked(), shared_wait_s=wait_s)
