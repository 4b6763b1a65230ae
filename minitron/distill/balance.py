"""The weight of a loss beside the logit loss, and the messages between stages that a dynamic one needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.parallel.groups import Groups


def factor_to_size(loss: Tensor, of: Tensor) -> Tensor:
    """What brings a loss to the size of another, whatever the other's sign: |of| / loss.

    Args:
        loss: A detached scalar of at least 0. At 0 (a batch without tokens, a student that equals its teacher) there
            is nothing to bring anywhere, and the factor is 0.
        of: The detached scalar whose size is wanted.
    """
    return torch.where(loss > 0, of.abs() / loss, 0.0).to(loss.dtype)


@dataclass(frozen=True)
class Channels:
    """Numbers between the last pipeline stage and those before it, on groups of their own.

    A micro-batch's intermediate losses go to the last stage right after the stage's forward pass, so they are on
    their way before its hidden state is. The weight comes back before the gradient of the last stage's input does. So
    whoever waits, waits for a message that was sent before the one that let it get there: 1F1B cannot hang. Messages
    of one kind keep the order of the micro-batches.

    Attributes:
        up: Towards the last stage.
        down: From the last stage.
        sources: Stages before the last that have intermediate losses.
        groups: This rank's process groups.
    """

    up: ProcessGroup
    down: ProcessGroup
    sources: tuple[int, ...]
    groups: Groups

    def send_up(self, value: Tensor) -> dist.Work | None:
        """Send to the last stage, without waiting."""
        return dist.isend(value, group=self.up, group_dst=self._last)

    def receive_up(self, like: Tensor) -> list[Tensor]:
        """One number of each source, on the last stage."""
        values = [torch.empty_like(like) for _ in self.sources]
        for stage, value in zip(self.sources, values, strict=True):
            _wait(dist.irecv(value, group=self.up, group_src=stage))
        return values

    def send_down(self, value: Tensor) -> list[dist.Work | None]:
        """Send to every source, without waiting; on the last stage."""
        return [dist.isend(value, group=self.down, group_dst=stage) for stage in self.sources]

    def receive_down(self, like: Tensor) -> Tensor:
        """The next number of the last stage."""
        value = torch.empty_like(like)
        _wait(dist.irecv(value, group=self.down, group_src=self._last))
        return value

    @property
    def _last(self) -> int:
        return self.groups.pp.size() - 1


@contextmanager
def open_channels(groups: Groups, sources: tuple[int, ...], device: torch.device) -> Iterator[Channels | None]:
    """Make the groups and send a first message over each; all ranks enter together.

    NCCL connects two ranks when they first send, and both wait for that: in the middle of a schedule they would wait
    for ever.
    """
    if not sources:
        yield None
        return
    up, down = groups.new_pipeline_group(), groups.new_pipeline_group()
    channels = Channels(up, down, sources, groups)
    zero = torch.zeros((), device=device)
    if groups.is_last_stage:
        channels.receive_up(zero)
        for work in channels.send_down(zero):
            _wait(work)
    elif groups.pp_rank in sources:
        _wait(channels.send_up(zero))
        channels.receive_down(zero)
    yield channels
    for group in (up, down):  # not after an error: the other ranks might not come to destroy theirs
        dist.destroy_process_group(group)


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this rank is in the group"
    work.wait()
