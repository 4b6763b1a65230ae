"""What the ranks of the multi-process tests run."""

from pathlib import Path

import torch.distributed as dist

from minitron.models.hf_import import import_model


def import_by_all(source: Path, out: Path) -> None:
    import_model(source, out, rank=dist.get_rank(), world_size=dist.get_world_size(), group=dist.group.WORLD)
