"""What each stage's result depends on, and which stages a verb runs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.cli.job import check_models, source_model, wanted_stages
from minitron.cli.stages import random_ranking, stages_of
from minitron.config.compose import compose_run
from minitron.config.prune import PruneConfig, Ranking
from minitron.config.run import RunConfig
from minitron.config.score import Aggregation
from minitron.config.teacher_logits import CacheMethod, TeacherLogitsConfig
from minitron.data.summary import DatasetSummary, SplitSummary, save_summary
from minitron.distill.cache_format import CacheIdentity, write_identity
from minitron.errors import ArtefactError, ConfigError, DataError
from minitron.models.random_source import random_model
from minitron.pipeline import Planned, plan_stages
from minitron.prune.ranking import choose
from minitron.prune.scores import random_scores
from minitron.runtime.artefact import RunFolder
from tests.helpers.line import LINE

AFTER_PRUNE = "prune verify eval_pruned distill eval_distilled baseline eval_baseline export report"
AFTER_SCORE = f"score {AFTER_PRUNE}"


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
        ("distill.teacher.micro_batch_size=1", ""),
        ("distill.teacher.dtype=bf16", "distill eval_distilled export report"),
        ("distill.teacher.dtype=fp32", ""),  # what null takes
        ("precision.fp8_recipe=mxfp8", ""),  # there is no FP8
        (
            "precision.dtype=bf16",
            "eval_teacher score prune verify eval_pruned distill eval_distilled baseline eval_baseline export report",
        ),
        ("distill.cross_entropy.mixing=scaled", ""),  # nothing is mixed in
        ("distill.cross_entropy.weight=0.5", "distill eval_distilled export report"),
        ("distill.intermediate.loss=mse", ""),  # no pair
        ("distill.intermediate.weight=2", ""),
        ("distill.intermediate.mixing=fixed", ""),
        ("distill.intermediate.relation_heads=4", ""),
        ("distill.intermediate.embedding=true", "distill eval_distilled export report"),
        ("score.micro_batch_size=1", ""),
        ("score.depth.num_samples=8", ""),  # nothing is measured by taking layers out
        ("score.depth.questions=nowhere", ""),
        ("score.depth.metrics=[loss]", AFTER_SCORE),
        ("score.seq_length=16", AFTER_SCORE),
        ("score.ffn_activation=before", AFTER_SCORE),
        ("score.rounds=2", AFTER_SCORE),
        ("prune.depth_metric=loss", AFTER_SCORE),  # so it must be measured
        ("prune.depth_selection=contiguous", AFTER_SCORE),
        ("prune.hidden_norms=[input]", AFTER_SCORE.removeprefix("score ")),
        ("eval.micro_batch_size=1", ""),
        ("prune.reconstruct.micro_batch_size=1", ""),
        ("prune.reconstruct.num_samples=8", AFTER_PRUNE),
        ("prune.reconstruct.damping=0.2", AFTER_PRUNE),
        ("prune.reconstruct.modules=[linear_fc2]", AFTER_PRUNE),
        ("prune.reconstruct.enabled=false", AFTER_PRUNE),
        ("data.num_workers=2", ""),
        ("tracking.tensorboard=true", ""),
        ("plan.gpu=a100", ""),
        ("preflight.message_mb=1", ""),
        ("model=llama31_8b", ""),
        ("correction.lr_warmup_steps=1", ""),  # there is no correction
        ("source.random.architecture=mistral", " ".join(LINE)),
        ("export.dtype=bf16", "export report"),
        ("prune.hidden_size=56", AFTER_PRUNE),
        ("distill.train.lr=2e-3", "distill eval_distilled baseline eval_baseline export report"),
        ("score.num_samples=8", AFTER_SCORE),
        ("source.random.seed=1", " ".join(LINE)),
        ("data.seq_length=16", " ".join(stage for stage in LINE if stage not in ("import", "data"))),
        ("data.heldout_fraction=0.1", " ".join(stage for stage in LINE if stage != "import")),
    ],
)
def test_what_a_setting_changes(base: list[str], override: str, changed: str) -> None:
    before, after = _digests(compose_run(base)), _digests(compose_run([*base, override]))
    assert list(before) == LINE
    assert [stage for stage in LINE if before[stage] != after[stage]] == changed.split()


def test_warm_up_of_the_correction_counts_for_what_learns_from_it(base: list[str]) -> None:
    config = compose_run([*base, "correction.enabled=true"])
    wanted = ["correct", *LINE]
    before = _digests(config, wanted)
    after = _digests(compose_run([*base, "correction.enabled=true", "correction.lr_warmup_steps=1"]), wanted)
    changed = {stage for stage in wanted if before[stage] != after[stage]}
    assert changed == {"correct", "distill", "eval_distilled", "export", "report"}


@pytest.mark.parametrize(
    ("given", "override", "counts"),
    [
        ("distill.cross_entropy.weight=0.5", "distill.cross_entropy.mixing=scaled", True),
        ("distill.intermediate.embedding=true", "distill.intermediate.loss=mse", True),
        ("distill.intermediate.embedding=true", "distill.intermediate.weight=2", True),
        ("distill.intermediate.embedding=true", "distill.intermediate.relation_heads=4", False),
        ("distill.intermediate.attention_relations=[last]", "distill.intermediate.relation_heads=4", True),
        ("precision.dtype=bf16", "distill.teacher.dtype=fp32", True),
        ("precision.dtype=bf16", "distill.teacher.dtype=bf16", False),
        ("precision.dtype=bf16", "distill.teacher.fp8_recipe=tensorwise", True),
    ],
)
def test_settings_of_a_loss_count_where_it_is_used(base: list[str], given: str, override: str, counts: bool) -> None:
    before, after = (_digests(compose_run([*base, given, *more])) for more in ([], [override]))
    changed = [stage for stage in LINE if before[stage] != after[stage]]
    assert changed == (["distill", "eval_distilled", "export", "report"] if counts else [])


def test_the_target_counts_for_scores_that_are_made_for_it(base: list[str]) -> None:
    def changed(*overrides: str) -> list[str]:
        before, after = (_digests(compose_run([*base, *overrides, f"prune.num_layers={n}"])) for n in (3, 2))
        return [stage for stage in LINE if before[stage] != after[stage]]

    assert changed() == changed("prune.depth_metric=loss") == AFTER_SCORE.split()[1:]
    assert changed("score.rounds=2") == AFTER_SCORE.split()
    assert changed("prune.depth_selection=contiguous") == AFTER_SCORE.split()
    assert changed("prune.depth_metric=loss", "prune.depth_selection=iterative") == AFTER_SCORE.split()


def test_scores_of_another_run_take_the_place_of_the_score_stage(base: list[str], tmp_path: Path) -> None:
    model = random_model(compose_run(base).source.random)
    overrides = [*base, f"prune.scores={tmp_path / 'scores'}"]
    with pytest.raises(ArtefactError, match=r"prune.scores=.*/scores holds no scores"):
        _digests(compose_run(overrides), ["prune"])
    random_scores(model, Aggregation.l2_mean, 0).save(tmp_path / "scores")
    config = compose_run(overrides)
    wanted = wanted_stages("compress", config)
    assert wanted == [stage for stage in LINE if stage != "score"]
    before = _digests(config, wanted)
    with pytest.raises(ConfigError, match=r"minitron score has nothing to score: prune.scores="):
        wanted_stages("score", config)
    shutil.copytree(tmp_path / "scores", tmp_path / "moved")
    moved = compose_run([*base, f"prune.scores={tmp_path / 'moved'}"])
    assert _digests(moved, wanted) == before
    random_scores(model, Aggregation.l2_mean, 1).save(tmp_path / "scores")
    after = _digests(config, wanted)
    assert [stage for stage in wanted if before[stage] != after[stage]] == AFTER_SCORE.split()[1:]


def test_questions_count_by_their_content(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    overrides = [*base, "prune.depth_metric=accuracy", f"score.depth.questions={file}"]
    with pytest.raises(ConfigError, match=r"score.depth.questions=.* cannot be read: No such file"):
        _digests(compose_run(overrides))
    digests = []
    for text in ("a", "b"):
        file.write_text(text)
        digests.append(_digests(compose_run(overrides))["score"])
    assert digests[0] != digests[1]


def test_fp8_counts_in_training_alone(base: list[str]) -> None:
    """Scores, evaluation and export are made without it."""
    base = [*base, "precision.dtype=bf16"]
    fp8 = ["precision.fp8=hybrid", "precision.fp8_recipe=tensorwise"]
    none, on, longer, ends = (
        _digests(compose_run([*base, *more]))
        for more in (
            [],
            fp8,
            [*fp8, "precision.fp8_amax_history_len=2"],
            [*fp8, "precision.first_last_layers_bf16=true"],
        )
    )
    trained = ["distill", "eval_distilled", "baseline", "eval_baseline", "export", "report"]
    assert [stage for stage in LINE if none[stage] != on[stage]] == trained
    assert on == longer
    assert [stage for stage in LINE if on[stage] != ends[stage]] == trained


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
        ("distill.teacher={dtype: bf16, fp8_recipe: mxfp8}", "teacher_logits"),
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


def test_a_foreign_cache_is_checked_against_the_planned_teacher(base: list[str], tmp_path: Path) -> None:
    """No folder of the teacher is there; its identity is the one that the plan has for the stage that leaves it."""
    write_identity(tmp_path, CacheIdentity("d", 32, 257, "t", "fp32", TeacherLogitsConfig().parameters()))
    foreign = [*base, "distill.teacher.source=cached", f"distill.teacher.cache={tmp_path}", "correction.enabled=true"]
    run, every = RunFolder(tmp_path / "none"), [*LINE, "correct"]

    def told(settings: list[str], stage: str = "distill") -> tuple[str | None, str]:
        config = compose_run(settings)
        planned = {item.stage.name: item for item in plan_stages(stages_of(config), config, run, every)}
        assert "correct" not in planned[stage].identity.inputs
        return planned[stage].digests.get("correct"), planned["correct"].identity.digest

    teacher, correct = told(foreign)
    assert teacher == correct
    other, changed = told([*foreign, "correction.lr_scale=0.5"])
    assert teacher != other == changed
    assert told(foreign, "score")[0] is None
    with pytest.raises(ConfigError, match=r"say bf16, but the teacher ran in fp32 when distill.teacher.cache=.* was"):
        told([*foreign, "distill.teacher.dtype=bf16"])
    dropped = [*foreign, "distill.logit_loss.top_k_rest=drop"]
    with pytest.raises(ConfigError, match=r"top_k_rest=drop has no meaning for the random draws in distill.teacher.ca"):
        told(dropped)
    of_top_k = TeacherLogitsConfig(method=CacheMethod.top_k).parameters()
    write_identity(tmp_path, CacheIdentity("d", 32, 257, "t", "fp32", of_top_k))
    assert told(dropped) == (correct, correct)


def test_a_teacher_elsewhere_has_the_identity_of_its_own_run(base: list[str], tmp_path: Path) -> None:
    """A finished stage has its plan's; another folder that of model, weights and ``hf/``, by relative path."""
    finished, copied = tmp_path / "run" / "import", tmp_path / "copy"
    for folder in (finished, copied):
        for file, text in (("model.json", "{}"), ("weights/a", "1"), ("weights/b", "2"), ("hf/config.json", "{}")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    (finished / "meta.json").write_text('{"digest": "planned there"}')

    def teacher(folder: Path) -> str:
        config = compose_run([*base, f"distill.teacher.path={folder}"])
        stages = {stage.name: stage for stage in stages_of(config)}
        assert "import" not in stages["distill"].needs
        return stages["distill"].outside(config)["teacher"]

    def edited(name: str, *moves: tuple[str, str]) -> Path:
        shutil.copytree(copied, tmp_path / name)
        for before, after in moves:
            (tmp_path / name / before).rename(tmp_path / name / after)
        return tmp_path / name

    assert teacher(finished) == "planned there"
    before = teacher(copied)
    beside = edited("beside")
    (beside / "metrics.jsonl").write_text("{}")
    assert teacher(beside) == before
    swapped = edited("swapped", ("weights/a", "weights/c"), ("weights/b", "weights/a"), ("weights/c", "weights/b"))
    assert teacher(swapped) != before
    assert teacher(edited("moved", ("weights/a", "hf/a"))) != before


def test_content_of_the_text_counts_and_its_place_does_not(base: list[str], tmp_path: Path) -> None:
    config = compose_run(base)
    before = _digests(config)
    (tmp_path / "text.txt").write_text("Other text.\n" * 50)
    changed = [stage for stage in LINE if before[stage] != _digests(config)[stage]]
    assert changed == [stage for stage in LINE if stage != "import"]


def test_text_in_another_folder_is_the_same(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "text.txt", tmp_path / "moved")
    assert _digests(compose_run([*base, f"data.paths=[{tmp_path}/moved]"])) == _digests(compose_run(base))


def test_text_is_tokenized_once_for_all_lengths_that_it_fills(base: list[str], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")

    def data(*overrides: str) -> Planned:
        config = compose_run([*base, *overrides])
        return plan_stages(stages_of(config), config, run, ["import", "data"])[1]

    made = data().identity
    split = SplitSummary(num_documents=1, num_tokens=16 * 32 + 1, num_bytes=2000)
    about = {"eos_id": 0, "vocab_size": 512, "dtype": "uint16", "heldout_fraction": 0.1}
    hashes = {"tokenizer_sha256": "", "source_fingerprint": "", "train_sha256": ""}
    save_summary(run.begin(made, resumable=False), DatasetSummary(train=split, heldout=split, **about, **hashes))
    run.finish(made, summary={}, seconds=0.0, environment={})
    least = ["distill.train.global_batch_size=8", "score.num_samples=8", "prune.reconstruct.num_samples=8"]
    assert data(*least).done
    assert data(*least, "data.seq_length=64").done
    with pytest.raises(DataError, match=r"513 tokens but 8 sequences x 128 tokens \+ 1 = 1025 are needed"):
        data(*least, "data.seq_length=128")
    config = compose_run([*base, *least, "data.seq_length=128"])
    wanted = ["import", "eval_teacher"]  # which reads held-out text
    assert [item.stage.name for item in plan_stages(stages_of(config), config, run, wanted)] == wanted


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


def test_a_given_spec_needs_no_scores_and_counts_by_its_content(base: list[str], tmp_path: Path) -> None:
    source = source_model(compose_run(base))
    sizes = PruneConfig(hidden_size=48, drop_layers=[1], ranking=Ranking.random)
    none = [f"prune.{name}=null" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")]
    for name in ("a", "b", "c"):
        choose(source, replace(sizes, seed=ord(name) // 99), scores=None, source_id="x").save(tmp_path / name)
    a, b, c = (compose_run([*base, *none, f"prune.spec={tmp_path / name}"]) for name in "abc")
    check_models(a)
    needs = {stage.name: stage.needs for stage in stages_of(a)}
    assert needs["prune"] == ("import", "data")
    assert _digests(a) == _digests(b)
    changed = [stage for stage in LINE if _digests(a)[stage] != _digests(c)[stage]]
    assert changed == LINE[LINE.index("prune") :]
    control = random_ranking(a).prune
    assert (control.spec, control.hidden_size, control.num_layers) == (None, 48, 3)


def test_random_ranking_needs_no_scores(base: list[str]) -> None:
    needs = {stage.name: stage.needs for stage in stages_of(compose_run([*base, "prune.ranking=random"]))}
    assert needs["prune"] == ("import", "data")
    needs = {stage.name: stage.needs for stage in stages_of(compose_run(base))}
    assert needs["prune"] == ("import", "score", "data")


def test_slicing_alone_needs_no_text_and_does_not_depend_on_how_it_would_be_fitted(base: list[str]) -> None:
    base = [*base, "prune.reconstruct.enabled=false"]
    needs = {stage.name: stage.needs for stage in stages_of(compose_run(base))}
    assert (needs["prune"], needs["prune_random"]) == (("import", "score"), ("import",))
    others = ["prune.reconstruct.damping=1", "prune.reconstruct.num_samples=8"]
    before, after = (_digests(compose_run([*base, *more]))["prune"] for more in ([], others))
    assert before == after
