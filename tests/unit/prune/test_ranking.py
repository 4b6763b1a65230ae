import numpy as np
import pytest

from minitron.config.prune import DepthSelection, HiddenNorm, PruneConfig, Ranking
from minitron.config.score import Aggregation, DepthMetric, HeadNorm
from minitron.errors import PruneError
from minitron.prune.depth_scores import DepthScores, GreedyRemoval
from minitron.prune.ranking import choose, kept_heads, kept_layers, top_units
from minitron.prune.scores import Scores, WidthScores, random_scores
from tests.unit.prune.reference import shape


def hand_scores() -> Scores:
    """One layer is easy to follow: 2 layers, 4 channels, 3 neurons, 4 heads in 2 groups."""
    return Scores(
        model=shape(num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=4, num_query_groups=2),
        source_id="w",
        num_samples=1,
        seq_length=1,
        head_norm=HeadNorm.token,
        width={
            Aggregation.l2_mean: WidthScores(
                ffn=np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]),
                head=np.array([[1.0, 2.0, 9.0, 8.0], [5.0, 5.0, 0.0, 6.0]]),
                hidden=np.array([[9.0, 0, 0, 1], [0, 4.0, 0, 1], [0, 4.0, 7.0, 1], [0, 2.0, 0, 1]]),
                final=np.array([0.0, 0.0, 0.0, 9.0]),
            )
        },
        layer=np.array([0.2, 0.1]),
    )


def test_ties_go_to_the_lower_number_and_order_is_kept() -> None:
    assert top_units(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3) == [1, 2, 3]
    assert top_units(np.zeros(5), 2) == [0, 1]


def test_width_by_hand() -> None:
    scores = hand_scores()
    config = PruneConfig(hidden_size=2, ffn_hidden_size=2, num_attention_heads=2)
    spec = choose(scores.model, config, scores=scores, source_id="w")
    assert spec.hidden == [0, 1]  # sums over the four norms: 9, 10, 7, 4
    assert spec.ffn == [[0, 2], [0, 1]]
    assert spec.heads == [[1, 2], [0, 3]]  # the best of each group, though layer 0's best two share one
    assert spec.groups == [[0, 1], [0, 1]]


def test_groups_are_ranked_by_the_norm_of_their_heads() -> None:
    source = shape(num_attention_heads=6, num_query_groups=3)
    target = shape(num_attention_heads=2, num_query_groups=2)
    scores = np.array([3.0, 3.0, 0.0, 4.0, 4.1, 0.0])  # norms 4.24, 4.0, 4.1
    assert kept_heads(scores, source, target) == ([0, 4], [0, 2])


def test_the_norms_that_score_channels_are_a_choice() -> None:
    scores = hand_scores()

    def kept(*norms: HiddenNorm) -> list[int]:
        config = PruneConfig(hidden_size=2, num_attention_heads=2, hidden_norms=list(norms))
        return choose(scores.model, config, scores=scores, source_id="w").hidden

    assert kept(HiddenNorm.input) == [0, 2]  # 9, 4, 7, 2
    assert kept(HiddenNorm.pre_mlp) == [1, 3]  # 0, 6, 0, 2
    assert kept(HiddenNorm.input, HiddenNorm.pre_mlp, HiddenNorm.final) == [1, 3]  # 9, 10, 7, 13


def deep_scores() -> Scores:
    scores = random_scores(shape(num_layers=5), Aggregation.l2_mean, 0)
    scores.layer = np.array([0.9, 0.1, 0.3, 0.1, 0.8])
    scores.depth = DepthScores(
        blocks={
            (DepthMetric.loss, 1): np.array([9.0, 3.0, 2.0, 5.0, 4.0]),
            (DepthMetric.loss, 2): np.array([9.0, 3.5, 6.0, 3.5]),
            (DepthMetric.block_importance, 3): np.array([0.9, 0.3, 0.2]),
        },
        greedy=GreedyRemoval(metric=DepthMetric.logit_mse, layers=[3, 0, 2], values=np.array([1.0, 2.0, 5.0])),
    )
    return scores


@pytest.mark.parametrize(
    ("metric", "selection", "count", "want"),
    [
        ("block_importance", "free", 3, [0, 2, 4]),
        ("block_importance", "free", 4, [0, 1, 2, 4]),  # 1 and 3 tie: the lower one stays
        ("block_importance", "contiguous", 4, [0, 1, 2, 4]),
        ("block_importance", "contiguous", 2, [0, 1]),
        ("loss", "free", 3, [0, 3, 4]),
        ("loss", "free", 5, [0, 1, 2, 3, 4]),
        ("loss", "contiguous", 3, [0, 1, 2]),  # the blocks at 1 and 3 tie: the lower one stays
        ("logit_mse", "iterative", 4, [0, 1, 2, 4]),
        ("logit_mse", "iterative", 3, [1, 2, 4]),
        ("logit_mse", "iterative", 2, [1, 4]),
    ],
)
def test_depth_by_hand(metric: str, selection: str, count: int, want: list[int]) -> None:
    config = PruneConfig(depth_metric=DepthMetric(metric), depth_selection=DepthSelection(selection))
    assert kept_layers(deep_scores(), count, config) == want


def test_named_layers_need_no_metric() -> None:
    config = PruneConfig(drop_layers=[0, 4], depth_metric=DepthMetric.accuracy)
    assert kept_layers(deep_scores(), 3, config) == [1, 2, 3]


def test_a_random_block_is_contiguous() -> None:
    found = set()
    for seed in range(20):
        config = PruneConfig(num_layers=2, ranking=Ranking.random, seed=seed, depth_selection=DepthSelection.contiguous)
        layers = choose(shape(num_layers=5), config, scores=None, source_id="w").layers
        gone = sorted(set(range(5)) - set(layers))
        assert gone == list(range(gone[0], gone[0] + 3))
        found.add(gone[0])
    assert found == {0, 1, 2}


def test_per_layer_choices_follow_the_kept_layers() -> None:
    scores = hand_scores()
    config = PruneConfig(drop_layers=[0], ffn_hidden_size=1, num_attention_heads=2)
    spec = choose(scores.model, config, scores=scores, source_id="w")
    assert (spec.layers, spec.ffn, spec.heads) == ([1], [[0]], [[0, 3]])


def test_random_ranking_is_seeded_and_needs_no_scores() -> None:
    config = PruneConfig(ranking=Ranking.random, ffn_hidden_size=10, num_layers=2, seed=3)
    first = choose(shape(), config, scores=None, source_id="w")
    assert first == choose(shape(), config, scores=None, source_id="w")
    config.seed = 4
    assert first != choose(shape(), config, scores=None, source_id="w")


def test_scores_must_be_of_the_source() -> None:
    scores = hand_scores()
    with pytest.raises(PruneError, match=r"of other weights \(w\) than the source \(v\)"):
        choose(scores.model, PruneConfig(), scores=scores, source_id="v")
    other = shape(num_layers=2, hidden_size=4, ffn_hidden_size=5, num_attention_heads=4)
    with pytest.raises(PruneError, match="ffn_hidden_size 3 != 5"):
        choose(other, PruneConfig(), scores=scores, source_id="w")
    with pytest.raises(PruneError, match="needs scores, and there are none"):
        choose(scores.model, PruneConfig(), scores=None, source_id="w")
    with pytest.raises(PruneError, match=r"l2_var is not among the saved scores \(l2_mean\)"):
        choose(scores.model, PruneConfig(aggregation=Aggregation.l2_var), scores=scores, source_id="w")


def test_random_scores_have_the_models_shape() -> None:
    random_scores(shape(), Aggregation.l2_mean, 0).validate()
