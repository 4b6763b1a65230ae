import pytest
from omegaconf import OmegaConf

from minitron.config.model import Architecture
from minitron.config.prune import PruneConfig, Ranking, check_target
from minitron.config.score import Aggregation, HeadNorm, Reduction, ScoreConfig
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
