"""Layout and schedule arithmetic, worked by hand."""

from dataclasses import replace

import pytest

from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig, check_layout, stage_layers
from minitron.config.train import TrainConfig, check_train
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
    assert train.num_microbatches(1) == 4
    assert train.num_microbatches(4) == 1


def test_train_config_refuses() -> None:
    with pytest.raises(ConfigError, match="both set the warm-up; leave one of them 0"):
        TrainConfig(lr_warmup_steps=1, lr_warmup_tokens=1)
    with pytest.raises(ConfigError, match="log_interval_steps=0 must be at least 1"):
        TrainConfig(log_interval_steps=0)
    with pytest.raises(ConfigError, match="save_interval_steps=-1 must not be negative"):
        TrainConfig(save_interval_steps=-1)
    with pytest.raises(LayoutError) as caught:
        TrainConfig(micro_batch_size=2).num_microbatches(3)
    assert str(caught.value) == "global_batch_size=8 is not a multiple of micro_batch_size=2 x data_parallel_size=3 = 6"


def test_warmup_must_be_shorter_than_the_run() -> None:
    train = TrainConfig(num_tokens=8192, lr_warmup_tokens=8192)
    with pytest.raises(ConfigError) as caught:
        check_train(train, ParallelConfig(), seq_length=512, who="distill.train")
    assert str(caught.value) == (
        "distill.train: warm-up of 2 steps is not shorter than the run of 2 steps "
        "(num_tokens=8192 / (8 x 512) tokens a step); lower the warm-up or raise num_tokens"
    )
    check_train(replace(train, lr_warmup_tokens=4096), ParallelConfig(), seq_length=512, who="distill.train")
