"""Layout and schedule arithmetic, worked by hand."""

from dataclasses import replace
from typing import Any

import pytest

from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import (
    ParallelConfig,
    RecomputeGranularity,
    RecomputeMethod,
    check_layout,
    layers_per_stage,
    stage_layers,
)
from minitron.config.train import TrainConfig, check_train, num_microbatches
from minitron.errors import ConfigError, LayoutError, ModelError

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=257,
    max_position_embeddings=128,
    layernorm_epsilon=1e-6,
    rotary_base=1e4,
)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (5, 1, [5]),
        (24, 2, [12, 12]),
        (7, 2, [4, 3]),
        (7, 3, [3, 2, 2]),
        (8, 3, [3, 3, 2]),
        (9, 3, [3, 3, 3]),
        (10, 4, [3, 2, 2, 3]),
        (32, 4, [8, 8, 8, 8]),
        (4, 4, [1, 1, 1, 1]),
        (2, 2, [1, 1]),
    ],
)
def test_stage_layers_by_hand(layers: int, stages: int, expected: list[int]) -> None:
    got = stage_layers(layers, stages)
    assert sum(got) == layers
    assert max(got) == max(expected)
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize("layers", range(1, 41))
@pytest.mark.parametrize("stages", range(1, 9))
def test_stage_layers_always_fill_every_stage(layers: int, stages: int) -> None:
    if layers < stages:
        with pytest.raises(LayoutError, match=f"{layers} layers cannot fill {stages} pipeline stages"):
            stage_layers(layers, stages)
        return
    got = stage_layers(layers, stages)
    assert len(got) == stages
    assert sum(got) == layers
    assert min(got) >= 1
    assert len(set(got[1:-1])) <= 1  # Megatron makes all middle stages equal
    # The best that equal middle stages allow, by trying them all.
    ways = [
        max(first, middle if stages > 2 else 0, last)
        for middle in range(1, layers + 1)
        for first in range(1, layers + 1)
        if (last := layers - first - middle * (stages - 2)) >= 1
    ]
    assert stages == 1 or max(got) == min(ways)


def test_arithmetic_and_number_of_ranks() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, data_parallel_size=4)
    assert layout.num_ranks == 24
    assert layout.arithmetic() == "tensor 2 x pipeline 3 x data 4 = 24"
    layout = replace(layout, context_parallel_size=2)
    assert layout.num_ranks == 48
    assert layout.arithmetic() == "tensor 2 x pipeline 3 x context 2 x data 4 = 48"


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (
            {},
            {"tensor_model_parallel_size": 8},
            (
                "student: num_attention_heads=12 does not divide over parallel.tensor_model_parallel_size=8 "
                "(12 / 8 leaves 4); use a divisor of 12, such as 1, 2, 3, 4, 6, 12"
            ),
        ),
        (
            {},
            {"tensor_model_parallel_size": 3},
            (
                "student: num_query_groups=4 does not divide over parallel.tensor_model_parallel_size=3 "
                "(4 / 3 leaves 1); use a divisor of 4, such as 1, 2, 4"
            ),
        ),
        (
            {"ffn_hidden_size": 97},
            {"tensor_model_parallel_size": 2},
            (
                "student: ffn_hidden_size=97 does not divide over parallel.tensor_model_parallel_size=2 "
                "(97 / 2 leaves 1); use a divisor of 97, such as 1"
            ),
        ),
        (
            {},
            {"pipeline_model_parallel_size": 7},
            "student: num_layers=6 is fewer than parallel.pipeline_model_parallel_size=7 stages; use at most 6 stages",
        ),
    ],
)
def test_check_layout_refuses(change: dict[str, int], layout: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(replace(MODEL, **change), ParallelConfig(**layout), who="student")
    assert str(caught.value) == message


def test_check_layout_accepts_what_divides() -> None:
    check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=6), who="teacher")


def stages(pp: int, vp: int | None = None, first: int | None = None, last: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@pytest.mark.parametrize(
    ("layers", "layout", "expected"),
    [
        (5, ParallelConfig(), [5]),
        (7, stages(2), [4, 3]),
        (7, stages(2, vp=1), [4, 3]),
        (7, stages(2, first=2), [2, 5]),
        (7, stages(2, last=2), [5, 2]),
        (7, stages(2, first=3, last=4), [3, 4]),
        (10, stages(4, first=1), [1, 3, 3, 3]),
        (10, stages(4, first=2, last=4), [2, 2, 2, 4]),
        (24, stages(4, vp=2), [6, 6, 6, 6]),
        (30, stages(2, vp=2), [16, 14]),
        (26, stages(3, vp=2), [10, 8, 8]),
        (30, stages(4, vp=2, first=6, last=8), [6, 8, 8, 8]),
    ],
)
def test_layers_per_stage_by_hand(layers: int, layout: ParallelConfig, expected: list[int]) -> None:
    assert sorted(layers_per_stage(layers, layout)) == sorted(expected)
    if layout.num_layers_in_first_pipeline_stage or layout.num_layers_in_last_pipeline_stage:
        assert layers_per_stage(layers, layout) == expected


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            stages(2, vp=4),
            (
                "student: num_layers=6 cannot be dealt over 2 stages x "
                "parallel.virtual_pipeline_model_parallel_size=4 chunks: a stage's chunks have equally many "
                "layers, at least 1; chunks that fit: 1, 2, 3"
            ),
        ),
        (
            stages(3, vp=3),
            (
                "student: num_layers=6 cannot be dealt over 3 stages x "
                "parallel.virtual_pipeline_model_parallel_size=3 chunks: a stage's chunks have equally many "
                "layers, at least 1; chunks that fit: 1, 2"
            ),
        ),
        (
            stages(2, vp=2, first=3),
            (
                "student: parallel.num_layers_in_first_pipeline_stage=3 does not divide over "
                "parallel.virtual_pipeline_model_parallel_size=2 chunks (3 / 2 leaves 1)"
            ),
        ),
        (
            stages(2, first=6),
            (
                "student: parallel.num_layers_in_first_pipeline_stage=6 leave 6 - 6 = 0 layers for the other 1 of 2 "
                "stages, which must be equal and not empty"
            ),
        ),
        (
            stages(3, first=3),
            (
                "student: parallel.num_layers_in_first_pipeline_stage=3 leave 6 - 3 = 3 layers for the other 2 of 3 "
                "stages, which must be equal and not empty"
            ),
        ),
        (
            stages(2, first=3, last=4),
            (
                "student: parallel.num_layers_in_first_pipeline_stage=3 and "
                "parallel.num_layers_in_last_pipeline_stage=4 leave 6 - 3 - 4 = -1 layers for the other 0 of 2 "
                "stages, which must be equal and not empty"
            ),
        ),
        (
            stages(3, vp=2, first=2, last=4),
            (
                "student: parallel.num_layers_in_first_pipeline_stage=2 and "
                "parallel.num_layers_in_last_pipeline_stage=4 leave 6 - 2 - 4 = 0 layers for the other 1 of 3 "
                "stages in 2 chunks each, which must be equal and not empty"
            ),
        ),
    ],
)
def test_layers_that_do_not_come_out(layout: ParallelConfig, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_layout(MODEL, layout, who="student")
    assert str(caught.value) == message
    check_layout(MODEL, layout.plain(), who="teacher")  # divided by itself


def test_the_teacher_is_interleaved_where_its_depth_allows() -> None:
    layout = stages(2, vp=3, first=9)
    assert layout.for_teacher(12) == stages(2, vp=3)
    assert layout.for_teacher(13) == stages(2)
    assert layout.for_teacher(3) == stages(2)  # a multiple of 3, but 6 chunks
    assert stages(2).for_teacher(12) == stages(2)
    recomputing = ParallelConfig(recompute_granularity=RecomputeGranularity.selective)
    assert recomputing.for_teacher(12) == recomputing.plain() == ParallelConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"virtual_pipeline_model_parallel_size": 2},
            (
                "parallel.virtual_pipeline_model_parallel_size=2 needs parallel.pipeline_model_parallel_size > 1 "
                "(it is 1): there are no stages to divide the layers over"
            ),
        ),
        (
            {"num_layers_in_last_pipeline_stage": 2},
            (
                "parallel.num_layers_in_last_pipeline_stage=2 needs parallel.pipeline_model_parallel_size > 1 "
                "(it is 1): there are no stages to divide the layers over"
            ),
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 0},
            "parallel.num_layers_in_first_pipeline_stage=0 must be at least 1, or null",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": -1},
            "parallel.virtual_pipeline_model_parallel_size=-1 must be at least 1, or null",
        ),
        (
            {"recompute_granularity": RecomputeGranularity.full},
            (
                "parallel.recompute_granularity=full needs recompute_method (uniform or block) and "
                "recompute_num_layers of at least 1, but recompute_method=null and recompute_num_layers=null"
            ),
        ),
        (
            {
                "recompute_granularity": RecomputeGranularity.full,
                "recompute_method": RecomputeMethod.block,
                "recompute_num_layers": 0,
            },
            (
                "parallel.recompute_granularity=full needs recompute_method (uniform or block) and "
                "recompute_num_layers of at least 1, but recompute_method=block and recompute_num_layers=0"
            ),
        ),
        (
            {"recompute_granularity": RecomputeGranularity.selective, "recompute_num_layers": 2},
            (
                "parallel.recompute_method=null and recompute_num_layers=2 belong to recompute_granularity=full, "
                "but it is selective; set the two to null, or the granularity to full"
            ),
        ),
        (
            {"recompute_method": RecomputeMethod.uniform},
            (
                "parallel.recompute_method=uniform and recompute_num_layers=null belong to "
                "recompute_granularity=full, but it is null; set the two to null, or the granularity to full"
            ),
        ),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        ParallelConfig(**values)
    assert str(caught.value) == message


def test_one_chunk_a_stage_is_plain() -> None:
    assert ParallelConfig(virtual_pipeline_model_parallel_size=1).num_chunks == 1
    assert stages(2, vp=1).num_chunks == stages(2).num_chunks == 1


def test_interleaving_needs_whole_rounds_of_microbatches() -> None:
    train = TrainConfig(num_tokens=100_000, micro_batch_size=2, global_batch_size=12)
    layout = replace(stages(4, vp=2), data_parallel_size=2)
    with pytest.raises(LayoutError) as caught:
        check_train(train, layout, seq_length=512, who="distill.train")
    assert str(caught.value) == (
        "distill.train: global_batch_size=12 / (micro_batch_size=2 x data_parallel_size=2) = 3 micro-batches are not "
        "a multiple of parallel.pipeline_model_parallel_size=4, which virtual_pipeline_model_parallel_size=2 needs; "
        "change the batch, or set it to null"
    )
    check_train(train, replace(layout, virtual_pipeline_model_parallel_size=None), seq_length=512, who="distill.train")
    check_train(replace(train, global_batch_size=16), layout, seq_length=512, who="distill.train")


def test_heads_must_divide_into_groups() -> None:
    with pytest.raises(LayoutError) as caught:
        replace(MODEL, num_query_groups=5)
    assert "num_attention_heads=12 is not a multiple of num_query_groups=5" in str(caught.value)
    with pytest.raises(ModelError, match="num_layers=0 must be at least 1"):
        replace(MODEL, num_layers=0)


def test_model_json_round_trip_and_errors() -> None:
    assert ModelConfig.from_dict(MODEL.to_dict()) == MODEL
    with pytest.raises(ModelError, match="'Gpt9' is not known; known: LlamaForCausalLM, MistralForCausalLM"):
        ModelConfig.from_dict(MODEL.to_dict() | {"architecture": "Gpt9"})
    with pytest.raises(ModelError, match="unexpected keyword argument 'extra'"):
        ModelConfig.from_dict(MODEL.to_dict() | {"extra": 1})


def test_steps_and_warmup_in_tokens() -> None:
    train = TrainConfig(num_tokens=10_000, micro_batch_size=2, global_batch_size=8, lr_warmup_tokens=1025)
    assert train.tokens_per_step(128) == 1024
    assert train.num_steps(128) == 10  # 9.77 rounded up
    assert train.warmup_steps(128) == 2  # 1025 / 1024 rounded up
    assert replace(train, lr_warmup_tokens=1024).warmup_steps(128) == 1
    assert replace(train, lr_warmup_tokens=0, lr_warmup_steps=5).warmup_steps(128) == 5
    assert replace(train, num_tokens=10_240).num_steps(128) == 10
    assert replace(train, num_tokens=10_241).num_steps(128) == 11


def test_num_microbatches() -> None:
    assert num_microbatches(8, 2, 1) == 4
    assert num_microbatches(8, 2, 4) == 1
    with pytest.raises(LayoutError) as caught:
        num_microbatches(8, 2, 3)
    assert str(caught.value) == (
        "global_batch_size=8 is not a multiple of micro_batch_size=2 x data_parallel_size=3 = 6; change one of them"
    )
    with pytest.raises(LayoutError, match="global_batch_size=0 is not a multiple"):
        num_microbatches(0, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_warmup_steps": 1, "lr_warmup_tokens": 1}, "a.b.lr_warmup_steps=1 and a.b.lr_warmup_tokens=1 both set"),
        ({"log_interval_steps": 0}, "a.b.log_interval_steps=0 must be at least 1"),
        ({"save_interval_steps": -1}, "a.b.save_interval_steps=-1 must be at least 0"),
        ({"micro_batch_size": 3}, "a.b: global_batch_size=8 is not a multiple of micro_batch_size=3"),
        ({"eval_tokens": 511}, "a.b.eval_tokens=511 is less than one sequence of data.seq_length=512 tokens"),
    ],
)
def test_messages_say_where_the_section_is(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_train(TrainConfig(**values), ParallelConfig(), seq_length=512, who="a.b")  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_warmup_must_be_shorter_than_the_run() -> None:
    train = TrainConfig(num_tokens=8192, lr_warmup_tokens=8192)
    with pytest.raises(ConfigError) as caught:
        check_train(train, ParallelConfig(), seq_length=512, who="distill.train")
    assert str(caught.value) == (
        "distill.train: warm-up of 2 steps is not shorter than the run of 2 steps "
        "(num_tokens=8192 / (8 x 512) tokens a step); lower the warm-up or raise num_tokens"
    )
    check_train(replace(train, lr_warmup_tokens=4096), ParallelConfig(), seq_length=512, who="distill.train")
