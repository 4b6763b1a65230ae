"""A model in pieces of bounded size, for whoever writes a checkpoint without holding the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from minitron.checkpoint.store import CheckpointWriter
from minitron.checkpoint.stream import CHUNK_BYTES
from minitron.config.model import ModelConfig
from minitron.models.axes import Dim, ParamAxes, global_shape, layer_shape
from minitron.models.hf_names import blocks


@dataclass(frozen=True)
class Piece:
    """A parameter of one layer (and expert), or rows of an embedding.

    Attributes:
        param: The parameter.
        index: Its place in the dimensions that it is stacked over: layer, or layer and expert.
        shape: Shape of the piece, without those dimensions.
        first_row: Where its rows begin.
    """

    param: ParamAxes
    index: tuple[int, ...]
    shape: tuple[int, ...]
    first_row: int = 0

    def write(self, writer: CheckpointWriter, tensor: Tensor, model: ModelConfig) -> None:
        """Put the piece where it belongs in the canonical model.

        Args:
            writer: The checkpoint.
            tensor: Its values, of this shape.
            model: The architecture.
        """
        offsets = [*self.index, self.first_row, *[0] * (tensor.dim() - 1)]
        tensor = tensor.reshape(*[1] * len(self.index), *tensor.shape)
        writer.write(self.param.key, tensor, global_shape=global_shape(self.param, model), offsets=offsets)


def pieces(model: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[Piece, int]]:
    """Every piece of a model with its size in bytes, in the order of its layers."""
    for param, index in blocks(model):
        num_rows, *rest = layer_shape(param, model)
        row = prod(rest) * dtype.itemsize
        step = max(1, CHUNK_BYTES // row) if param.dims[0] is Dim.vocab else num_rows
        for first in range(0, num_rows, step):
            shape = (min(step, num_rows - first), *rest)
            yield Piece(param, index, shape, first), shape[0] * row
