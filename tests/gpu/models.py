"""Small models for the GPU tests, and a teacher and a student of the width of Llama-3.1-8B for its benchmark."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from minitron.config.distill import DistillConfig
from minitron.config.fp8 import unmet_need
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, Fp8Format, Fp8Recipe, PrecisionConfig
from minitron.config.run import Device
from minitron.config.train import TrainConfig
from minitron.data.batch import Batch
from minitron.distill.objective import Distillation
from minitron.distill.teacher import OnlineTeacher, freeze
from minitron.models.gpt import Chunks, build_gpt
from minitron.parallel.groups import Groups
from minitron.train.optim import Trainable, make_trainable
from tests.helpers.batch import batch_of
from tests.helpers.llama31 import LLAMA_8B

SMALL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,  # 8 x 64 != 256
    vocab_size=1000,
    max_position_embeddings=256,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
)
SMALLER = replace(SMALL, hidden_size=192, ffn_hidden_size=512)
EXPERTS = replace(
    SMALL, architecture=Architecture.qwen3_moe, num_layers=2, ffn_hidden_size=128, num_moe_experts=4, moe_router_topk=2
)

LLAMA_4B_WIDTH = replace(LLAMA_8B, hidden_size=3072, ffn_hidden_size=9216)
"""The papers' student of it (arXiv 2408.11796, table 2), pruned in width."""

BF16 = PrecisionConfig(dtype=Dtype.bf16)
ONE_RANK = ParallelConfig()


def fp8(recipe: Fp8Recipe) -> PrecisionConfig:
    """A recipe as its file in ``conf/precision`` has it, every layer in FP8."""
    e4m3 = recipe in (Fp8Recipe.blockwise, Fp8Recipe.mxfp8)
    return PrecisionConfig(dtype=Dtype.bf16, fp8=Fp8Format.e4m3 if e4m3 else Fp8Format.hybrid, fp8_recipe=recipe)


def lack_of(recipe: Fp8Recipe) -> str | None:
    """Why this GPU cannot run a recipe."""
    assert torch.version.cuda is not None
    major, minor = torch.version.cuda.split(".")[:2]
    return unmet_need(recipe, capability=torch.cuda.get_device_capability(), cuda=(int(major), int(minor)))


def build(
    model: ModelConfig,
    precision: PrecisionConfig,
    groups: Groups,
    *,
    seed: int = 1,
    local_spec: bool = False,
    device: Device = Device.cuda,
) -> Chunks:
    """A model with random weights that the seed decides."""
    torch.manual_seed(seed)
    gpt = build_gpt(model, ONE_RANK, precision, groups, device=device, initialize=True, local_spec=local_spec)
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in gpt.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, device=device) * model.init_method_std
            parameter.copy_(drawn + (1.0 if parameter.dim() == 1 else 0.0))
    return gpt


def batches(
    model: ModelConfig,
    number: int,
    *,
    size: int = 2,
    length: int = 128,
    seed: int = 0,
    device: Device = Device.cuda,
) -> Sequence[Batch]:
    """Micro-batches of random tokens, on the GPU or where ``device`` says."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (number, size, length + 1), generator=generator)
    return [batch_of(ids_BT).to(torch.device(device)) for ids_BT in ids]


def trainable(gpt: Chunks, groups: Groups, *, num_steps: int, num_microbatches: int, length: int = 128) -> Trainable:
    """A model with Megatron's wrapper and optimizer around it; micro-batches of two sequences."""
    size = 2 * num_microbatches
    settings = TrainConfig(
        num_tokens=num_steps * size * length, micro_batch_size=2, global_batch_size=size, lr=1e-3, min_lr=1e-4
    )
    return make_trainable(gpt, settings, ONE_RANK, groups, seq_length=length)


def distillation(teacher: Chunks, vocab_size: int, groups: Groups) -> Distillation:
    """The default recipe: forward KL alone."""
    return Distillation(OnlineTeacher(freeze(teacher)), vocab_size, groups, False, DistillConfig())
