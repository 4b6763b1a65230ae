"""The papers' search spaces to the last shape, and their models' parameters to the last printed digit."""

from dataclasses import replace
from typing import Any

import pytest

from minitron.config.compose import compose_run
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.prune import PruneConfig, check_target
from minitron.config.search import (
    BoundsConfig,
    BudgetConfig,
    GridConfig,
    SearchConfig,
)
from minitron.models.axes import num_parameters
from minitron.search.space import Space, enumerate_space, roofline
from tests.helpers.llama31 import LLAMA_8B


def _nemotron_15b() -> ModelConfig:
    """Nemotron-4 15B (arXiv 2407.14679, Table 5)."""
    return ModelConfig(architecture=Architecture.nemotron, **NEMOTRON_15B)


NEMOTRON_15B: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 6144,
    "ffn_hidden_size": 24576,
    "num_attention_heads": 48,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 256000,
    "max_position_embeddings": 4096,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000.0,
    "rotary_percent": 0.5,
}

PAPER_4B = {  # method file, appendix A: layers, heads, ffn, hidden
    *((29, 24, 9216, 3072), (29, 32, 7680, 3072), (29, 32, 9216, 3072), (29, 48, 10240, 2560), (30, 24, 9216, 3072)),
    *((30, 32, 7680, 3072), (30, 48, 10240, 2560), (31, 24, 7680, 3072), (31, 24, 9216, 3072), (31, 32, 7680, 3072)),
    *((31, 48, 8960, 2560), (31, 48, 10240, 2560), (32, 24, 7680, 3072), (32, 24, 9216, 3072), (32, 32, 7680, 3072)),
    *((32, 32, 10240, 2560), (32, 48, 8960, 2560), (32, 48, 10240, 2560)),
}
PAPER_8B = {  # arXiv 2407.14679, Table 19
    *(
        (32, 32, 12800, 5120),
        (32, 32, 13824, 4608),
        (32, 48, 11520, 4608),
        (32, 48, 16384, 4096),
        (31, 32, 12800, 5120),
    ),
    *(
        (31, 32, 16128, 4608),
        (31, 48, 13824, 4608),
        (31, 48, 16384, 4096),
        (30, 32, 12800, 5120),
        (30, 32, 16128, 4608),
    ),
    *(
        (30, 48, 13824, 4608),
        (30, 48, 16384, 4096),
        (29, 32, 12800, 5120),
        (29, 32, 16128, 4608),
        (29, 48, 13824, 4608),
    ),
}


def _nemotron_total(layers: int, heads: int, ffn: int, hidden: int) -> int:
    """By hand: untied embeddings, queries, keys, values, output, two matrices of the mlp, norms with biases."""
    layer = hidden * (heads + 16) * 128 + heads * 128 * hidden + 2 * hidden * ffn + 4 * hidden
    return 2 * 256000 * hidden + layers * layer + 2 * hidden


def _shapes(space: Space) -> set[tuple[int, ...]]:
    found = [candidate.model for candidate in space.candidates]
    return {(m.num_layers, m.num_attention_heads, m.ffn_hidden_size, m.hidden_size) for m in found}


@pytest.mark.parametrize(
    ("name", "bounds", "points", "expected"),
    [
        ("nemotron4_15b_to_4b", None, 240, PAPER_4B),
        ("nemotron4_15b_to_8b", None, 160, PAPER_8B),
        # Between the next grid points on both sides: nothing else of the grid falls there.
        ("nemotron4_15b_to_8b", BoundsConfig(min=7_772_101_633, max=8_550_687_743), 160, PAPER_8B),
    ],
)
def test_the_papers_candidates(
    name: str, bounds: BoundsConfig | None, points: int, expected: set[tuple[int, ...]]
) -> None:
    run = compose_run(["experiment=tiny", f"search={name}", "prune.num_layers=null", "search.eval_tokens=64"])
    search = run.search if bounds is None else replace(run.search, budget=BudgetConfig(parameters=bounds))
    space = enumerate_space(_nemotron_15b(), PruneConfig(), search, ParallelConfig(), roofline(search))
    assert space.num_points == points
    assert len(space.candidates) == len(expected)
    assert _shapes(space) == expected
    for candidate, shape in zip(space.candidates, map(_only, space.candidates), strict=True):
        assert candidate.costs.parameters == num_parameters(candidate.model) == _nemotron_total(*shape)
        assert candidate.costs.non_embedding == _nemotron_total(*shape) - 2 * 256000 * shape[3]
        assert candidate.costs.active_parameters == _nemotron_total(*shape) - 256000 * shape[3]
        assert candidate.model.num_query_groups == 8
        assert candidate.model.kv_channels == 128


def _only(candidate: Any) -> tuple[int, int, int, int]:
    [shape] = _shapes(Space(candidates=[candidate]))
    layers, heads, ffn, hidden = shape
    return layers, heads, ffn, hidden


@pytest.mark.parametrize(
    ("sizes", "total", "non_embedding"),  # method file, section 4, in billions
    [
        ({"hidden_size": 4096, "ffn_hidden_size": 16384}, 8.272, 6.175),
        ({"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24}, 4.191, 2.618),
        ({}, 15.629, 12.483),
    ],
)
def test_published_nemotrons(sizes: dict[str, int], total: float, non_embedding: float) -> None:
    _check_published(_nemotron_15b(), sizes, total, non_embedding)


NEMO_12B = replace(
    LLAMA_8B, architecture=Architecture.mistral, num_layers=40, hidden_size=5120, vocab_size=131072, rotary_base=1e6
)


@pytest.mark.parametrize(
    ("source", "name", "total", "non_embedding"),
    [
        (LLAMA_8B, "llama31_8b_to_4b_width", 4.513, 3.725),
        (LLAMA_8B, "llama31_8b_to_4b_depth", 4.540, 3.490),
        (LLAMA_8B, "none", 8.030, 6.980),
        (NEMO_12B, "mistral_nemo_12b_to_8b", 8.414, 7.340),
        (NEMO_12B, "none", 12.248, 10.906),
    ],
)
def test_published_llama_and_mistral_shapes(source: ModelConfig, name: str, total: float, non_embedding: float) -> None:
    run = compose_run(["source.kind=random", f"prune={name}"])
    _check_published(check_target(source, run.prune), {}, total, non_embedding)


def _check_published(model: ModelConfig, sizes: dict[str, int], total: float, non_embedding: float) -> None:
    """A search of one point with the model's own sizes counts as the papers do, to the last printed digit."""
    target = PruneConfig(**sizes)  # type: ignore[arg-type]
    search = SearchConfig(grid=GridConfig(num_layers=[model.num_layers]))
    [candidate] = enumerate_space(model, target, search, ParallelConfig(), roofline(search)).candidates
    assert f"{candidate.costs.parameters / 1e9:.3f}" == f"{total:.3f}"
    assert f"{candidate.costs.non_embedding / 1e9:.3f}" == f"{non_embedding:.3f}"
