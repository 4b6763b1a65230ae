"""Number formats: what each file of conf/precision means, what excludes what, and what FP8 needs."""

from dataclasses import replace

import pytest

from minitron.config.compose import compose_run
from minitron.config.fp8 import NEEDS, check_fp8_model, check_fp8_tokens, fp8_alignment, misaligned, unmet_need
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import AmaxComputeAlgo, Dtype, Fp8Format, Fp8Recipe, PrecisionConfig
from minitron.errors import ConfigError, LayoutError

RANDOM = "source.kind=random"
BF16 = PrecisionConfig(dtype=Dtype.bf16)
LLAMA_4B_WIDTH = ModelConfig(
    architecture=Architecture.llama,
    num_layers=32,
    hidden_size=3072,
    ffn_hidden_size=9216,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-5,
    rotary_base=500000.0,
)


def fp8(recipe: Fp8Recipe) -> PrecisionConfig:
    return PrecisionConfig(dtype=Dtype.bf16, fp8=Fp8Format.hybrid, fp8_recipe=recipe)


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("fp32", PrecisionConfig()),
        ("bf16", BF16),
        (
            "fp8_delayed",
            PrecisionConfig(
                dtype=Dtype.bf16,
                fp8=Fp8Format.hybrid,
                fp8_recipe=Fp8Recipe.delayed,
                fp8_amax_history_len=1024,
                fp8_amax_compute_algo=AmaxComputeAlgo.max,
            ),
        ),
        ("fp8_current", replace(fp8(Fp8Recipe.tensorwise), first_last_layers_bf16=True)),
        ("fp8_blockwise", replace(fp8(Fp8Recipe.blockwise), fp8=Fp8Format.e4m3)),
        ("mxfp8", replace(fp8(Fp8Recipe.mxfp8), fp8=Fp8Format.e4m3)),
    ],
)
def test_files(name: str, means: PrecisionConfig) -> None:
    assert compose_run([RANDOM, f"precision={name}"]).precision == means


def test_a_file_wins_over_an_experiments_default() -> None:
    run = compose_run(["experiment=demo", "precision=fp8_delayed", RANDOM, "source.path=null"])
    assert run.precision == fp8(Fp8Recipe.delayed)
    assert compose_run(["experiment=demo", RANDOM, "source.path=null"]).precision == BF16


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["precision.fp8=hybrid"], ["precision.fp8=hybrid needs precision.dtype=bf16", "it is fp32"]),
        (["precision=fp8_delayed", "precision.dtype=fp32"], ["needs precision.dtype=bf16"]),
        (
            ["precision=fp8_delayed", "precision.first_last_layers_bf16=true"],
            ["first_last_layers_bf16=true is not offered with precision.fp8_recipe=delayed"],
        ),
        (["precision.fp8_amax_history_len=0"], ["precision.fp8_amax_history_len=0 must be at least 1"]),
        (["precision.num_layers_at_end_in_bf16=-1"], ["precision.num_layers_at_end_in_bf16=-1 must be at least 0"]),
        (
            ["precision=bf16", "distill.teacher.fp8_recipe=delayed"],
            ["distill.teacher.fp8_recipe=delayed is not possible", "tensorwise"],
        ),
        (
            ["distill.teacher.fp8_recipe=mxfp8"],
            ["distill.teacher.fp8_recipe=mxfp8 needs the teacher in bf16, but it is in fp32"],
        ),
        (["precision.fp8_recipe=fast"], ["precision.fp8_recipe: Invalid value 'fast'", "tensorwise"]),
        (
            ["precision=fp8_delayed", "data.seq_length=1000"],
            ["distill.train.micro_batch_size=1 x data.seq_length=1000 = 1000 tokens is not a multiple of 16"],
        ),
        (
            ["precision=bf16", "distill.teacher.fp8_recipe=mxfp8", "data.seq_length=48"],
            ["distill.teacher.micro_batch_size=1 x data.seq_length=48 = 48 tokens is not a multiple of 32 which"],
        ),
    ],
)
def test_what_excludes_what_is_one_line(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([RANDOM, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part.replace(" which", ", which") in message


def test_settings_in_force() -> None:
    """What is not read is not in a stage's identity."""
    assert BF16.in_force() == replace(BF16, fp8_amax_history_len=1, fp8_recipe=Fp8Recipe.mxfp8).in_force()
    assert BF16.in_force() == {"dtype": "bf16"}
    delayed = fp8(Fp8Recipe.delayed).in_force()
    assert delayed == {
        "dtype": "bf16",
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": False,
    }
    ends = replace(fp8(Fp8Recipe.tensorwise), first_last_layers_bf16=True).in_force()
    assert ends.keys() - delayed.keys() == {"num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"}
    assert "fp8_amax_history_len" not in ends
    assert fp8(Fp8Recipe.mxfp8).plain() == BF16


def test_a_teacher_has_its_own() -> None:
    student = replace(fp8(Fp8Recipe.tensorwise), first_last_layers_bf16=True)
    assert student.for_teacher(None, None) == BF16
    assert student.for_teacher(Dtype.fp32, None) == PrecisionConfig()
    blockwise = student.for_teacher(None, Fp8Recipe.blockwise)
    assert blockwise == replace(student, fp8_recipe=Fp8Recipe.blockwise)
    assert blockwise.label == "fp8 blockwise but 1+1 layers"
    assert BF16.for_teacher(None, Fp8Recipe.tensorwise) == fp8(Fp8Recipe.tensorwise)
    assert (BF16.label, fp8(Fp8Recipe.mxfp8).label) == ("bf16", "fp8 mxfp8")


H100, B200, ADA, A100, RTX5090 = (9, 0), (10, 0), (8, 9), (8, 0), (12, 0)
ALL = {"delayed", "tensorwise", "blockwise", "mxfp8"}


@pytest.mark.parametrize(
    ("capability", "cuda", "able"),
    [
        (A100, (13, 0), set()),
        (ADA, (13, 0), {"delayed", "tensorwise"}),
        (ADA, (12, 0), set()),
        (H100, (12, 8), {"delayed", "tensorwise"}),
        (H100, (12, 9), {"delayed", "tensorwise", "blockwise"}),
        (B200, (12, 9), ALL),
        (B200, None, ALL),
        (RTX5090, (13, 0), ALL - {"mxfp8"}),
    ],
)
def test_what_a_gpu_can_run(capability: tuple[int, int], cuda: tuple[int, int] | None, able: set[str]) -> None:
    assert {r.value for r in NEEDS if unmet_need(r, capability=capability, cuda=cuda) is None} == able


def test_an_unmet_need_says_what_is_needed() -> None:
    assert unmet_need(Fp8Recipe.mxfp8, capability=H100, cuda=(13, 0)) == (
        "mxfp8 needs compute capability 10.0 or higher and below 12.0, not 9.0"
    )
    assert unmet_need(Fp8Recipe.blockwise, capability=H100, cuda=(12, 8)) == (
        "blockwise needs CUDA 12.9 or higher, not 12.8"
    )


@pytest.mark.parametrize(
    ("changed", "recipe", "tp", "said"),
    [
        ({}, Fp8Recipe.mxfp8, 8, None),
        ({"hidden_size": 504}, Fp8Recipe.delayed, 1, "hidden_size=504 is not a multiple of 16 (nearest: 496 or 512)"),
        ({"hidden_size": 528}, Fp8Recipe.delayed, 1, None),
        ({"hidden_size": 528}, Fp8Recipe.mxfp8, 1, "hidden_size=528 is not a multiple of 32 (nearest: 512 or 544)"),
        ({"ffn_hidden_size": 9216}, Fp8Recipe.delayed, 64, None),
        (
            {"ffn_hidden_size": 9216, "num_attention_heads": 64, "num_query_groups": 64},
            Fp8Recipe.mxfp8,
            64,
            (
                "ffn_hidden_size=9216 / tensor_model_parallel_size=64 = 144 is not a multiple of 32 "
                "(nearest: 8192 or 10240 / 64)"
            ),
        ),
        (
            {"kv_channels": 20, "num_attention_heads": 8, "num_query_groups": 4},
            Fp8Recipe.delayed,
            4,
            (
                "num_attention_heads=8 x kv_channels=20 / tensor_model_parallel_size=4 = 40 is not a multiple of 16 "
                "(nearest: 128 or 192 / 4)"
            ),
        ),
        (
            {"kv_channels": 8, "num_attention_heads": 4, "num_query_groups": 1},
            Fp8Recipe.mxfp8,
            1,
            (
                "(num_attention_heads=4 + 2 x num_query_groups=1) x kv_channels=8 = 48 is not a multiple of 32 "
                "(nearest: 32 or 64)"
            ),
        ),
    ],
)
def test_widths_per_rank(changed: dict[str, int], recipe: Fp8Recipe, tp: int, said: str | None) -> None:
    assert misaligned(replace(LLAMA_4B_WIDTH, **changed), recipe, tp) == said  # type: ignore[arg-type]


def test_alignment_is_megatrons() -> None:
    from megatron.core.enums import Fp8Recipe as MegatronRecipe
    from megatron.core.fp8_utils import get_fp8_align_size

    for recipe in Fp8Recipe:
        assert fp8_alignment(recipe) == get_fp8_align_size(MegatronRecipe(recipe.value))


def test_a_model_is_refused_by_name() -> None:
    odd = replace(LLAMA_4B_WIDTH, ffn_hidden_size=9000)
    check_fp8_model(odd, BF16, ParallelConfig(), who="student")
    with pytest.raises(LayoutError, match=r"^student: ffn_hidden_size=9000 is not a multiple of 16 .*precision=bf16"):
        check_fp8_model(odd, fp8(Fp8Recipe.delayed), ParallelConfig(), who="student")
    ends = replace(fp8(Fp8Recipe.tensorwise), first_last_layers_bf16=True, num_layers_at_start_in_bf16=5)
    check_fp8_model(LLAMA_4B_WIDTH, ends, ParallelConfig(pipeline_model_parallel_size=4), who="student")
    with pytest.raises(LayoutError, match=r"num_layers_at_start_in_bf16=5 is more than the 4 layers .* 8 stages"):
        check_fp8_model(LLAMA_4B_WIDTH, ends, ParallelConfig(pipeline_model_parallel_size=8), who="student")


def test_tokens_of_a_rank() -> None:
    split = ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=4, sequence_parallel=True)
    for parallel, length, fits in (
        (ParallelConfig(), 1040, True),
        (ParallelConfig(), 1048, False),
        (split, 1024, True),
        (split, 1040, False),  # 130 tokens a rank
        (replace(split, sequence_parallel=False), 1040, False),  # 520
        (replace(split, sequence_parallel=False), 1056, True),  # 528
    ):
        try:
            check_fp8_tokens(fp8(Fp8Recipe.delayed), parallel, micro_batch_size=1, seq_length=length, who="m")
        except ConfigError:
            assert not fits, (parallel, length)
        else:
            assert fits, (parallel, length)
