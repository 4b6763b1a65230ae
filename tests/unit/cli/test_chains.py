"""Which stages a verb, a chain and an ablation run, and from what."""

from pathlib import Path

import pytest

from minitron.cli.job import check_models, wanted_stages
from minitron.cli.stages import stages_of
from minitron.config.compose import compose_run
from minitron.config.trainings import ABLATION
from minitron.errors import ConfigError
from minitron.runtime.artefact import RunFolder
from tests.helpers.line import LINE


def test_stages_of_each_verb(base: list[str]) -> None:
    config = compose_run(base)
    assert wanted_stages("compress", config) == LINE
    at = LINE.index("distill")
    cached = [*LINE[:at], "teacher_logits", *LINE[at:]]
    assert wanted_stages("train", config) == ["baseline"]
    assert wanted_stages("teacher-logits", config) == ["teacher_logits"]
    assert wanted_stages("compress", compose_run([*base, "distill.teacher.source=cached"])) == cached
    for verb in ("import", "data", "score", "prune", "verify", "distill", "export", "report"):
        assert wanted_stages(verb, config) == [verb]
    assert wanted_stages("eval", config) == ["eval_teacher"]  # nothing else is done
    without = wanted_stages("compress", compose_run([*base, "baseline.enabled=false"]))
    assert without == [stage for stage in LINE if "baseline" not in stage]


CHAIN = "chain=[{name: mid, prune: {hidden_size: 56}}, {name: small, prune: {hidden_size: 48}, num_tokens: 2560}]"
STEP = ["score", "prune", "verify", "eval_pruned", "distill", "eval_distilled", "export", "report"]


def test_chain_goes_down_step_by_step_with_the_original_as_teacher(base: list[str]) -> None:
    config = compose_run([*base, CHAIN, "baseline.enabled=false", "correction.enabled=true"])
    wanted = wanted_stages("compress", config)
    shared = ["import", "data", "eval_teacher", "correct", "eval_corrected"]
    assert wanted == [*shared, *(f"steps/{step}/{stage}" for step in ("mid", "small") for stage in STEP)]
    assert wanted_stages("prune", config) == ["steps/mid/prune", "steps/small/prune"]
    stages = {stage.name: stage for stage in stages_of(config)}
    assert stages["steps/mid/prune"].needs == ("import", "steps/mid/score", "data")
    assert stages["steps/mid/distill"].needs == ("correct", "steps/mid/prune", "data")
    assert stages["steps/small/score"].needs == ("steps/mid/distill", "data")
    assert stages["steps/small/prune"].needs == ("steps/mid/distill", "steps/small/score", "data")
    assert stages["steps/small/distill"].needs == ("correct", "steps/small/prune", "data")
    tokens = [stages[f"steps/{step}/distill"].values(config)["distill.train.num_tokens"] for step in ("mid", "small")]
    assert tokens == [5120, 2560]


def test_chain_with_the_student_before_as_teacher_and_the_original_as_source(base: list[str]) -> None:
    second = "{name: small, prune: {hidden_size: 48}, source: original, teacher: previous}"
    config = compose_run([*base, f"chain=[{{name: mid, prune: {{hidden_size: 56}}}}, {second}]"])
    stages = {stage.name: stage for stage in stages_of(config)}
    assert stages["steps/small/score"].needs == ("import", "data")
    assert stages["steps/small/distill"].needs == ("steps/mid/distill", "steps/small/prune", "data")


def test_steps_of_a_chain_share_the_cache_of_the_original(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has what the longest of them reads; a step that learns from the step before has one of its own."""
    steps = "{name: a, num_tokens: 2560}, {name: b, num_tokens: 7680}, {name: c, num_tokens: 9728, teacher: previous}"
    config = compose_run([*base, f"chain=[{steps}]", "distill.teacher.source=cached", "correction.enabled=true"])
    stages = {stage.name: stage for stage in stages_of(config)}
    assert [name for name in stages if name.endswith("teacher_logits")] == ["teacher_logits", "steps/c/teacher_logits"]
    assert stages["teacher_logits"].needs == ("correct", "import", "data")
    assert stages["steps/c/teacher_logits"].needs == ("steps/b/distill", "import", "data")
    first = {step: stages[f"steps/{step}/distill"].needs[0] for step in "abc"}
    assert first == {"a": "teacher_logits", "b": "teacher_logits", "c": "steps/c/teacher_logits"}
    mentioned = {step: stages[f"steps/{step}/distill"].mentions for step in "abc"}
    assert mentioned == {"a": ("correct",), "b": ("correct",), "c": ("steps/b/distill",)}

    seen: list[int] = []
    monkeypatch.setattr(
        "minitron.cli.stages._lacking_logits", lambda own, _run: seen.append(own.distill.train.num_tokens)
    )
    run = RunFolder(Path(config.runs_dir) / "none")
    for name in ("teacher_logits", "steps/c/teacher_logits"):
        {stage.name: stage for stage in stages_of(config)}[name].lacks(config, run)
    assert seen == [7680, 9728]


def test_a_step_of_no_tokens_only_prunes_and_the_next_prunes_that(base: list[str]) -> None:
    steps = "{name: width, prune: {hidden_size: 56}, num_tokens: 0}, {name: depth, prune: {num_layers: 3}}"
    config = compose_run([*base, f"chain=[{steps}]", "baseline.enabled=false"])
    check_models(config)
    wanted = wanted_stages("compress", config)
    shared, pruning = ["import", "data", "eval_teacher"], ["score", "prune", "verify", "eval_pruned"]
    assert wanted == [*shared, *(f"steps/width/{s}" for s in pruning), *(f"steps/depth/{s}" for s in STEP)]
    stages = {stage.name: stage for stage in stages_of(config)}
    assert stages["steps/depth/score"].needs == ("steps/width/prune", "data")
    assert stages["steps/depth/prune"].needs == ("steps/width/prune", "steps/depth/score", "data")
    assert stages["steps/depth/distill"].needs == ("import", "steps/depth/prune", "data")


@pytest.mark.parametrize(
    "chain",
    [
        "[{name: a}, {name: b, num_tokens: 0}]",
        "[{name: a, num_tokens: 0}, {name: b, teacher: previous}]",
        "[{name: a, num_tokens: -1}]",
        "[{name: a/b}]",
        "[{prune: {hidden_size: 8}}]",
        "[{name: a}, {name: a}]",
        "[{name: a, num_tokens: 512}]",  # as long as the warm-up
    ],
)
def test_chain_that_cannot_work_is_refused(base: list[str], chain: str) -> None:
    with pytest.raises(ConfigError, match=r"^chain"):
        compose_run([*base, f"chain={chain}"])


def test_correction_teaches_at_a_fifth_of_the_peak_rate_and_pruning_takes_the_original(base: list[str]) -> None:
    config = compose_run([*base, "correction.enabled=true", "correction.num_tokens=2560"])
    assert wanted_stages("train", config) == ["correct"]
    stages = {stage.name: stage for stage in stages_of(config)}
    assert stages["prune"].needs == ("import", "score", "data")
    assert stages["distill"].needs == ("correct", "prune", "data")
    values = stages["correct"].values(config)
    assert [values[f"distill.train.{key}"] for key in ("lr", "min_lr", "num_tokens")] == [2e-4, 1e-4, 2560]


def test_ablation_compares_the_papers_recipes_at_equal_tokens(base: list[str]) -> None:
    config = compose_run([*base, "ablation.from_scratch_times=3"])
    stages = {stage.name: stage for stage in stages_of(config)}
    wanted = wanted_stages("ablate", config)
    starts = {name: stages[name].needs for name in ABLATION}
    assert set(ABLATION) < set(wanted)
    assert starts == {
        "distill": ("import", "prune", "data"),
        "random_pruned_kd": ("import", "prune_random", "data"),
        "pruned_ce": ("prune", "data"),
        "random_init_kd": ("import", "prune", "data"),
        "baseline": ("prune", "data"),
        "scratch_long": ("prune", "data"),
    }
    tokens = {name: stages[name].values(config)["distill.train.num_tokens"] for name in ABLATION}
    assert tokens == dict.fromkeys(ABLATION, 5120) | {"scratch_long": 15360}
    assert stages["prune_random"].values(config)["prune.ranking"] == "random"


@pytest.mark.parametrize("kind", ["own", "corrected", "given"])
def test_ablation_evaluates_the_teacher_that_teaches(base: list[str], tmp_path: Path, kind: str) -> None:
    overrides = {
        "own": [],
        "corrected": ["correction.enabled=true"],
        "given": [f"distill.teacher.path={tmp_path}"],
    }[kind]
    config = compose_run([*base, *overrides])
    stages = {stage.name: stage for stage in stages_of(config)}
    needs = stages["ablation"].needs
    teachers = {"eval_teacher", "eval_corrected", "eval_given_teacher"}.intersection(needs)
    assert (
        teachers
        == {
            "own": {"eval_teacher"},
            "corrected": {"eval_corrected"},
            "given": {"eval_given_teacher"},
        }[kind]
    )
    assert teachers < set(wanted_stages("ablate", config))
    assert ("eval_given_teacher" in stages) == (kind == "given")


def test_ablation_without_its_baseline_is_refused(base: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"set chain=\[\] and baseline.enabled=true"):
        wanted_stages("ablate", compose_run([*base, "baseline.enabled=false"]))
