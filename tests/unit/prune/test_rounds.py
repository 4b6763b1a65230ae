"""Scoring in rounds, against cutting and scoring step by step."""

from pathlib import Path

import numpy as np
import pytest

from minitron.config.model import ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.prune import PruneConfig, check_target
from minitron.config.score import Aggregation, ScoreConfig
from minitron.prune.ranking import choose, choose_for
from minitron.prune.rounds import Survivors, score_in_rounds, shape_after
from minitron.prune.scores import Scores, random_scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from tests.helpers.pool import WorkerPool
from tests.unit.prune import workers
from tests.unit.prune.reference import canonical, llama, shape, tokens, write_checkpoint

MODEL = shape(vocab_size=48, num_layers=2)
TARGET = PruneConfig(hidden_size=12, ffn_hidden_size=10, num_attention_heads=2, num_query_groups=2)


def test_shapes_in_between_by_hand() -> None:
    target = shape(hidden_size=12, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=2)

    def sizes(model: ModelConfig) -> tuple[int, ...]:
        return model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.num_query_groups

    def after(done: int, multiple_of: int = 1) -> tuple[int, ...]:
        return sizes(shape_after(shape(), target, done=done, rounds=3, multiple_of=multiple_of))

    assert after(0) == sizes(shape())
    assert after(1) == (20, 16, 6, 3)  # 24 - 4, 20 - 4; 3 groups of 2 heads
    assert after(2) == (16, 12, 3, 3)  # 24 - 8, 20 - 8; 3 groups of 1 head
    assert after(3) == sizes(target)
    assert after(1, 2) == (20, 16, 8, 4)  # groups and neurons by twos
    assert after(2, 4) == (16, 12, 4, 4)


def test_rounds_keep_what_cutting_step_by_step_keeps(pool: WorkerPool, tmp_path: Path) -> None:
    tensors = canonical(llama(MODEL), MODEL)
    write_checkpoint(tmp_path / "0", {key: tensor.float() for key, tensor in tensors.items()}, MODEL)
    config = ScoreConfig(aggregations=[Aggregation.l2_mean, Aggregation.mean_l2])
    seen: list[Scores] = []
    specs: list[PruneSpec] = []

    def score(done: int) -> Scores:
        text = tokens(MODEL, batch=4, length=12)
        seen.append(pool.run(workers.score, 1, tmp_path / str(done), text, ParallelConfig(), config)[0])
        return seen[-1]

    def cut(done: int, scores: Scores, target: ModelConfig) -> PruneSpec:
        specs.append(choose_for(target, TARGET, scores=scores, source_id="w"))
        apply_spec(specs[-1], source=tmp_path / str(done - 1), out=tmp_path / str(done))
        return specs[-1]

    scores = score_in_rounds(MODEL, check_target(MODEL, TARGET), rounds=2, multiple_of=1, score=score, cut=cut)
    assert (specs[0].target.hidden_size, specs[0].target.ffn_hidden_size) == (18, 15)
    assert (specs[0].target.num_query_groups, specs[0].target.num_attention_heads) == (3, 6)

    at_once = choose(MODEL, TARGET, scores=scores, source_id="w")
    last = choose(specs[0].target, TARGET, scores=seen[1], source_id="w")
    assert at_once.hidden == [specs[0].hidden[unit] for unit in last.hidden]
    for layer in range(MODEL.num_layers):
        assert at_once.ffn[layer] == [specs[0].ffn[layer][unit] for unit in last.ffn[layer]]
        assert at_once.heads[layer] == [specs[0].heads[layer][unit] for unit in last.heads[layer]]
        assert at_once.groups[layer] == [specs[0].groups[layer][unit] for unit in last.groups[layer]]
    np.testing.assert_array_equal(scores.layer, seen[0].layer)  # depth is the whole model's
    one_shot = choose(MODEL, TARGET, scores=seen[0], source_id="w")
    assert at_once != one_shot, "the case tells rounds from one shot"


def test_units_that_are_gone_score_lowest() -> None:
    left = Survivors(hidden=[1, 3], ffn=[[0, 2]], heads=[[1]])
    source = shape(num_layers=1, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2, num_query_groups=2)
    small = shape(num_layers=1, hidden_size=2, ffn_hidden_size=2, num_attention_heads=1, num_query_groups=1)
    cut = random_scores(small, Aggregation.l2_mean, 0)
    whole = left.in_source(cut, source, "w").width[Aggregation.l2_mean]
    width = cut.width[Aggregation.l2_mean]
    assert whole.hidden[1].tolist() == [0, width.hidden[1, 0], 0, width.hidden[1, 1]]
    assert whole.final.tolist() == [0, width.final[0], 0, width.final[1]]
    assert whole.ffn[0].tolist() == [width.ffn[0, 0], 0, width.ffn[0, 1]]
    assert whole.head[0].tolist() == [0, width.head[0, 0]]


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_last_round_scores_before_the_last_cut(rounds: int) -> None:
    source, target = shape(num_layers=2), shape(num_layers=2, ffn_hidden_size=8)
    shapes: list[int] = []

    def score(done: int) -> Scores:
        now = shape_after(source, target, done=done, rounds=rounds, multiple_of=1)
        return random_scores(now, Aggregation.l2_mean, 0)

    def cut(_done: int, scores: Scores, target: ModelConfig) -> PruneSpec:
        shapes.append(target.ffn_hidden_size)
        return choose_for(target, PruneConfig(), scores=scores, source_id="w")

    scores = score_in_rounds(source, target, rounds=rounds, multiple_of=1, score=score, cut=cut)
    assert shapes == [17, 14, 11][: rounds - 1]  # 20 - 12 / 4, ...
    assert (scores.width[Aggregation.l2_mean].ffn > 0).sum(axis=1).tolist() == [[20] * 2, [11] * 2][rounds > 1]
