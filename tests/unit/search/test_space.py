"""What is left of a grid, and why points fall."""

from collections.abc import Iterator
from typing import Any

import pytest

from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, Fp8Format, Fp8Recipe, PrecisionConfig
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
from minitron.search.space import Space, enumerate_space, require_candidates, roofline
from tests.helpers.llama31 import LLAMA_8B
from tests.helpers.smollm2 import SMOLLM2_135M


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
        ("memory_gb", 0.27, 0.3),
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


def test_widths_that_fp8_cannot_multiply_on_a_rank() -> None:
    """A quarter of 9000 is 2250 and of 9016 is 2254; of 9152 it is 143 x 16, of 9216 it is 72 x 32."""
    search = SearchConfig(grid=GridConfig(ffn_hidden_size=[9000, 9016, 9152, 9216]))
    layout = ParallelConfig(tensor_model_parallel_size=4)

    def space(fp8: Fp8Format | None, recipe: Fp8Recipe) -> Space:
        precision = PrecisionConfig(dtype=Dtype.bf16, fp8=fp8, fp8_recipe=recipe)
        return enumerate_space(LLAMA_8B, PruneConfig(), search, layout, roofline(search), precision=precision)

    def widths(space: Space) -> list[int]:
        return [candidate.model.ffn_hidden_size for candidate in space.candidates]

    found = space(Fp8Format.e4m3, Fp8Recipe.mxfp8)
    assert widths(found) == [9216]
    assert dict(found.dropped) == {"not fitting FP8 (mxfp8)": 3}
    [example] = found.example.values()
    assert "ffn_hidden_size=9000 / tensor_model_parallel_size=4 = 2250 is not a multiple of 32" in example
    assert widths(space(Fp8Format.e4m3, Fp8Recipe.blockwise)) == [9152, 9216]
    assert widths(space(None, Fp8Recipe.mxfp8)) == [9000, 9016, 9152, 9216]


def test_an_empty_budget_names_the_nearest() -> None:
    budget = BudgetConfig(parameters=BoundsConfig(min=1.05e8, max=1.10e8))
    search = SearchConfig(grid=GridConfig(num_layers=[18, 20, 30]), budget=budget)
    space = enumerate_space(SMOLLM2_135M, PruneConfig(), search, ParallelConfig(), roofline(search))
    with pytest.raises(ConfigError) as caught:
        require_candidates(space, search)
    assert str(caught.value) == (
        "search: no shape of 3 meets search.budget; nearest: L20-h576-f1536-a9-g3 (parameters=9.911e+07 is below "
        "1.05e+08); L18-h576-f1536-a9-g3 (parameters=9.203e+07 is below 1.05e+08); L30-h576-f1536-a9-g3 "
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
