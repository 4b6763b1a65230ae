"""The tokens saved and the FLOPs of the recipes, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.compose import compose_run
from minitron.config.run import RunConfig
from minitron.config.trainings import ABLATION
from minitron.report.ablation import Ablation, collect_ablation, markdown, token_saving
from minitron.report.data import TrainingCurve
from minitron.runtime.artefact import RunFolder
from tests.unit.report import synthetic as syn

TOKENS, LENGTH = 4096, 128
DISTILLS = ("distill", "random_pruned_kd", "random_init_kd")
N, N_0 = syn.TARGET_PARAMETERS, syn.SOURCE_PARAMETERS


def _curve(heldout: dict[int, float]) -> TrainingCurve:
    return TrainingCurve(
        objective="",
        tokens=list(heldout),
        loss=list(heldout.values()),
        heldout_tokens=list(heldout),
        heldout_loss=list(heldout.values()),
        tokens_per_s=None,
    )


def test_scratch_run_that_gets_there_gives_the_ratio() -> None:
    saving = token_saving(_curve({50: 4.0, 100: 3.0}), _curve({100: 6.0, 400: 3.5, 900: 3.0, 1000: 2.9}))
    assert (saving.scratch_tokens, saving.ratio, saving.is_bound, saving.text) == (900, 9.0, False, "9.0x")


def test_loss_reached_between_two_validations() -> None:
    saving = token_saving(_curve({100: 3.0}), _curve({400: 4.0, 800: 2.0}))
    assert saving.scratch_tokens == 600


def test_scratch_run_that_never_gets_there_gives_a_bound() -> None:
    saving = token_saving(_curve({100: 3.0}), _curve({100: 6.0, 400: 3.5}))
    assert (saving.scratch_tokens, saving.ratio, saving.is_bound, saving.text) == (400, 4.0, True, "more than 4.0x")


def _compose(tmp_path: Path, *overrides: str) -> RunConfig:
    return compose_run(["experiment=tiny", f"runs_dir={tmp_path}", f"data.seq_length={LENGTH}", *overrides])


def _ablation(config: RunConfig, *, train_tokens: int = 10 * TOKENS) -> Ablation:
    """Of a run whose recipes, longer one and correction end at 4096, 16384 and 1024 tokens."""
    run = RunFolder(Path(config.runs_dir) / config.name)
    heldout = dict.fromkeys(ABLATION, 3.0) | {"scratch_long": 5.0, "correct": 2.5}
    tokens = dict.fromkeys(ABLATION, TOKENS) | {"scratch_long": 4 * TOKENS, "correct": TOKENS // 4}
    for name, loss in heldout.items():
        record = {"step": 1, "loss": loss, "tokens": tokens[name], "heldout_loss": loss}
        _write(run, name, "metrics.jsonl", record)
        _write(run, name, "meta.json", {"digest": "a", "summary": {"heldout_tokens": 512}})
    losses = {"teacher": 2.0, "corrected": 1.75, "given_teacher": 1.5, "pruned": 7.0, "distilled": 3.0}
    for which, loss in {**losses, **heldout}.items():
        values = {"loss": loss, "perplexity": 1.0, "num_tokens": 512, "prompt": "", "sample": ""}
        _write(run, f"eval_{which}", "eval.json", values)
    for stage, shape in {"import": syn.SOURCE, "correct": syn.SOURCE, "prune": syn.TARGET}.items():
        _write(run, stage, "model.json", shape.to_dict())
    split = {"num_documents": 1, "num_tokens": train_tokens + 1, "num_bytes": 1}
    about = {"eos_id": 0, "vocab_size": 49152, "dtype": "uint16"}
    hashes = {"tokenizer_sha256": "a", "source_fingerprint": "b", "train_sha256": "c", "heldout_fraction": 0.05}
    _write(run, "data", "data.json", {"train": split, "heldout": split, **about, **hashes})
    return collect_ablation(run, config)


def _write(run: RunFolder, stage: str, name: str, values: dict[str, object]) -> None:
    folder = run.path / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values) + "\n")


def _flops(ablation: Ablation) -> dict[str, float]:
    return {recipe.name: recipe.flops for recipe in ablation.recipes}


def _expected(teaching: float) -> dict[str, float]:
    """6 N D of the student, and what teaching took where the recipe distils."""
    student = dict.fromkeys(ABLATION, 6.0 * N * TOKENS) | {"scratch_long": 6.0 * N * 4 * TOKENS}
    return {name: pytest.approx(flops + teaching * (name in DISTILLS), rel=1e-12) for name, flops in student.items()}


def _family(teaching: float) -> float:
    """The run from scratch never gets there: 4 times the tokens, for the source and the student."""
    scratch = 6.0 * (N_0 + N) * 4 * TOKENS
    saving: float = pytest.approx(scratch / (6.0 * N_0 * 4 * TOKENS + 6.0 * N * TOKENS + teaching), rel=1e-12)
    return saving


def test_plain_teacher_runs_beside_the_student(tmp_path: Path) -> None:
    ablation = _ablation(_compose(tmp_path))
    teaching = 2.0 * N_0 * TOKENS
    assert (ablation.teaching.loss, ablation.teaching.num_parameters) == (2.0, N_0)
    assert _flops(ablation) == _expected(teaching)
    assert ablation.family_saving == _family(teaching)
    text = markdown(ablation)
    assert "Teacher 2.000, pruned" in text
    assert "x, the teacher's forward passes counted.\n" in text
    assert "correct" not in text


def test_corrected_teacher_has_its_own_loss_and_its_training_counted(tmp_path: Path) -> None:
    ablation = _ablation(_compose(tmp_path, "correction.enabled=true"))
    teaching = 2.0 * N_0 * TOKENS + 6.0 * N_0 * TOKENS / 4
    assert (ablation.teaching.loss, ablation.teaching.correction_tokens) == (1.75, TOKENS // 4)
    assert _flops(ablation) == _expected(teaching)
    assert ablation.family_saving == _family(teaching)
    text = markdown(ablation)
    assert "Teacher, corrected, 1.750, pruned" in text
    assert "its correction on 1.02k tokens counted" in text
    assert "The teacher's correction took 1.02k more" in text


@pytest.mark.parametrize(("train_tokens", "passed"), [(10 * TOKENS, TOKENS), (TOKENS // 2, TOKENS // 2)])
def test_pass_that_writes_the_cache_is_counted(tmp_path: Path, train_tokens: int, passed: int) -> None:
    """A text that is read twice goes through the teacher once."""
    ablation = _ablation(_compose(tmp_path, "distill.teacher.source=cached"), train_tokens=train_tokens)
    assert ablation.teaching.forward_tokens == passed
    assert _flops(ablation) == _expected(2.0 * N_0 * passed)
    assert ablation.family_saving == _family(2.0 * N_0 * passed)
    assert "the teacher's one forward pass for the cache counted" in markdown(ablation)


def test_given_teacher_counts_by_its_own_size_and_loss(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "model.json").write_text(json.dumps(replace(syn.SOURCE, num_layers=60).to_dict()))
    ablation = _ablation(_compose(tmp_path, f"distill.teacher.path={given}"))
    size = N_0 + 30 * syn.SOURCE_LAYER
    assert (ablation.teaching.loss, ablation.teaching.num_parameters) == (1.5, size)
    assert _flops(ablation) == _expected(2.0 * size * TOKENS)
    assert ablation.family_saving == _family(2.0 * size * TOKENS)
    assert ablation.family == [N_0, N]
