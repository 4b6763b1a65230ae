"""What every stage gets: the configuration, this rank's place, and where to write."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from rich.console import Console

from minitron.config.run import Device, RunConfig
from minitron.parallel.groups import Groups
from minitron.runtime.artefact import RunFolder
from minitron.runtime.progress import StageProgress


@dataclass(frozen=True)
class Session:
    """One process of a running job.

    Attributes:
        config: The resolved configuration.
        run: The run's folder.
        groups: This rank's process groups.
        device: ``cpu`` or ``cuda``, never ``auto``.
        console: Where rank 0 writes.
        digests: Identities of what the running stage reads and mentions, by name, as they were planned.
    """

    config: RunConfig
    run: RunFolder
    groups: Groups
    device: Device
    console: Console
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.groups.world_rank == 0

    @property
    def torch_device(self) -> torch.device:
        """Where tensors live."""
        if self.device is Device.cpu:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def context_as_data(self) -> Iterator[Self]:
        """The session with the context-parallel ranks as data-parallel ones, for a stage that needs whole sequences.

        All ranks enter the block together.
        """
        parallel = self.config.parallel
        size = parallel.data_parallel_size * parallel.context_parallel_size
        parallel = replace(parallel, context_parallel_size=1, data_parallel_size=size)
        with self.groups.context_as_data() as groups:
            yield replace(self, config=replace(self.config, parallel=parallel), groups=groups)

    def progress(self, stage: str) -> StageProgress:
        """The bar of a stage, silent on every rank but 0."""
        return StageProgress(stage, enabled=self.is_main, console=self.console)

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.is_main:
            self.console.print(text, highlight=False)
