"""What the ranks of the plan's tests run. Imports no transformers: workers import this file."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch.utils.flop_counter import FlopCounterMode

from minitron.compat.cpu import CPU_LAYER
from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.models.gpt import build_gpt, forward_to_final_state
from minitron.parallel.groups import model_parallel
from minitron.train.optim import make_trainable
from tests.helpers.batch import batch_of


@dataclass(frozen=True)
class Held:
    """Bytes that this rank holds, and its place."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int


def held(model: ModelConfig, parallel: ParallelConfig, dtype: Dtype) -> Held:
    """Build a model for training, take one step, and add up its storages."""
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        gpt = build_gpt(model, parallel, PrecisionConfig(dtype=dtype), groups, device=Device.cpu, initialize=True)
        trainable = make_trainable(gpt, TrainConfig(), parallel, groups, seq_length=8)
        for parameter in gpt.parameters():
            parameter.main_grad.fill_(1e-3)  # type: ignore[attr-defined]
        trainable.optimizer.step()
        buffers = [buffer for ddp in trainable.ddp for buffer in ddp.buffers]
        return Held(
            stage=groups.pp_rank,
            parameters=_bytes(list(gpt.parameters())),
            gradients=_bytes([buffer.grad_data for buffer in buffers]),
            optimizer=_optimizer_bytes(trainable.optimizer, list(gpt.parameters())),
        )


def counted_flops(model: ModelConfig, *, seq_length: int) -> int:
    """FLOPs that torch counts in one sequence's forward pass, output layer left out."""
    parallel = ParallelConfig()
    with CPU_LAYER.in_force(), model_parallel(parallel, seed=1) as groups:
        gpt = build_gpt(model, parallel, PrecisionConfig(), groups, device=Device.cpu, initialize=True)
        batch = batch_of(torch.arange(seq_length + 1)[None] % model.vocab_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward_to_final_state(gpt[0], batch)
        return int(counter.get_total_flops())


def _optimizer_bytes(optimizer: object, parameters: list[torch.Tensor]) -> int:
    """Everything the optimizers hold that is not the model's own memory."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    tensors: list[torch.Tensor] = []
    for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        inner = one.optimizer  # type: ignore[attr-defined]
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return _bytes([t for t in tensors if t.dim() and t.untyped_storage().data_ptr() not in ours])


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
