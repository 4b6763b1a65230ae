from pathlib import Path

import numpy as np
import pytest

from minitron.config.prune import HiddenNorm
from minitron.config.score import Aggregation, DepthMetric
from minitron.errors import ArtefactError, NumericsError, PruneError
from minitron.prune.depth_scores import DepthScores, GreedyRemoval
from minitron.prune.scores import ABOUT_FILE, WIDTH_AXES, Scores, random_scores, scores_fingerprint
from tests.unit.prune.reference import shape


def two_aggregations() -> Scores:
    scores = random_scores(shape(), Aggregation.l2_mean, 0)
    other = random_scores(shape(), Aggregation.mean_var, 1)
    scores.width[Aggregation.mean_var] = other.width[Aggregation.mean_var]
    return scores


def test_round_trip(tmp_path: Path) -> None:
    scores = two_aggregations()
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert again.model == scores.model
    assert list(again.width) == list(scores.width)
    np.testing.assert_array_equal(again.layer, scores.layer)
    for aggregation, width in scores.width.items():
        for axis in WIDTH_AXES:
            have = getattr(again.width[aggregation], axis)
            assert have.dtype == np.float64
            np.testing.assert_array_equal(have, getattr(width, axis))


def with_depth() -> Scores:
    scores = two_aggregations()
    scores.depth = DepthScores(
        blocks={(DepthMetric.loss, 1): np.array([4.0, 3.0, 2.0, 5.0]), (DepthMetric.logit_mse, 2): np.ones(3)},
        greedy=GreedyRemoval(metric=DepthMetric.loss, layers=[2, 0], values=np.array([2.0, 2.5])),
        whole_loss=1.5,
    )
    return scores


def test_depth_makes_the_round_trip(tmp_path: Path) -> None:
    with_depth().save(tmp_path)
    again = Scores.load(tmp_path).depth
    assert again.whole_loss == 1.5
    assert again.greedy is not None
    assert (again.greedy.metric, again.greedy.layers) == (DepthMetric.loss, [2, 0])
    assert again.greedy.values.tolist() == [2.0, 2.5]
    assert {key: values.tolist() for key, values in again.blocks.items()} == {
        (DepthMetric.loss, 1): [4.0, 3.0, 2.0, 5.0],
        (DepthMetric.logit_mse, 2): [1.0, 1.0, 1.0],
    }


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    scores = with_depth()
    assert scores.blocks(DepthMetric.block_importance, 1) is scores.layer
    with pytest.raises(PruneError, match=r"loss of blocks of 2 layers.*\(loss of 1, logit_mse of 2\).*depth.blocks"):
        scores.blocks(DepthMetric.loss, 2)
    with pytest.raises(PruneError, match=r"needs 3 layers removed one after the other by loss.*have 2 by loss"):
        scores.depth.first_removed(DepthMetric.loss, 3)
    with pytest.raises(PruneError, match="have none"):
        two_aggregations().depth.first_removed(DepthMetric.loss, 1)
    scores.depth.blocks[DepthMetric.loss, 1] = np.ones(3)
    with pytest.raises(PruneError, match=r"depth.block.loss.1 has shape \(3,\), but the model needs \(4,\)"):
        scores.save(tmp_path)


def test_channels_are_summed_over_the_norms_named() -> None:
    scores = two_aggregations()
    width = scores.width[Aggregation.mean_var]
    for norms, want in (
        ([HiddenNorm.input], width.hidden[0::2].sum(0)),
        ([HiddenNorm.pre_mlp], width.hidden[1::2].sum(0)),
        ([HiddenNorm.pre_mlp, HiddenNorm.input], width.hidden.sum(0)),
        ([HiddenNorm.final], width.final),
        ([HiddenNorm.final, HiddenNorm.input], width.hidden[0::2].sum(0) + width.final),
    ):
        np.testing.assert_allclose(scores.channels(Aggregation.mean_var, norms), want, rtol=1e-14)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    with_depth().save(tmp_path / "a")
    with_depth().save(tmp_path / "b")
    two_aggregations().save(tmp_path / "c")
    one, same, other = (scores_fingerprint(tmp_path / name) for name in "abc")
    assert one == same != other
    with pytest.raises(ArtefactError, match=r"holds no scores .No such file"):
        scores_fingerprint(tmp_path)


def test_files_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in "ab":
        two_aggregations().save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    scores = two_aggregations()
    scores.layer = scores.layer[:-1]
    with pytest.raises(PruneError, match=r"layer has shape \(3,\), but the model needs \(4,\)"):
        scores.save(tmp_path)
    scores = two_aggregations()
    scores.width[Aggregation.l2_mean].ffn[0, 3] = np.nan
    with pytest.raises(NumericsError, match=r"1 of 80 values of l2_mean\.ffn are not finite"):
        scores.validate()


def test_unreadable_scores(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="holds no readable scores"):
        Scores.load(tmp_path)
    two_aggregations().save(tmp_path)
    (tmp_path / ABOUT_FILE).write_text("{}")
    with pytest.raises(ArtefactError, match="KeyError: 'model'"):
        Scores.load(tmp_path)
