from pathlib import Path

import numpy as np
import pytest

from minitron.config.score import Aggregation
from minitron.errors import ArtefactError, NumericsError, PruneError
from minitron.prune.scores import ABOUT_FILE, Scores, random_scores
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
        for axis in ("ffn", "head", "hidden"):
            have = getattr(again.width[aggregation], axis)
            assert have.dtype == np.float64
            np.testing.assert_array_equal(have, getattr(width, axis))


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
