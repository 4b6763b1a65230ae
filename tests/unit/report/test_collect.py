import json
import re
from pathlib import Path

import pytest

from minitron.errors import ArtefactError
from minitron.report.collect import collect, read_kept
from minitron.report.data import Role
from tests.unit.report import synthetic as syn


def test_rows_of_the_table(tmp_path: Path) -> None:
    data = collect(syn.as_run(syn.make_run(tmp_path / "demo")))
    rows = {model.role.value: model for model in data.models}
    assert list(rows) == ["teacher", "pruned", "distilled", "baseline"]
    assert {role: row.loss for role, row in rows.items()} == syn.LOSSES
    assert {role: row.gap_recovered for role, row in rows.items()} == pytest.approx(
        {"teacher": 1.0, "pruned": 0.0, "distilled": 0.8, "baseline": 0.3}
    )
    assert rows["teacher"].num_parameters == syn.SOURCE_PARAMETERS == 134_515_008  # SmolLM2-135M's own count
    assert rows["teacher"].num_non_embedding == syn.SOURCE_NON_EMBEDDING
    for role in ("pruned", "distilled", "baseline"):
        assert rows[role].num_parameters == syn.TARGET_PARAMETERS
        assert rows[role].num_non_embedding == syn.TARGET_NON_EMBEDDING
        assert rows[role].num_tokens == syn.EVAL_TOKENS


def test_cost_is_6nd_and_2nd(tmp_path: Path) -> None:
    cost = collect(syn.as_run(syn.make_run(tmp_path / "demo"))).cost
    assert cost.tokens == cost.baseline_tokens == syn.NUM_TOKENS
    assert cost.student_flops == cost.baseline_flops == 6 * syn.TARGET_PARAMETERS * syn.NUM_TOKENS
    assert cost.teacher_flops == 2 * syn.SOURCE_PARAMETERS * syn.NUM_TOKENS
    assert (cost.student_parameters, cost.source_parameters) == (syn.TARGET_PARAMETERS, syn.SOURCE_PARAMETERS)


def test_cost_from_a_cache_has_no_teachers_forward(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "distill", summary={"teacher_parameters": 0})
    cost = collect(syn.as_run(run)).cost
    assert (cost.teacher_parameters, cost.teacher_flops) == (0, 0)


def test_cost_counts_a_teacher_from_elsewhere_by_its_own_size(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "distill", summary={"teacher_parameters": 8_030_261_248})
    assert collect(syn.as_run(run)).cost.teacher_flops == 2 * 8_030_261_248 * syn.NUM_TOKENS


def test_stages_curves_and_shapes(tmp_path: Path) -> None:
    data = collect(syn.as_run(syn.make_run(tmp_path / "demo")))
    assert {stage.name: stage.seconds for stage in data.stages} == syn.SECONDS
    assert data.distill.heldout_tokens == [step * 2048 for step in range(50, 401, 50)]
    assert data.distill.heldout_loss[-1] == 4.03
    assert len(data.distill.tokens) == len(data.distill.loss) == 400
    assert data.distill.tokens_per_s == 163.0
    assert data.distill.objective == "forward KL to the teacher"
    assert data.baseline is not None
    assert data.baseline.objective == "cross-entropy on the text"
    assert (data.prune.source, data.prune.target) == (syn.SOURCE, syn.TARGET)
    assert (data.prune.kept_layers, data.prune.dropped_layers) == (syn.KEPT, syn.DROPPED)
    assert data.prune.score_kept == {"num_layers": 0.9731, "ffn_hidden_size": 0.88}
    assert data.prune.verification.endswith("the same units masked but for 3e-06 of the largest logit")
    assert data.prune.ranking == "importance"
    assert data.export.size_bytes == 3000
    assert data.export.max_logit_error == 2.5e-5
    assert data.model_name == "SmolLM2-135M-Instruct"
    assert data.environment == syn.ENVIRONMENT
    assert data.same_training
    assert data.notes == []


def test_a_given_spec_and_what_was_not_compared(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "prune", inputs={"spec": "a hash"})
    merged = {"tokens": 128, "masked_teacher": "not compared (prune.head_residual=paper)"}
    syn.rewrite_meta(run / "verify", summary=merged)
    prune = collect(syn.as_run(run)).prune
    assert prune.ranking == "a given spec"
    assert prune.verification.endswith("are finite; masked teacher not compared (prune.head_residual=paper)")


def test_kept_units(tmp_path: Path) -> None:
    kept = read_kept(syn.as_run(syn.make_run(tmp_path / "demo")))
    assert kept.layers == syn.KEPT
    assert kept.hidden == list(range(448))
    assert kept.heads[1] == [0, 2, 3, 5, 6, 8]
    assert {len(units) for units in kept.ffn} == {1152}


@pytest.mark.parametrize("absent", [("baseline", "eval_baseline"), ("eval_baseline",)])
def test_without_baseline_its_row_is_left_out(tmp_path: Path, absent: tuple[str, ...]) -> None:
    data = collect(syn.as_run(syn.make_run(tmp_path / "demo", without=absent)))
    assert [model.role for model in data.models] == [Role.teacher, Role.pruned, Role.distilled]
    assert data.baseline is None
    assert data.cost.baseline_flops is None
    assert "baseline" not in {stage.name for stage in data.stages}
    assert not data.same_training
    assert data.notes == []


@pytest.mark.parametrize(
    ("stage", "verb"),
    [("import", "import"), ("eval_teacher", "eval"), ("prune", "prune"), ("distill", "distill"), ("export", "export")],
)
def test_missing_stage_names_the_verb(tmp_path: Path, stage: str, verb: str) -> None:
    run = syn.make_run(tmp_path / "demo", without=(stage,))
    with pytest.raises(ArtefactError, match=f"no finished stage '{stage}'.*`minitron {verb}`.*compress name=demo"):
        collect(syn.as_run(run))


def test_missing_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no run folder .*; run `minitron compress name=other` first"):
        collect(syn.as_run(tmp_path / "other"))


@pytest.mark.parametrize(
    ("file", "text", "verb"),
    [
        ("eval_teacher/eval.json", '{"loss": 3.0}', "eval"),
        ("eval_teacher/eval.json", "{", "eval"),
        ("distill/metrics.jsonl", "", "distill"),
        ("distill/metrics.jsonl", '{"step": 1, "loss": 1.0}\n', "distill"),
        ("prune/prune_spec.json", "{}", "prune"),
        ("prune/prune_spec.json", '{"layers": "a-b"}', "prune"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, file: str, text: str, verb: str) -> None:
    run = syn.make_run(tmp_path / "demo")
    (run / file).write_text(text)
    with pytest.raises(ArtefactError, match=f"{re.escape(file)} .*run `minitron {verb}` again"):
        collect(syn.as_run(run))


def test_unlike_training_is_not_called_the_same(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "baseline", values={"distill.train.lr": 1e-3})
    lines = (run / "baseline" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "baseline" / "metrics.jsonl").write_text("".join(lines[:200]))
    data = collect(syn.as_run(run))
    assert not data.same_training
    (note,) = data.notes
    assert "differ in tokens (819,200 and 409,600), lr (0.0005 and 0.001): no like-for-like control." in note


def test_notes_on_evaluation_and_environment(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    path = run / "eval_pruned" / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 3.0, "num_tokens": 99}))
    syn.rewrite_meta(run / "score", environment={"torch": "3.0"})
    data = collect(syn.as_run(run))
    assert [model.gap_recovered for model in data.models] == [None] * 4
    assert len(data.notes) == 3
    assert "pruned 99" in data.notes[0]
    assert "no gap to recover" in data.notes[1]
    assert data.notes[2] == "Made in another environment than the distillation: score."


def test_name_of_the_model_falls_back(tmp_path: Path) -> None:
    run = syn.make_run(tmp_path / "demo")
    syn.rewrite_meta(run / "import", summary={})
    assert collect(syn.as_run(run)).model_name == "demo"
    (run / "import" / "hf").mkdir()
    (run / "import" / "hf" / "config.json").write_text('{"_name_or_path": "someone/model"}')
    assert collect(syn.as_run(run)).model_name == "someone/model"
