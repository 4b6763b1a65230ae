"""Configuration, scores and spec of a mixture of experts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron.config.parallel import ParallelConfig, check_layout
from minitron.config.prune import PruneConfig, Ranking, check_target
from minitron.config.score import Aggregation
from minitron.errors import LayoutError, ModelError, PruneError
from minitron.models.axes import num_active_parameters, num_parameters
from minitron.prune.experts import expert_scores
from minitron.prune.ranking import choose
from minitron.prune.scores import Scores, random_scores
from minitron.prune.spec import PruneSpec
from tests.unit.prune.reference import FAMILIES, shape

MODEL = shape(**FAMILIES["qwen3_moe"])  # 6 experts of 10 neurons, 2 a token


def pruned() -> PruneSpec:
    config = PruneConfig(ranking=Ranking.random, num_layers=3, ffn_hidden_size=7, num_moe_experts=4)
    return choose(MODEL, config, scores=None, source_id="abc")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_moe_experts": 7}, "prune.num_moe_experts=7 is larger than the model's 6"),
        ({"num_moe_experts": 1}, "num_moe_experts=1 is fewer than the moe_router_topk=2 experts"),
        ({"ffn_hidden_size": 11}, "prune.ffn_hidden_size=11 is larger than the model's 10"),
    ],
)
def test_targets_that_do_not_fit(values: dict[str, int], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        check_target(MODEL, PruneConfig(**values))


def test_a_dense_model_has_no_experts_to_prune() -> None:
    with pytest.raises(PruneError, match=r"prune\.num_moe_experts=2, but LlamaForCausalLM has none"):
        check_target(shape(), PruneConfig(num_moe_experts=2))
    with pytest.raises(ModelError, match="num_moe_experts=4 does not go with LlamaForCausalLM"):
        shape(num_moe_experts=4)
    with pytest.raises(ModelError, match="num_moe_experts=None does not go with Qwen3MoeForCausalLM"):
        replace(MODEL, num_moe_experts=None)
    with pytest.raises(ModelError, match="moe_router_topk=7 must be between 1 and num_moe_experts=6"):
        replace(MODEL, moe_router_topk=7)
    with pytest.raises(ModelError, match="would get no gradient"):
        replace(MODEL, moe_router_topk=1)


def test_tensor_parallel_experts_need_sequence_parallelism() -> None:
    own = "distill.teacher.parallel"
    with pytest.raises(LayoutError, match=rf"{own}.tensor_model_parallel_size=2 needs {own}.sequence_parallel=true:"):
        check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=2), who="teacher", section=own)
    with pytest.raises(LayoutError, match=r"^student: a mixture of experts.*needs parallel.sequence_parallel=true"):
        check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=2), who="student")
    check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), who="student")
    with pytest.raises(LayoutError, match="ffn_hidden_size=10 does not divide"):
        check_layout(MODEL, ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True), who="student")


def test_parameters_by_hand() -> None:
    attention = 24 * (8 + 2 * 4) * 4 + 8 * 4 * 24 + 2 * 4  # qkv, output, norms of queries and keys
    expert = 3 * 24 * 10
    outside = 2 * 50 * 24 + 24
    assert num_parameters(MODEL) == 4 * (2 * 24 + attention + 6 * 24 + 6 * expert) + outside
    assert num_active_parameters(MODEL) == 4 * (2 * 24 + attention + 6 * 24 + 2 * expert) + outside


def test_kept_experts_are_those_of_highest_score_with_their_best_neurons() -> None:
    scores = random_scores(MODEL, Aggregation.l2_mean, 3)
    assert scores.expert is not None
    scores.expert[1] = [5, 1, 4, 2, 3, 0]
    ffn = scores.width[Aggregation.l2_mean].ffn
    ffn[1] = np.arange(60)[::-1]  # in every expert the first neurons are best
    ffn[1, :10] = np.arange(10)  # but in the first
    config = PruneConfig(num_layers=4, ffn_hidden_size=3, num_moe_experts=3)
    spec = choose(MODEL, config, scores=scores, source_id="random")
    assert spec.experts[1] == [0, 2, 4]
    assert spec.ffn[1] == [7, 8, 9, 20, 21, 22, 40, 41, 42]


def test_an_expert_without_tokens_scores_nothing() -> None:
    sums = np.array([[[6.0, 0.0], [3.0, 0.0]]])
    assert expert_scores(sums).tolist() == [[2.0, 0.0]]


def test_spec_and_scores_round_trip(tmp_path: Path) -> None:
    spec = pruned()
    spec.save(tmp_path / "spec.json")
    assert PruneSpec.load(tmp_path / "spec.json") == spec
    scores = random_scores(MODEL, Aggregation.l2_mean, 0)
    scores.save(tmp_path)
    again = Scores.load(tmp_path)
    assert again.expert is not None
    assert scores.expert is not None
    np.testing.assert_array_equal(again.expert, scores.expert)
    with pytest.raises(PruneError, match="those of the experts are missing"):
        replace(scores, expert=None).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [[0, 1, 2, 3]] * 2}, "experts has 2 lists for 3 kept layers"),
        ({"experts": [[0, 1, 2]] * 3}, "experts of layer 0 keeps 3 units, but the target has 4"),
        ({"ffn": [list(range(28))] * 3, "experts": [[0, 1, 2, 3]] * 3}, "expert 0 keeps 10 neurons, not 7"),
    ],
)
def test_specs_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    spec = replace(pruned(), layers=[0, 1, 2])
    with pytest.raises(PruneError, match=message):
        replace(spec, **changes).validate()  # type: ignore[arg-type]
