"""What each stage's result depends on, and which stages a verb runs."""

from pathlib import Path

import pytest

from minitron.cli.job import wanted_stages
from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run
from minitron.config.run import RunConfig
from minitron.pipeline import plan_stages
from minitron.runtime.artefact import RunFolder
from tests.helpers.line import LINE


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("Some text.\n" * 50)
    return ["experiment=tiny", f"runs_dir={tmp_path}", "data=files", f"data.paths=[{tmp_path / 'text.txt'}]"]


def _digests(config: RunConfig) -> dict[str, str]:
    planned = plan_stages(stages_of(config), config, RunFolder(Path(config.runs_dir) / "none"), LINE)
    return {item.stage.name: item.identity.digest for item in planned}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("parallel.pipeline_model_parallel_size=2", ""),
        ("device=cpu", ""),
        ("name=other", ""),
        ("distill.train.log_interval_steps=2", ""),
        ("distill.train.save_interval_steps=1", ""),
        ("distill.teacher_microbatches=1", ""),
        ("distill.teacher.micro_batch_size=1", ""),
        ("distill.teacher.dtype=bf16", "distill eval_distilled export report"),
        ("score.micro_batch_size=1", ""),
        ("eval.micro_batch_size=1", ""),
        ("data.num_workers=2", ""),
        ("tracking.tensorboard=true", ""),
        ("export.dtype=bf16", "export report"),
        (
            "prune.hidden_size=56",
            "prune eval_pruned distill eval_distilled baseline eval_baseline export report",
        ),
        ("distill.train.lr=2e-3", "distill eval_distilled baseline eval_baseline export report"),
        (
            "score.num_samples=8",
            "score prune eval_pruned distill eval_distilled baseline eval_baseline export report",
        ),
        ("source.random.seed=1", " ".join(LINE)),
        ("data.heldout_fraction=0.1", " ".join(stage for stage in LINE if stage != "import")),
    ],
)
def test_what_a_setting_changes(base: list[str], override: str, changed: str) -> None:
    before, after = _digests(compose_run(base)), _digests(compose_run([*base, override]))
    assert list(before) == LINE
    assert [stage for stage in LINE if before[stage] != after[stage]] == changed.split()


def test_content_of_the_text_counts_and_its_place_does_not(base: list[str], tmp_path: Path) -> None:
    config = compose_run(base)
    before = _digests(config)
    (tmp_path / "text.txt").write_text("Other text.\n" * 50)
    changed = [stage for stage in LINE if before[stage] != _digests(config)[stage]]
    assert changed == [stage for stage in LINE if stage != "import"]


def test_the_teachers_layout_does_not_count_and_its_content_does(base: list[str], tmp_path: Path) -> None:
    base = [*base, "parallel.tensor_model_parallel_size=2"]
    before = _digests(compose_run(base))
    assert _digests(compose_run([*base, "distill.teacher.parallel.tensor_model_parallel_size=1"])) == before
    for name, text in (("a", "{}"), ("b", "{}"), ("c", "{} ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(text)
    a, b, c = (_digests(compose_run([*base, f"distill.teacher.path={tmp_path / name}"])) for name in "abc")
    assert a == b
    for other in (before, c):
        changed = [stage for stage in LINE if a[stage] != other[stage]]
        assert changed == ["distill", "eval_distilled", "export", "report"]


def test_random_ranking_needs_no_scores(base: list[str]) -> None:
    needs = {stage.name: stage.needs for stage in stages_of(compose_run([*base, "prune.ranking=random"]))}
    assert needs["prune"] == ("import",)
    needs = {stage.name: stage.needs for stage in stages_of(compose_run(base))}
    assert needs["prune"] == ("import", "score")


def test_stages_of_each_verb(base: list[str]) -> None:
    config = compose_run(base)
    assert wanted_stages("compress", config) == LINE
    assert wanted_stages("train", config) == ["baseline"]
    for verb in ("import", "data", "score", "prune", "distill", "export", "report"):
        assert wanted_stages(verb, config) == [verb]
    assert wanted_stages("eval", config) == ["eval_teacher"]  # nothing else is done
    without = wanted_stages("compress", compose_run([*base, "baseline.enabled=false"]))
    assert without == [stage for stage in LINE if "baseline" not in stage]
