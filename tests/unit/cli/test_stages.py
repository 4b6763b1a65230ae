"""What each stage's result depends on, and which stages a verb runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from minitron.cli.job import wanted_stages
from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run
from minitron.config.run import RunConfig
from minitron.config.teacher_logits import TeacherLogitsConfig
from minitron.distill.cache_format import CacheIdentity, write_identity
from minitron.errors import ArtefactError
from minitron.pipeline import plan_stages
from minitron.runtime.artefact import RunFolder
from tests.helpers.line import LINE


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("Some text.\n" * 50)
    return ["experiment=tiny", f"runs_dir={tmp_path}", "data=files", f"data.paths=[{tmp_path / 'text.txt'}]"]


def _digests(config: RunConfig, wanted: list[str] = LINE) -> dict[str, str]:
    planned = plan_stages(stages_of(config), config, RunFolder(Path(config.runs_dir) / "none"), wanted)
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


CACHED = [*LINE[: LINE.index("distill")], "teacher_logits", *LINE[LINE.index("distill") :]]
AFTER_CACHE = ["teacher_logits", "distill", "eval_distilled", "export", "report"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("teacher_logits.micro_batch_size=1", ""),
        ("teacher_logits.shard_mb=1", ""),
        ("teacher_logits.top_k=8", ""),  # not read by the default method
        ("teacher_logits.num_draws=8", "teacher_logits"),
        ("teacher_logits.method=top_p", "teacher_logits"),
        ("distill.teacher.dtype=bf16", "teacher_logits"),
    ],
)
def test_what_a_setting_changes_with_a_cache(base: list[str], override: str, changed: str) -> None:
    base = [*base, "distill.teacher.source=cached"]
    before, after = (_digests(compose_run([*base, *more]), CACHED) for more in ([], [override]))
    assert list(before) == CACHED
    assert [stage for stage in CACHED if before[stage] != after[stage]] == (AFTER_CACHE if changed else [])


def test_a_cache_does_not_depend_on_what_reads_it(base: list[str]) -> None:
    """Not on the seed, the student or the length of the run: which samples it has is looked up."""
    base = [*base, "distill.teacher.source=cached"]
    other = ["seed=7", "distill.train.num_tokens=2560", "distill.train.global_batch_size=4", "prune.hidden_size=56"]
    before, after = (_digests(compose_run([*base, *more]), CACHED)["teacher_logits"] for more in ([], other))
    assert before == after


def test_a_cache_of_another_run_counts_by_what_it_belongs_to(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    identity = CacheIdentity("d", 32, 257, "t", "fp32", TeacherLogitsConfig().parameters())
    config = compose_run([*base, "distill.teacher.source=cached", f"distill.teacher.cache={tmp_path / 'a'}"])
    with pytest.raises(ArtefactError, match=r"cache.json does not exist, so .*/a is no cache; run `minitron teacher-"):
        _digests(config)
    write_identity(tmp_path / "a", identity)
    before = _digests(config)
    assert list(before) == LINE  # nothing to write
    (tmp_path / "a").rename(tmp_path / "b")
    config.distill.teacher.cache = str(tmp_path / "b")
    assert _digests(config) == before
    write_identity(tmp_path / "b", replace(identity, dataset="e"))
    assert _digests(config)["distill"] != before["distill"]


def test_content_of_the_text_counts_and_its_place_does_not(base: list[str], tmp_path: Path) -> None:
    config = compose_run(base)
    before = _digests(config)
    (tmp_path / "text.txt").write_text("Other text.\n" * 50)
    changed = [stage for stage in LINE if before[stage] != _digests(config)[stage]]
    assert changed == [stage for stage in LINE if stage != "import"]


def test_random_ranking_needs_no_scores(base: list[str]) -> None:
    needs = {stage.name: stage.needs for stage in stages_of(compose_run([*base, "prune.ranking=random"]))}
    assert needs["prune"] == ("import",)
    needs = {stage.name: stage.needs for stage in stages_of(compose_run(base))}
    assert needs["prune"] == ("import", "score")


def test_stages_of_each_verb(base: list[str]) -> None:
    config = compose_run(base)
    assert wanted_stages("compress", config) == LINE
    assert wanted_stages("train", config) == ["baseline"]
    assert wanted_stages("teacher-logits", config) == ["teacher_logits"]
    assert wanted_stages("compress", compose_run([*base, "distill.teacher.source=cached"])) == CACHED
    for verb in ("import", "data", "score", "prune", "distill", "export", "report"):
        assert wanted_stages(verb, config) == [verb]
    assert wanted_stages("eval", config) == ["eval_teacher"]  # nothing else is done
    without = wanted_stages("compress", compose_run([*base, "baseline.enabled=false"]))
    assert without == [stage for stage in LINE if "baseline" not in stage]
