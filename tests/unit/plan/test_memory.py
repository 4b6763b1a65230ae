"""Memory: parameters, gradients and optimizer against Megatron's own; the rest against cases worked by hand."""

from dataclasses import replace

import pytest

from minitron.config.logit_loss import CUDA_CHUNK_BYTES
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig, RecomputeGranularity, RecomputeMethod, layers_per_stage
from minitron.config.precision import Dtype, Fp8Format, Fp8Recipe, PrecisionConfig
from minitron.models.axes import num_parameters
from minitron.plan.flops import forward_flops
from minitron.plan.memory import (
    Batches,
    BesideTeacher,
    in_flight,
    layer_elements,
    stage_parameters,
    training_memory,
)
from tests.helpers.pool import WorkerPool
from tests.unit.plan import workers

# Every parameter has a multiple of 128 elements on every rank: Megatron's buffers need no padding.
MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=3,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=255,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)
TIED = replace(MODEL, vocab_size=256, share_embeddings_and_output_weights=True)

FP32, BF16 = (PrecisionConfig(dtype=dtype) for dtype in Dtype)


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **settings: object) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        **settings,  # type: ignore[arg-type]
    )


NEMOTRON = replace(MODEL, architecture=Architecture.nemotron, rotary_percent=0.5)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_parameters_of_all_ranks_are_the_models(model: ModelConfig) -> None:
    assert stage_parameters(model, layout()) == [num_parameters(model)]
    # Two stages: a tied embedding is there twice.
    copy = 256 * 128 if model is TIED else 0
    assert sum(stage_parameters(model, layout(pp=2))) == num_parameters(model) + copy
    # Two ranks share the matrices; norms (two a layer and the last) are on both; the vocabulary is padded to 256.
    norms, padding = 7 * 128, 0 if model is TIED else 2 * 128
    assert 2 * stage_parameters(model, layout(tp=2))[0] == num_parameters(model) + norms + padding


@pytest.mark.parametrize(
    ("model", "parallel", "dtype"),
    [
        (TIED, layout(pp=2), Dtype.bf16),
        (MODEL, layout(tp=2, sequence_parallel=True), Dtype.bf16),
        (MODEL, layout(dp=2), Dtype.bf16),
        (MODEL, layout(dp=2), Dtype.fp32),
        (TIED, layout(tp=2, pp=2), Dtype.fp32),
        (NEMOTRON, layout(tp=2), Dtype.fp32),
    ],
    ids=["tied pp2", "tp2 sp", "dp2", "dp2 fp32", "tied tp2 pp2 fp32", "nemotron tp2 fp32"],
)
def test_megatron_holds_what_is_planned(
    pool: WorkerPool, model: ModelConfig, parallel: ParallelConfig, dtype: Dtype
) -> None:
    planned = training_memory(model, parallel, PrecisionConfig(dtype=dtype), Batches(8, 1))
    layers = layers_per_stage(model.num_layers, parallel)
    for held in pool.run(workers.held, parallel.num_ranks, model, parallel, dtype):
        expected = planned[held.stage]
        # The norms that Megatron takes on a CPU stay fp32 in a bf16 model: 2 bytes more each, and no fp32 copy.
        norms = 128 * (2 * layers[held.stage] + (held.stage == len(layers) - 1)) if dtype is Dtype.bf16 else 0
        assert held.parameters == expected.parameters + 2 * norms
        assert held.gradients == expected.gradients
        assert held.optimizer == expected.optimizer - 4 * norms / parallel.data_parallel_size


@pytest.mark.parametrize("model", [MODEL, NEMOTRON], ids=["gated", "no gate"])
def test_torch_counts_the_flops(pool: WorkerPool, model: ModelConfig) -> None:
    length = 16
    [counted] = pool.run(workers.counted_flops, 1, model, seq_length=length)
    flops = forward_flops(model, length)
    # On a CPU the attention is not fused: it computes what the mask then hides.
    attention = flops.attention * length / ((length + 1) / 2)
    assert counted == length * (flops.linears + attention)


def test_activations_by_hand() -> None:
    # 4 x 128 of norms and their linears; q 256, k 64, v 64, output 256; gate and up 512, their product 256.
    assert layer_elements(MODEL, layout()) == 512 + 640 + 768
    assert layer_elements(NEMOTRON, layout()) == 512 + 640 + 512  # without a gate
    assert layer_elements(MODEL, layout(tp=2)) == 512 + (640 + 768) / 2
    assert layer_elements(MODEL, layout(tp=2, sequence_parallel=True)) == (512 + 640 + 768) / 2
    [one] = training_memory(MODEL, layout(), BF16, Batches(10, 4))
    assert one.activations == 10 * 2 * (3 * 1920 + 2 * 128)  # and both ends of the final norm
    first, last = training_memory(MODEL, layout(pp=2), BF16, Batches(10, 4))
    assert first.activations == 2 * 10 * 2 * 2 * 1920  # two micro-batches of two layers wait
    assert last.activations == 10 * 2 * (1920 + 2 * 128)


def test_activations_that_are_computed_again() -> None:
    def kept(method: RecomputeMethod, number: int) -> float:
        again = layout(
            recompute_granularity=RecomputeGranularity.full, recompute_method=method, recompute_num_layers=number
        )
        [memory] = training_memory(MODEL, again, BF16, Batches(1, 1))
        return memory.activations / 2 - 2 * 128

    assert kept(RecomputeMethod.uniform, 1) == 3 * 128 + 1920
    assert kept(RecomputeMethod.uniform, 2) == 2 * 128 + 2 * 1920
    assert kept(RecomputeMethod.block, 2) == 2 * 128 + 1920 + 1920


@pytest.mark.parametrize(
    ("parallel", "group", "expected"),
    [
        (layout(pp=4), 8, [4, 3, 2, 1]),
        (layout(pp=4), 2, [2, 2, 2, 1]),
        # Megatron's warm-up passes and the one in work: 2 x (stages after) + (chunks - 1) x stages + 1.
        (layout(pp=4, virtual_pipeline_model_parallel_size=2), 8, [11, 9, 7, 5]),
        (layout(pp=2, virtual_pipeline_model_parallel_size=3), 2, [6, 5]),
    ],
)
def test_passes_in_flight(parallel: ParallelConfig, group: int, expected: list[int]) -> None:
    assert [in_flight(parallel, group, stage) for stage in range(len(expected))] == expected


def test_teacher_and_its_states_by_hand() -> None:
    student = replace(MODEL, num_layers=2, hidden_size=64)
    parallel = layout(tp=2, pp=2, dp=3, sequence_parallel=True)
    teacher = BesideTeacher(MODEL, parallel, BF16, False, state_bytes=2 * 128 / 2, inner_bytes=(0.0, 10.0))
    first, last = training_memory(student, parallel, BF16, Batches(100, 5), teacher)
    assert [first.teacher, last.teacher] == [2 * numel for numel in stage_parameters(MODEL, parallel)]
    assert (first.stash, last.stash) == (0.0, 5 * 100 * (128 + 10))
    assert (first.loss, first.optimizer) == (0.0, 12 * stage_parameters(student, parallel)[0] / 3)

    # In a layout of its own the same ranks hold other stages: the student's first the teacher's first two.
    own = replace(teacher, parallel=layout(pp=3, dp=4), is_own_layout=True)
    first, last = training_memory(student, layout(tp=2, pp=2, dp=3), BF16, Batches(100, 5), own)
    numels = stage_parameters(MODEL, layout(pp=3, dp=4))
    numels[2] -= 255 * 128  # its output layer, which the student's last stage has in its own shards, padded to 256 rows
    held = [2 * numel for numel in numels]
    assert (first.teacher, last.teacher) == (max(held[:2]), max(held[1:]) + 2 * 128 * 128)
    tied = replace(own, model=replace(MODEL, share_embeddings_and_output_weights=True), parallel=layout(dp=12))
    [first, last] = training_memory(student, layout(tp=2, pp=2, dp=3), BF16, Batches(100, 5), tied)
    assert tied.model is not None
    [whole] = stage_parameters(tied.model, layout())
    assert (first.teacher, last.teacher) == (2 * whole, 2 * whole + 2 * 128 * 128)


def test_loss_by_hand() -> None:
    teacher = BesideTeacher(MODEL, layout(), BF16, False, 256.0, (0.0,))
    student = replace(MODEL, hidden_size=64)
    [few] = training_memory(student, layout(), BF16, Batches(100, 1), teacher)
    # A chunk of each model's logits, four fp32 blocks; hidden states and gradient 2 x 64 + 128; the weight's gradient.
    assert few.loss == 255 * (2 * 100 * 2 + 4 * 100 * 4) + 100 * 2 * 256 + 255 * 64 * 2
    [mixed] = training_memory(student, layout(), BF16, Batches(100, 1), replace(teacher, with_cross_entropy=True))
    assert mixed.loss - few.loss == 255 * 64 * 2 + 100 * 64 * 2  # both gradients once more
    wide = replace(student, vocab_size=2**17)
    [many] = training_memory(wide, layout(), BF16, Batches(2**14, 1), teacher)
    chunks = 2 * CUDA_CHUNK_BYTES + 4 * 64 * 2**20
    assert many.loss == chunks + 2**14 * 2 * 256 + 2**17 * 64 * (4 + 2)
    [alone] = training_memory(student, layout(), FP32, Batches(100, 1))  # with one block: its softmax
    assert alone.loss == 255 * 100 * (4 + 4) + 100 * 4 * 128 + 255 * 64 * 4


def test_fp8_copies_by_hand() -> None:
    fp8 = PrecisionConfig(dtype=Dtype.bf16, fp8=Fp8Format.hybrid, fp8_recipe=Fp8Recipe.tensorwise)
    # qkv (256 + 2 x 64) and projection of 256, gate and up of 2 x 256 and down of 256, all by 128.
    layer = 128 * (384 + 256 + 512 + 256)
    [memory] = training_memory(MODEL, layout(), fp8, Batches(1, 1))
    assert memory.fp8_weights == 3 * 2 * layer  # for the forward and for the backward pass
    assert memory.total == training_memory(MODEL, layout(), BF16, Batches(1, 1))[0].total + memory.fp8_weights
    ends = replace(fp8, first_last_layers_bf16=True)
    held = training_memory(replace(MODEL, num_layers=6), layout(tp=2, pp=3), ends, Batches(1, 1))
    assert [stage.fp8_weights for stage in held] == [layer, 2 * layer, layer]  # two layers a stage, an end in bf16
    # A bf16 student beside a teacher in FP8, which has no backward pass.
    teacher = BesideTeacher(MODEL, layout(), fp8, False, 256.0, (0.0,))
    assert training_memory(MODEL, layout(), BF16, Batches(1, 1), teacher)[0].fp8_weights == 3 * layer
