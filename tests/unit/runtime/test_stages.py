"""Which stages are run: a line of four fake stages, prepared by hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.run import OnChange, RunConfig
from minitron.errors import ArtefactError
from minitron.pipeline import Planned, Stage, plan_stages
from minitron.runtime.artefact import RunFolder


def _never(_session: object, _out: Path) -> dict[str, object]:
    raise AssertionError("planning runs nothing")


def _line(text: str = "t0") -> list[Stage]:
    return [
        Stage("data", (), lambda c: {"seed": c.seed}, _never, outside=lambda c: {"text": text}),
        Stage("prune", (), lambda c: {"hidden": c.prune.hidden_size}, _never),
        Stage("distill", ("data", "prune"), lambda c: {"lr": c.distill.train.lr}, _never, resumable=True),
        Stage("report", ("distill",), lambda c: {}, _never),
    ]


ALL = ["data", "prune", "distill", "report"]


def _finish(run: RunFolder, planned: list[Planned]) -> None:
    for item in planned:
        if not item.done:
            run.begin(item.identity, resumable=False)
            run.finish(item.identity, summary={}, seconds=0.0, environment={})


@pytest.fixture
def done(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    planned = plan_stages(_line(), RunConfig(), run, ALL)
    assert [item.done for item in planned] == [False] * 4
    assert [item.stage.name for item in planned] == ALL
    _finish(run, planned)
    return run


def _todo(run: RunFolder, config: RunConfig, wanted: list[str] = ALL, text: str = "t0") -> list[str]:
    return [item.stage.name for item in plan_stages(_line(text), config, run, wanted) if not item.done]


def test_all_done(done: RunFolder) -> None:
    assert _todo(done, RunConfig()) == []


def test_a_change_runs_what_depends_on_it_and_no_more(done: RunFolder) -> None:
    config = RunConfig(on_change=OnChange.rerun)
    config.distill.train.lr = 2e-4
    planned = plan_stages(_line(), config, done, ALL)
    assert [item.done for item in planned] == [True, True, False, False]
    assert planned[2].changed == ["lr: 0.0001 -> 0.0002"]
    assert planned[3].changed == ["input distill has changed"]
    _finish(done, planned)
    assert _todo(done, config) == []

    config.prune.hidden_size = 8
    assert _todo(done, config) == ["prune", "distill", "report"]


def test_a_stage_is_told_the_identity_of_one_that_it_mentions(done: RunFolder) -> None:
    """Whether or not that is there; it decides nothing."""
    stages = _line()
    stages[3] = replace(stages[3], mentions=("prune",))
    shutil.rmtree(done.stage("prune"))
    (item,) = plan_stages(stages, RunConfig(), done, ["report"])
    assert item.done
    before = {p.stage.name: p.identity.digest for p in plan_stages(_line(), RunConfig(), done, ALL)}
    assert item.digests == {name: before[name] for name in ("distill", "prune")}


def test_outside_content_counts(done: RunFolder) -> None:
    config = RunConfig(on_change=OnChange.rerun)
    assert _todo(done, config, text="t1") == ["data", "distill", "report"]


def test_layout_and_names_do_not_count(done: RunFolder) -> None:
    config = RunConfig(name="other", runs_dir="elsewhere")
    config.parallel.tensor_model_parallel_size = 4
    assert _todo(done, config) == []


def test_change_with_on_change_error(done: RunFolder) -> None:
    config = RunConfig()
    config.distill.train.lr = 2e-4
    with pytest.raises(ArtefactError, match=r"distill was made with other inputs \(lr: 0.0001 -> 0.0002\)"):
        plan_stages(_line(), config, done, ALL)


def test_removed_stage_is_run_again_alone(done: RunFolder) -> None:
    done.stage("prune").rename(done.path / "away")
    assert _todo(done, RunConfig()) == ["prune"]  # the same result: what came of it stands


def test_wanted_stage_needs_its_inputs(tmp_path: Path, done: RunFolder) -> None:
    empty = RunFolder(tmp_path / "empty")
    with pytest.raises(ArtefactError) as caught:
        plan_stages(_line(), RunConfig(), empty, ["distill"])
    assert "distill needs the stage data, which is not in" in str(caught.value)
    assert "run it first" in str(caught.value)
    assert _todo(empty, RunConfig(), ["data"]) == ["data"]

    config = RunConfig(on_change=OnChange.rerun)
    config.prune.hidden_size = 8
    with pytest.raises(ArtefactError) as caught:
        plan_stages(_line(), config, done, ["distill"])
    assert "distill needs the stage prune, but" in str(caught.value)
    assert "was made with other inputs (hidden: None -> 8)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_stage_lacks_is_added_to_it(done: RunFolder) -> None:
    """A finished artefact of the right identity becomes the working folder again, with all that is in it."""

    def line(lack: str | None) -> list[Stage]:
        return [
            Stage("data", (), lambda c: {}, _never, resumable=True, lacks=lambda _c, _run: lack),
            Stage("distill", ("data",), lambda c: {}, _never),
        ]

    run = RunFolder(done.path.parent / "grows")
    assert [
        item.done for item in plan_stages(line("never asked of what is not there"), RunConfig(), run, ["data"])
    ] == [False]
    _finish(run, plan_stages(line(None), RunConfig(), run, ["data", "distill"]))
    (run.stage("data") / "content").write_text("first")
    with pytest.raises(ArtefactError, match=r"^distill: 3 samples; run `minitron data` with the same settings, which"):
        plan_stages(line("3 samples"), RunConfig(), run, ["distill"])

    planned = plan_stages(line("3 samples"), RunConfig(), run, ["data", "distill"])
    assert [(item.done, item.changed) for item in planned] == [(False, []), (True, [])]
    for _attempt in range(2):  # killed once in between
        partial = run.begin(planned[0].identity, resumable=True)
        assert (partial / "content").read_text() == "first"
        assert not run.stage("data").exists()
    run.finish(planned[0].identity, summary={"grown": 1}, seconds=0.0, environment={})
    meta = run.meta("data")
    assert meta is not None
    assert meta["summary"] == {"grown": 1}
    assert (run.stage("data") / "content").exists()
    assert not (run.path / "superseded").exists()
