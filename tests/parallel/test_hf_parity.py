"""Logits through the parallel path equal transformers'."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.models.hf_export import export_model
from tests.helpers.pool import WorkerPool
from tests.parallel import workers
from tests.parallel.reference import dense_logits, layout, make_model, random_tokens

TOKENS_BS = random_tokens(2, 48, seed=3)
SMOLLM_TOKENS_BS = random_tokens(2, 32, seed=4, vocab_size=49152)
PROSE = [
    "A language model is made smaller by taking away the layers and channels it needs least, and is trained again.",
    "The river rises in the hills north of the town. In spring, when the snow melts, its water is high and brown.",
]
"""On ids drawn at random transformers' own fp32 is up to 2e-4 from its fp64; on text a model was made for, 5e-5."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "tied": {},
    "untied, llama3 rope": {
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3,
        "head_dim": 16,
        "max_position_embeddings": 65536,
    },
    "heads x channels is not hidden": {"hidden_size": 40, "head_dim": 12, "intermediate_size": 70},
    "five layers": {"num_hidden_layers": 5},
}


@pytest.fixture(scope="module")
def exported(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as transformers reads it (its own GGUF reader needs accelerate)."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_model(smollm, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def prose_BS(exported: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    return torch.tensor([tokenizer(text)["input_ids"][:20] for text in PROSE])


@pytest.fixture(scope="module")
def prose_logits(exported: Path, prose_BS: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(prose_BS, use_cache=False).logits


@pytest.fixture(scope="module")
def smollm_logits_fp64(exported: Path) -> Tensor:
    return dense_logits(exported, SMOLLM_TOKENS_BS)


@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 2, 1), (1, 3, 1), (3, 1, 1)])
def test_smollm_has_transformers_logits(
    pool: WorkerPool, smollm: Path, prose_BS: Tensor, prose_logits: Tensor, axes: tuple[int, int, int]
) -> None:
    results = pool.run(workers.logits, math.prod(axes), smollm, layout(*axes), prose_BS)
    for logits, _ in results:
        assert float((logits - prose_logits).abs().max()) < 1e-4
        assert float((logits - prose_logits).pow(2).mean().sqrt()) < 2e-5


@pytest.mark.parametrize("axes", [(1, 2, 1), (3, 1, 1)])
def test_smollm_has_transformers_logits_in_fp64(
    pool: WorkerPool, smollm: Path, smollm_logits_fp64: Tensor, axes: tuple[int, int, int]
) -> None:
    """Without rounding inside the model, what is left is that of the logits to fp32."""
    job = (smollm, layout(*axes), SMOLLM_TOKENS_BS)
    for logits, _ in pool.run(workers.logits, math.prod(axes), *job, dtype=torch.float64):
        assert float((logits - smollm_logits_fp64).abs().max()) < 2e-6


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("name", SHAPES)
def test_tiny_model_has_transformers_logits(
    pool: WorkerPool, tmp_path: Path, name: str, axes: tuple[int, int, int]
) -> None:
    folder = make_model(tmp_path, seed=5, **SHAPES[name])
    want = dense_logits(folder / "hf", TOKENS_BS)
    results = pool.run(workers.logits, math.prod(axes), folder / "checkpoint", layout(*axes), TOKENS_BS)
    for logits, _ in results:
        assert float((logits - want).abs().max()) < 1e-4
    if name == "five layers" and axes == (2, 2, 1):
        assert [num_layers for _, num_layers in results] == [3, 3, 2, 2]
