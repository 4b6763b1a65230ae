"""Memory of one rank while a model is trained, item by item. `docs/plan.md` has every formula."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from minitron.config.logit_loss import CUDA_BLOCK_BYTES, CUDA_CHUNK_BYTES, chunk_tokens
from minitron.config.model import ModelConfig
from minitron.config.parallel import (
    ParallelConfig,
    RecomputeGranularity,
    RecomputeMethod,
    layers_per_stage,
    padded_vocab_size,
)
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.models.axes import OUTPUT_LAYER_KEY, Dim, ParamAxes, global_shape, layer_shape, params_of

DTYPE_BYTES = {Dtype.fp32: 4, Dtype.bf16: 2}
_FP32 = 4
_SPLIT_OVER_TP = frozenset({Dim.ffn, Dim.gate_up, Dim.qkv, Dim.heads, Dim.vocab})
"""Dimensions that tensor parallelism divides; a parameter without any is whole on every rank."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage.

    Attributes:
        parameters: Weights of the trained model.
        gradients: Their fp32 sums, as many as the weights whatever the data-parallel size.
        optimizer: This rank's share of Adam's two moments, and of the fp32 weights where the model's are narrower.
        activations: What the forward passes in flight keep for their backward passes.
        teacher: Weights of the teacher.
        stash: What the teacher leaves for the micro-batches that wait.
        loss: Chunks of logits, work memory of the loss, and the gradients it makes in its forward pass.
        fp8_weights: FP8 copies of both models' linears, which Transformer Engine keeps beside the weights.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    teacher: float = 0.0
    stash: float = 0.0
    loss: float = 0.0
    fp8_weights: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum((float(getattr(self, field.name)) for field in fields(self)), 0.0)


@dataclass(frozen=True)
class Batches:
    """What one rank sees of a step.

    Attributes:
        tokens: Tokens of a micro-batch on this rank, over all of its tensor-parallel ranks.
        group: Micro-batches of one pipeline schedule: those whose teacher states are held at once.
    """

    tokens: int
    group: int


@dataclass(frozen=True)
class BesideTeacher:
    """A teacher as the trained model's ranks hold it.

    Attributes:
        model: Its architecture; None where it is read from a cache.
        parallel: Its layout.
        precision: Its number formats.
        is_own_layout: Whether the layout is not the student's; then its states arrive as whole sequences.
        state_bytes: Bytes that it leaves for one token on the ranks of the last stage: final state, or cached entries.
        inner_bytes: Bytes of intermediate states for one token on the ranks of each of the student's stages.
        with_cross_entropy: Whether cross-entropy is mixed in: a loss of its own, with gradients of its own.
    """

    model: ModelConfig | None
    parallel: ParallelConfig
    precision: PrecisionConfig
    is_own_layout: bool
    state_bytes: float
    inner_bytes: tuple[float, ...]
    with_cross_entropy: bool = False


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, *, vocab_rows: int | None = None) -> list[int]:
    """Parameters on each rank of every pipeline stage.

    Matrices are divided over TP, norms are not; the vocabulary is padded to a multiple of TP. The embedding is on the
    first stage; the final norm and the output layer, or a second copy of a tied embedding, are on the last.

    Args:
        model: The architecture.
        parallel: The layout.
        vocab_rows: Rows of embedding and output layer over all ranks, where another model decides.
    """
    tp = parallel.tensor_model_parallel_size
    rows = vocab_rows or padded_vocab_size(model.vocab_size, tp)
    stages = layers_per_stage(model.num_layers, parallel)
    params = params_of(model)
    layer = sum(_rank_numel(param, model, tp, rows) for param in params if param.stacked)
    totals = [num_layers * layer for num_layers in stages]
    for param in (param for param in params if not param.stacked):
        numel = _rank_numel(param, model, tp, rows)
        is_embedding = Dim.vocab in param.dims and param.key != OUTPUT_LAYER_KEY
        totals[0 if is_embedding else -1] += numel
        if is_embedding and model.share_embeddings_and_output_weights and len(stages) > 1:
            totals[-1] += numel
    return totals


def _rank_numel(param: ParamAxes, model: ModelConfig, tp: int, vocab_rows: int) -> int:
    """Elements on one rank, of one layer where the parameter is stacked over layers."""
    shape = global_shape(param, model)[1 if param.stacked else 0 :]
    numel = int(np.prod(shape))
    if Dim.vocab in param.dims:
        numel = numel // model.vocab_size * vocab_rows
    return numel // (tp if _SPLIT_OVER_TP & set(param.dims) else 1)


def training_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    batches: Batches,
    teacher: BesideTeacher | None = None,
) -> list[StageMemory]:
    """Memory of every pipeline stage while a model is trained.

    Args:
        model: The model that is trained.
        parallel: Its layout.
        precision: Its number formats.
        batches: What a rank sees of a step.
        teacher: The teacher beside it; None for cross-entropy training.
    """
    dtype, numels = precision.dtype, stage_parameters(model, parallel)
    fp8_weights = _fp8_weights(model, parallel, precision, is_trained=True)
    shards = parallel.data_parallel_size * parallel.context_parallel_size
    adam_bytes = 2 * _FP32 + (0 if dtype is Dtype.fp32 else _FP32)
    last = len(numels) - 1
    return [
        StageMemory(
            parameters=DTYPE_BYTES[dtype] * numel,
            gradients=_FP32 * numel,
            optimizer=adam_bytes * numel / shards,
            activations=_activations(model, parallel, dtype, batches, stage),
            teacher=_teacher_bytes(teacher, model, parallel, stage) if teacher else 0.0,
            stash=_stash_bytes(teacher, batches, stage, is_last=stage == last) if teacher else 0.0,
            loss=_loss_bytes(model, parallel, dtype, batches, teacher) if stage == last else 0.0,
            fp8_weights=fp8_weights[stage] + (_teacher_fp8_bytes(teacher, parallel, stage) if teacher else 0.0),
        )
        for stage, numel in enumerate(numels)
    ]


def _fp8_weights(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, is_trained: bool
) -> list[float]:
    """Bytes of the FP8 copies of the layers' linears on each rank of every pipeline stage.

    One for the forward pass and, where the model is trained, its transpose for the backward pass, a byte an element
    (scaling factors, at most a thirty-second of that, are left out). Transformer Engine makes them once a step.
    """
    stages = layers_per_stage(model.num_layers, parallel)
    if precision.fp8 is None:
        return [0.0] * len(stages)
    if precision.first_last_layers_bf16:
        stages[0] -= precision.num_layers_at_start_in_bf16
        stages[-1] -= precision.num_layers_at_end_in_bf16
    tp, copies = parallel.tensor_model_parallel_size, 2 if is_trained else 1
    linears = (p for p in params_of(model) if p.stacked and len(p.dims) > 1 and _SPLIT_OVER_TP & set(p.dims))
    layer = sum(_rank_numel(param, model, tp, model.vocab_size) for param in linears)
    return [float(copies * layer * max(0, layers)) for layers in stages]


def layer_elements(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Elements per token that a layer keeps for its backward pass, on one rank.

    Inputs of the two norms and of the linears after them: 4 hidden sizes, divided over TP with sequence parallelism
    only. Queries, keys, values and the attention's output (the attention itself is fused: it keeps no probabilities),
    the output of the MLP's first linear and the input of its second: divided over TP.
    """
    tp = parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    first = next(p for p in params_of(model) if p.key.endswith("linear_fc1.weight"))
    mlp = (layer_shape(first, model)[0] + model.ffn_hidden_size) * (model.moe_router_topk or 1)
    inner = 2 * (heads + groups) * model.kv_channels + mlp
    return 4 * model.hidden_size / sequence_parts(parallel) + inner / tp


def sequence_parts(parallel: ParallelConfig) -> int:
    """Ranks that hidden states outside the linears are split over."""
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


def in_flight(parallel: ParallelConfig, group: int, stage: int) -> int:
    """Forward passes of a stage's chunks whose backward pass is still to come, at most.

    1F1B: one for each stage from this one to the last. Interleaved: two for each stage after this one, a round of all
    stages for each chunk but one, and the one that runs.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    if chunks == 1:
        return min(stages - stage, group)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, group * chunks)


def _activations(model: ModelConfig, parallel: ParallelConfig, dtype: Dtype, batches: Batches, stage: int) -> float:
    layers = layers_per_stage(model.num_layers, parallel)[stage] / parallel.num_chunks
    passes = in_flight(parallel, batches.group, stage)
    hidden = model.hidden_size / sequence_parts(parallel)
    layer = layer_elements(model, parallel)
    kept, at_work = layers * layer, 0.0
    if parallel.recompute_granularity is RecomputeGranularity.full:
        number = parallel.recompute_num_layers or 1
        if parallel.recompute_method is RecomputeMethod.uniform:
            kept, at_work = -(-layers // number) * hidden, min(number, layers) * layer
        else:
            again = min(number, layers)
            kept, at_work = again * hidden + (layers - again) * layer, layer
    if stage == parallel.pipeline_model_parallel_size - 1:
        kept += 2 * hidden / parallel.num_chunks  # input and output of the final norm, in one of the chunks
    return batches.tokens * DTYPE_BYTES[dtype] * (passes * kept + at_work)


def _teacher_bytes(teacher: BesideTeacher, student: ModelConfig, parallel: ParallelConfig, stage: int) -> float:
    if teacher.model is None:
        return 0.0
    own, rows = teacher.parallel, padded_vocab_size(student.vocab_size, parallel.tensor_model_parallel_size)
    numels = stage_parameters(teacher.model, own, vocab_rows=None if teacher.is_own_layout else rows)
    output_rows = 0
    if teacher.is_own_layout:  # the student's last stage has its output layer, in the student's shards
        if own.pipeline_model_parallel_size > 1 or not teacher.model.share_embeddings_and_output_weights:
            tp = own.tensor_model_parallel_size
            numels[-1] -= padded_vocab_size(teacher.model.vocab_size, tp) // tp * teacher.model.hidden_size
        if stage == parallel.pipeline_model_parallel_size - 1:
            output_rows = rows // parallel.tensor_model_parallel_size
    held = _most_of_stage(numels, parallel, stage) + output_rows * teacher.model.hidden_size
    return DTYPE_BYTES[teacher.precision.dtype] * float(held)


def _teacher_fp8_bytes(teacher: BesideTeacher, parallel: ParallelConfig, stage: int) -> float:
    if teacher.model is None:
        return 0.0
    copies = _fp8_weights(teacher.model, teacher.parallel, teacher.precision, is_trained=False)
    return _most_of_stage(copies, parallel, stage)


def _most_of_stage(of_teacher: Sequence[float], parallel: ParallelConfig, stage: int) -> float:
    """Largest value of the teacher's stages on the ranks of one of the student's.

    Ranks are numbered stage by stage: a stage of the student lies on one or more of the teacher's.
    """
    stages, number = parallel.pipeline_model_parallel_size, len(of_teacher)
    return max(of_teacher[stage * number // stages : -(-(stage + 1) * number // stages)])


def _stash_bytes(teacher: BesideTeacher, batches: Batches, stage: int, *, is_last: bool) -> float:
    per_token = teacher.inner_bytes[stage] + (teacher.state_bytes if is_last else 0.0)
    return batches.group * batches.tokens * per_token


def _loss_bytes(
    model: ModelConfig, parallel: ParallelConfig, dtype: Dtype, batches: Batches, teacher: BesideTeacher | None
) -> float:
    """On a GPU: chunks of logits, fp32 blocks of them, gathered hidden states, and the gradients of both inputs."""
    tp, tokens, size = parallel.tensor_model_parallel_size, batches.tokens, DTYPE_BYTES[dtype]
    columns = padded_vocab_size(model.vocab_size, tp) // tp
    chunk = min(tokens, chunk_tokens(tokens, row_bytes=size * columns, budget_bytes=CUDA_CHUNK_BYTES))
    block = min(chunk, max(1, CUDA_BLOCK_BYTES // (_FP32 * columns)))
    is_dense = teacher is not None and teacher.model is not None
    casts = 0 if dtype is Dtype.fp32 else 1 + is_dense
    work = 2 if is_dense else int(teacher is None)  # softmaxes and differences; sparse targets need none
    logits = columns * (size * chunk * (1 + is_dense) + _FP32 * block * (casts + work))
    widths = 2 * model.hidden_size + (teacher.model.hidden_size if teacher and teacher.model else 0)
    # Over several chunks it is added up in fp32, and then cast.
    bytes_each = size if tokens <= chunk or dtype is Dtype.fp32 else _FP32 + size
    weight_gradient = columns * model.hidden_size * bytes_each
    gradients = weight_gradient + tokens * size * model.hidden_size
    again = gradients if teacher and teacher.with_cross_entropy else 0
    return float(logits + tokens * size * widths + weight_gradient + again)
