import pytest
from omegaconf import OmegaConf

from minitron.config.depth import DepthPlan, check_depth, depth_plan, depth_values
from minitron.config.model import Architecture
from minitron.config.prune import DepthSelection, HiddenNorm, PruneConfig, Ranking, check_target
from minitron.config.score import Aggregation, DepthMetric, DepthScoreConfig, HeadNorm, Reduction, ScoreConfig
from minitron.errors import ConfigError, PruneError
from tests.unit.prune.reference import shape


def test_aggregations_are_all_pairs() -> None:
    pairs = {(a.batch, a.seq) for a in Aggregation}
    assert pairs == {(b, s) for b in Reduction for s in Reduction}
    assert Aggregation.l2_mean.batch is Reduction.l2
    assert Aggregation.l2_mean.seq is Reduction.mean


def test_omegaconf_reads_both_sections() -> None:
    score = OmegaConf.merge(
        OmegaConf.structured(ScoreConfig),
        {"aggregations": ["l2_mean", "mean_mean"], "head_norm": "channel"},
    )
    assert OmegaConf.to_object(score) == ScoreConfig(
        aggregations=[Aggregation.l2_mean, Aggregation.mean_mean], head_norm=HeadNorm.channel
    )
    prune = OmegaConf.merge(OmegaConf.structured(PruneConfig), {"drop_layers": [1], "ranking": "random"})
    assert OmegaConf.to_object(prune) == PruneConfig(drop_layers=[1], ranking=Ranking.random)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ScoreConfig, {"num_samples": 0}, "score.num_samples=0 must be at least 1"),
        (ScoreConfig, {"aggregations": []}, "saves no scores"),
        (ScoreConfig, {"aggregations": [Aggregation.l2_l2] * 2}, "names one twice"),
        (ScoreConfig, {"seq_length": 0}, "score.seq_length=0 must be at least 1"),
        (ScoreConfig, {"rounds": 0}, "score.rounds=0 must be at least 1"),
        (DepthScoreConfig, {"num_samples": 0}, "score.depth.num_samples=0 must be at least 1"),
        (DepthScoreConfig, {"blocks": [2, 0]}, r"score.depth.blocks=\[2, 0\] must be numbers of layers"),
        (DepthScoreConfig, {"metrics": [DepthMetric.loss] * 2}, r"metrics=\[loss, loss\] names one twice"),
        (PruneConfig, {"hidden_norms": []}, "must name at least one norm"),
        (PruneConfig, {"hidden_norms": [HiddenNorm.final] * 2}, "each once"),
        (PruneConfig, {"ranking": Ranking.random, "scores": "x"}, "random reads no scores; leave prune.scores=x out"),
        (PruneConfig, {"hidden_size": 0}, "prune.hidden_size=0 must be at least 1"),
        (PruneConfig, {"drop_layers": [-1]}, "count layers from 0"),
        (PruneConfig, {"drop_layers": [2, 2]}, "names a layer twice"),
    ],
)
def test_bad_values(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**values)


def test_only_llama_ties_channels_to_heads() -> None:
    model = shape(architecture=Architecture.mistral)
    assert check_target(model, PruneConfig(hidden_size=15)).hidden_size == 15


def test_target_keeps_the_rest() -> None:
    model = shape()
    assert check_target(model, PruneConfig()) == model
    target = check_target(model, PruneConfig(hidden_size=8, drop_layers=[0, 2]))
    assert target == shape(hidden_size=8, num_layers=2)
    assert target.kv_channels == model.kv_channels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ffn_hidden_size": 21}, "prune.ffn_hidden_size=21 is larger than the model's 20"),
        ({"num_query_groups": 5}, "prune.num_query_groups=5 is larger than the model's 4"),
        ({"num_attention_heads": 6}, r"6 / 4 leaves 2\); use a multiple of 4"),
        ({"num_query_groups": 2}, "is 4 heads per group, but the model has 8 / 4 = 2"),
        ({"num_query_groups": 2}, "at most 2 x 2 = 4"),
        ({"hidden_size": 15}, r"15 / 8 leaves 7\), which transformers' LlamaConfig.* to 8 or 16"),
        ({"drop_layers": [3, 4]}, r"names \[4\].*numbered 0 to 3"),
        ({"drop_layers": [0, 1, 2, 3]}, "drops all 4 layers"),
        ({"drop_layers": [0], "num_layers": 2}, "contradicts.* 4 - 1 = 3 layers"),
    ],
)
def test_targets_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        check_target(shape(), PruneConfig(**values))  # type: ignore[arg-type]


BI, LOSS, MSE = DepthMetric.block_importance, DepthMetric.loss, DepthMetric.logit_mse
FREE, BLOCK, GREEDY = DepthSelection.free, DepthSelection.contiguous, DepthSelection.iterative


@pytest.mark.parametrize(
    ("depth", "metric", "selection", "num_layers", "want"),
    [
        ({}, BI, FREE, None, DepthPlan()),
        ({}, BI, FREE, 20, DepthPlan()),  # the calibration pass has it
        ({}, LOSS, FREE, None, DepthPlan()),  # nothing is cut
        ({}, LOSS, FREE, 30, DepthPlan()),
        ({}, LOSS, FREE, 20, DepthPlan((LOSS,), (1,))),
        ({}, LOSS, BLOCK, 20, DepthPlan((LOSS,), (1, 10))),
        ({}, BI, BLOCK, 20, DepthPlan((BI,), (10,))),
        ({}, MSE, GREEDY, 24, DepthPlan(greedy=MSE, num_greedy=6)),
        ({"metrics": [MSE]}, LOSS, GREEDY, 24, DepthPlan((MSE,), (1,), LOSS, 6)),
        ({"metrics": [MSE, LOSS]}, LOSS, FREE, 24, DepthPlan((MSE, LOSS), (1,))),
        ({"metrics": [LOSS], "blocks": [4, 2]}, BI, FREE, 24, DepthPlan((LOSS, BI), (1, 2, 4))),
        ({"blocks": [4]}, BI, FREE, None, DepthPlan((BI,), (4,))),
    ],
)
def test_what_is_measured_is_what_is_named_and_what_pruning_needs(
    depth: dict[str, object],
    metric: DepthMetric,
    selection: DepthSelection,
    num_layers: int | None,
    want: DepthPlan,
) -> None:
    score = ScoreConfig(depth=DepthScoreConfig(**depth))  # type: ignore[arg-type]
    prune = PruneConfig(num_layers=num_layers, depth_metric=metric, depth_selection=selection)
    assert depth_plan(score, prune, 30) == want


def test_a_block_leaves_a_layer() -> None:
    score = ScoreConfig(depth=DepthScoreConfig(blocks=[4, 30]))
    with pytest.raises(ConfigError, match="blocks names 30 layers, but the model has 30; name at most 29"):
        depth_plan(score, PruneConfig(), 30)
    assert depth_plan(score, PruneConfig(), 31).sizes == (4, 30)


def test_only_what_decides_the_measurement_is_in_its_identity() -> None:
    score = ScoreConfig()

    def values(**changes: object) -> dict[str, object]:
        return depth_values(score, PruneConfig(**changes))  # type: ignore[arg-type]

    assert values(depth_metric=LOSS) == {}
    assert values(depth_metric=LOSS, drop_layers=[1]) == {}
    assert values(num_layers=3) == {}
    assert values(num_layers=3, depth_metric=LOSS) == values(num_layers=2, depth_metric=LOSS) != {}
    contiguous = [values(num_layers=n, depth_metric=LOSS, depth_selection=BLOCK) for n in (2, 3)]
    assert contiguous[0] != contiguous[1]
    assert values(num_layers=3, depth_metric=LOSS, scores="elsewhere") == {}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"accuracy needs questions; set score.depth.questions"):
        check_depth(ScoreConfig(), PruneConfig(num_layers=3, depth_metric=DepthMetric.accuracy))
    check_depth(ScoreConfig(), PruneConfig(depth_metric=DepthMetric.accuracy))  # nothing is cut
    with pytest.raises(ConfigError, match=r"aggregation=l2_var is not among score.aggregations=\[l2_mean\]"):
        check_depth(ScoreConfig(), PruneConfig(aggregation=Aggregation.l2_var))
    check_depth(ScoreConfig(), PruneConfig(aggregation=Aggregation.l2_var, scores="elsewhere"))
    with pytest.raises(ConfigError, match=r"score.rounds=2 cuts by importance, but prune.ranking=random"):
        check_depth(ScoreConfig(rounds=2), PruneConfig(ranking=Ranking.random))
