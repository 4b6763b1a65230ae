import pytest

from minitron.config.compose import compose_run
from minitron.config.search import HalvingConfig, candidate_training, rung_steps
from minitron.config.train import TrainConfig
from minitron.errors import ConfigError, MinitronError

TINY = ["experiment=tiny", "search.grid.hidden_size=[48,56]"]


@pytest.mark.parametrize(
    ("steps", "rungs", "factor", "expected"),
    [(400, 1, 2, [400]), (400, 2, 4, [100, 400]), (5, 2, 2, [3, 5]), (4, 3, 2, [1, 2, 4])],
)
def test_rungs(steps: int, rungs: int, factor: int, expected: list[int]) -> None:
    assert rung_steps(steps, HalvingConfig(rungs=rungs, factor=factor)) == expected


def test_candidates_train_for_the_papers_steps_and_are_compared_at_three_quarters() -> None:
    run = compose_run([*TINY, "search.lr_warmup_steps=7"])
    train = candidate_training(run.distill.train, run.search, seq_length=32)
    assert train.num_tokens == 400 * 8 * 32
    assert (train.num_steps(32), train.eval_interval_steps, train.lr_warmup_steps) == (400, 100, 7)
    assert (train.lr, train.eval_tokens) == (run.distill.train.lr, 16_384)


def test_warm_up_is_the_runs_own_unless_it_is_given() -> None:
    run = compose_run([*TINY, "search.num_tokens=2560", "search.eval_tokens=64"])
    before = TrainConfig(lr_warmup_tokens=512)
    assert candidate_training(before, run.search, seq_length=32).lr_warmup_tokens == 512
    run.search.lr_warmup_steps = 0
    train = candidate_training(before, run.search, seq_length=32)
    assert (train.lr_warmup_tokens, train.lr_warmup_steps, train.num_tokens) == (0, 0, 2560)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.grid.hidden_size=[48,0]"], r"hidden_size=\[48, 0\] must have numbers above 0 only"),
        (["search.grid.num_layers=[3,3]"], "names a size twice"),
        (["search.grid.ffn_factor=[2]", "search.grid.ffn_hidden_size=[96]"], "both ffn_hidden_size and ffn_factor"),
        (["search.budget.parameters.min=2", "search.budget.parameters.max=1"], r"min=2.0 and max=1.0 leave nothing"),
        (["search.budget.memory_gb.min=-1"], "leave nothing"),
        (["search.divisors.per_rank=0"], "search.divisors.per_rank=0 must be at least 1"),
        (["search.filter='hiden_size > 3'"], "names hiden_size; it may name num_layers, hidden_size, .*latency_ms"),
        (["search.halving.factor=1"], "search.halving.factor=1 must be at least 2"),
        (["search.halving.rungs=0"], "search.halving.rungs=0 must be at least 1"),
        (["search.halving.rungs=9", "search.num_tokens=1024"], r"4 steps cannot be divided by 2 for 9 rungs"),
        (["search.num_tokens=256"], "search: warm-up of 2 steps is not shorter than the run of 1 steps"),
        (["search.eval_tokens=16"], "search.eval_tokens=16 is less than one sequence of data.seq_length=32"),
        (["search.workers=0"], "search.workers=0 must be at least 1"),
        (["search.distill_best=0"], "search.distill_best=0 must be at least 1"),
        (["search.serving.batch_size=0"], "search.serving.batch_size=0 must be at least 1"),
        (["search.latency.gpu=a100", "search.serving.dtype=fp8"], "a100 has no fp8"),
        (["search.latency.source=measured", "search.serving.tensor_model_parallel_size=2"], "runs on one device"),
        (["search.grid.num_layers=[2]", "prune.drop_layers=[1]", "prune.num_layers=null"], "contradicts prune.drop_l"),
        (["chain=[{name: a, prune: {hidden_size: 48}}]"], "compares shapes of one step"),
        (["search.grid.hiden_size=[4]"], "no key search.grid.hiden_size; did you mean search.grid.hidden_size"),
    ],
)
def test_one_line_for_each_mistake(overrides: list[str], message: str) -> None:
    with pytest.raises(MinitronError, match=message) as caught:
        compose_run([*TINY, *overrides])
    assert "\n" not in str(caught.value)


def test_other_verbs_do_not_mind_a_search_that_is_not_asked_for() -> None:
    """Its default of 400 steps, or a warm-up longer than it, matters to `minitron search` only."""
    compose_run(["experiment=tiny", "search.num_tokens=256"])
    with pytest.raises(ConfigError):
        compose_run([*TINY, "search.num_tokens=256"])
