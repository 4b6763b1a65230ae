import numpy as np
import pytest

from minitron.config.prune import PruneConfig, Ranking
from minitron.config.score import Aggregation, HeadNorm
from minitron.errors import PruneError
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


def test_depth_by_hand() -> None:
    scores = np.array([0.9, 0.1, 0.3, 0.1, 0.8])
    assert kept_layers(scores, 3, None) == [0, 2, 4]
    assert kept_layers(scores, 4, None) == [0, 1, 2, 4]  # 1 and 3 tie: the lower one stays
    assert kept_layers(scores, 3, [0, 4]) == [1, 2, 3]


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
