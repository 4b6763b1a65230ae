"""The linear layer that brings the student's hidden states to the teacher's width: trained, then thrown away."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from minitron.checkpoint.model_io import TRAINING_ONLY
from minitron.config.model import ModelConfig
from minitron.parallel.groups import Groups


class Projection(nn.Module):
    """One matrix from the student's width to the teacher's, shared by all pairs (arXiv 2407.14679, section 3).

    Every rank of the student holds it with the same values, as a part of the model, so that Megatron's wrapper and
    optimizer train it like a parameter of the model. Megatron sums its gradient over the pipeline stages
    (``has_cond_embedder``: its name for parameters that are on every stage), over the tensor-parallel ranks where each
    of these sees a part of the sequence, and counts it once in the gradient norm.

    Args:
        student: Architecture of the student.
        teacher: Architecture of the teacher.
        groups: This rank's process groups.
        seed: Seed of the initial weights, drawn like the student's.
        dtype: Number format of the student's parameters.
        sequence_parallel: Whether hidden states are split along the sequence.
    """

    def __init__(
        self,
        student: ModelConfig,
        teacher: ModelConfig,
        groups: Groups,
        *,
        seed: int,
        dtype: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = teacher.hidden_size, student.hidden_size
        weight = torch.randn(shape, generator=generator) * student.init_method_std
        parameter: Any = nn.Parameter(weight.to(dtype))
        parameter.pipeline_parallel = True
        parameter.sequence_parallel = sequence_parallel
        parameter.shared = not groups.is_first_stage
        # A bucket of its own: the data-parallel ranks of all stages then own the same parts of its gradient.
        parameter.shared_embedding = True
        self.weight: nn.Parameter = parameter
        self._groups = groups

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Bring hidden states to the teacher's width, in fp32 at least."""
        dtype = torch.promote_types(hidden_SBH.dtype, torch.float32)
        projected: Tensor = hidden_SBH.to(dtype) @ self.weight.t().to(dtype)
        return projected

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, ShardedTensor]:
        """For Megatron's checkpoints: one tensor that every rank holds."""
        key, groups = f"{prefix}weight", self._groups
        replica = (groups.pp_rank, groups.tp_rank, groups.dp_rank)
        return {key: ShardedTensor.from_rank_offsets(key, self.weight, replica_id=replica)}


def attach(projection: Projection, gpt: GPTModel) -> None:
    """Make a projection part of a model, before it is wrapped for training."""
    gpt.add_module(TRAINING_ONLY, projection)
    gpt.config.has_cond_embedder = True
