"""Random weights for training from scratch, the same at every layout.

Megatron draws a rank's weights from that rank's random state: another number of pipeline stages is then another model.
Here each piece of the canonical model has a generator of its own, and the model is loaded like any other.
"""

import hashlib
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron.checkpoint.folder import WEIGHTS_DIR, write_model_config
from minitron.checkpoint.store import CheckpointWriter
from minitron.checkpoint.stream import deal
from minitron.config.model import ModelConfig
from minitron.models.axes import block_of
from minitron.models.pieces import Piece, pieces

_INTO_THE_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def write_random_weights(
    model: ModelConfig, out: Path, *, seed: int, rank: int = 0, world_size: int = 1, group: ProcessGroup | None = None
) -> None:
    """Write a checkpoint folder of random weights, in fp32: ``model.json`` and ``weights/``.

    They are distributed as Megatron-Core's: normal with the model's ``init_method_std``, over sqrt(2 * layers) where a
    layer adds to the residual stream (as in GPT-2); norms are the identity, biases zero.

    Args:
        model: The architecture.
        out: Folder to make.
        seed: Decides the values, with each piece's place in the model.
        rank: This rank.
        world_size: Number of ranks that share the work.
        group: Their process group; None is the default one.

    Raises:
        ArtefactError: ``out`` cannot be written, or holds a checkpoint already.
    """
    writer = CheckpointWriter(out / WEIGHTS_DIR, rank=rank, world_size=world_size)
    if rank == 0:
        write_model_config(out, model)
    for piece in deal(pieces(model, torch.float32), rank=rank, world_size=world_size):
        piece.write(writer, _draw(piece, model, seed), model)
    writer.finish(group)


def _draw(piece: Piece, model: ModelConfig, seed: int) -> Tensor:
    key = piece.param.key
    if key.endswith("bias"):
        return torch.zeros(piece.shape)
    if len(piece.shape) == 1:
        return torch.full(piece.shape, 0.0 if block_of(model).layernorm_zero_centered_gamma else 1.0)
    place = f"{seed} {key} {piece.index} {piece.first_row}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:8]) >> 1)
    std = model.init_method_std / (sqrt(2 * model.num_layers) if key.endswith(_INTO_THE_RESIDUAL) else 1)
    return torch.randn(piece.shape, generator=generator).mul_(std)
