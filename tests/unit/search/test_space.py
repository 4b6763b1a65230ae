"""The papers' search spaces to the last shape, and why points fall."""

from collections.abc import Iterator
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
    DivisorsConfig,
    GridConfig,
    SearchConfig,
    ServingConfig,
)
from minitron.errors import ConfigError
from minitron.models.axes import num_parameters
from minitron.search.space import Space, enumerate_space, require_candidates, roofline
from tests.helpers.smollm2 import SMOLLM2_135M

NEMOTRON_15B = ModelConfig(
    architecture=Architecture.nemotron,
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=256000,
    max_position_embeddings=4096,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
    rotary_percent=0.5,
)

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
    space = enumerate_space(NEMOTRON_15B, PruneConfig(), search, ParallelConfig(), roofline(search))
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
    _check_published(NEMOTRON_15B, sizes, total, non_embedding)


LLAMA_8B = ModelConfig(
    architecture=Architecture.llama,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    layernorm_epsilon=1e-5,
    rotary_base=500000.0,
)
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


def _space(**values: Any) -> Space:
    search = SearchConfig(**values)
    return enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), roofline(search))


def _names(space: Space) -> list[str]:
    return [candidate.name for candidate in space.candidates]


def test_axes_that_are_left_out_are_those_of_prune() -> None:
    search = SearchConfig(grid=GridConfig(hidden_size=[504, 576]))
    prune = PruneConfig(num_layers=26, ffn_hidden_size=1344)
    space = enumerate_space(SMOLLM2_135M, prune, search, ParallelConfig(), roofline(search))
    assert _names(space) == ["L26-h504-f1344-a9-g3", "L26-h576-f1344-a9-g3"]
    assert [c.prune(prune) for c in space.candidates] == [
        PruneConfig(num_layers=26, hidden_size=h, ffn_hidden_size=1344, num_attention_heads=9, num_query_groups=3)
        for h in (504, 576)
    ]


def test_a_list_of_layers_to_drop_stays() -> None:
    search = SearchConfig(grid=GridConfig(hidden_size=[504]))
    prune = PruneConfig(drop_layers=[20, 21])
    [candidate] = enumerate_space(SMOLLM2_135M, prune, search, ParallelConfig(), roofline(search)).candidates
    made = candidate.prune(prune)
    assert (candidate.model.num_layers, made.num_layers, made.drop_layers) == (28, None, [20, 21])
    assert check_target(SMOLLM2_135M, made) == candidate.model


def test_memory_is_weights_and_cache() -> None:
    serving = ServingConfig(batch_size=4, prompt_tokens=1000, new_tokens=24)
    [candidate] = _space(grid=GridConfig(hidden_size=[576]), serving=serving).candidates
    weights, cache = 134_515_008 * 2, 4 * 1024 * 30 * 2 * 3 * 64 * 2
    assert candidate.costs.memory_gb == pytest.approx((weights + cache) / 1e9, rel=1e-12)
    assert candidate.costs.active_parameters == 134_515_008  # the tied embedding is the output layer


def _reasons() -> Iterator[tuple[dict[str, Any], dict[str, int], list[str]]]:
    hidden = GridConfig(hidden_size=[500, 504, 512, 576])
    fits = {"not fitting the source": 2}  # transformers wants hidden % 9 == 0
    yield {"grid": hidden}, fits, ["L30-h504-f1536-a9-g3", "L30-h576-f1536-a9-g3"]
    divided = {"search.divisors.hidden_size": 1}
    yield {"grid": hidden, "divisors": DivisorsConfig(hidden_size=64)}, fits | divided, ["L30-h576-f1536-a9-g3"]
    filtered = {"search.filter": 1}
    yield {"grid": hidden, "filter": "ffn_hidden_size > 3 * hidden_size"}, fits | filtered, ["L30-h504-f1536-a9-g3"]
    yield {"grid": hidden, "filter": "parameters > 134e6"}, fits | filtered, ["L30-h576-f1536-a9-g3"]
    yield {"grid": hidden, "filter": "latency_ms > 1e9"}, fits | {"search.filter": 2}, []
    # Three ranks: 9 heads x 64 and 3 groups x 64 divide, 1340 neurons leave 446.67 on each.
    ffn = GridConfig(ffn_hidden_size=[1340, 1344])
    ranks = {"divisors": DivisorsConfig(per_rank=16), "serving": ServingConfig(tensor_model_parallel_size=3)}
    yield {"grid": ffn, **ranks}, {"search.divisors.per_rank": 1}, ["L30-h576-f1344-a9-g3"]
    factor = GridConfig(hidden_size=[504], ffn_factor=[2.5, 2.501])
    yield {"grid": factor}, {"an ffn_factor that gives no whole size": 1}, ["L30-h504-f1260-a9-g3"]
    for cost, least, most in (
        ("parameters", 134_515_008, 134_515_008),
        ("non_embedding", 1.06e8, 1.07e8),
        ("memory_gb", 0.26, 0.3),
    ):
        budget = BudgetConfig(**{cost: BoundsConfig(min=least, max=most)})
        expected = fits | {f"search.budget.{cost}.min": 1}
        yield {"grid": hidden, "budget": budget}, expected, ["L30-h576-f1536-a9-g3"]


@pytest.mark.parametrize(("values", "dropped", "left"), _reasons())
def test_what_falls_to_what(values: dict[str, Any], dropped: dict[str, int], left: list[str]) -> None:
    space = _space(**values)
    assert dict(space.dropped) == dropped
    assert _names(space) == left
    assert space.num_points == len(left) + sum(dropped.values())


def test_layouts_that_a_candidate_does_not_fit() -> None:
    search = SearchConfig(grid=GridConfig(num_attention_heads=[9, 6, 3]))
    space = enumerate_space(
        SMOLLM2_135M, PruneConfig(), search, ParallelConfig(tensor_model_parallel_size=9), roofline(search)
    )
    assert dict(space.dropped) == {"not fitting the layout": 3}
    with pytest.raises(
        ConfigError, match=r"no shape of 3 is left \(3 by not fitting the layout\), for instance .*=9: "
    ):
        require_candidates(space, search)


def test_an_empty_budget_names_the_nearest() -> None:
    budget = BudgetConfig(parameters=BoundsConfig(min=1.05e8, max=1.10e8))
    search = SearchConfig(grid=GridConfig(num_layers=[18, 20, 30]), budget=budget)
    space = enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), roofline(search))
    with pytest.raises(ConfigError) as caught:
        require_candidates(space, search)
    assert str(caught.value) == (
        "search: no shape of 3 meets search.budget; nearest: L20-h576-f1536-a9-g3 (parameters=9.912e+07 is below "
        "1.05e+08); L18-h576-f1536-a9-g3 (parameters=9.204e+07 is below 1.05e+08); L30-h576-f1536-a9-g3 "
        "(parameters=1.345e+08 is above 1.1e+08); change search.budget or search.grid"
    )


def test_too_many() -> None:
    search = SearchConfig(grid=GridConfig(num_layers=[28, 29, 30]), max_candidates=2)
    space = enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), roofline(search))
    with pytest.raises(ConfigError, match=r"3 shapes of 3 meet the budget, more than search.max_candidates=2"):
        require_candidates(space, search)


def test_what_needs_a_latency_waits_for_it() -> None:
    budget = BudgetConfig(latency_ms=BoundsConfig(max=28.0))
    search = SearchConfig(grid=GridConfig(num_layers=[28, 29]), budget=budget, filter="latency_ms > 27.5")
    before = enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), None)
    assert len(before.candidates) == 2
    assert before.candidates[0].costs.latency_ms is None
    after = enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), lambda model: model.num_layers)
    assert _names(after) == ["L28-h576-f1536-a9-g3"]
