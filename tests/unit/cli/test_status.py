"""`minitron status` on a run folder made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.cli.main import main
from minitron.cli.status import StageStatus, status_of
from minitron.cli.submit import refuse_while_running
from minitron.config.compose import compose_run, to_yaml
from minitron.errors import PlatformError
from minitron.runtime.artefact import RunFolder

TINY = ["experiment=tiny", "distill.train.num_tokens=25600"]  # 100 steps of 8 x 32 tokens


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """prune is done, distill at step 40, its job runs; export waits, and so does a step of a chain."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(to_yaml(compose_run(TINY)))
    for stage, seconds, finished in (("prune", 75.0, "2026-01-02T00:00:00"), ("import", 3.0, "2026-01-01T00:00:00")):
        (folder / stage).mkdir()
        (folder / stage / "meta.json").write_text(json.dumps({"seconds": seconds, "finished": finished, "digest": "d"}))
    partial = folder / ".partial" / "distill"
    partial.mkdir(parents=True)
    (partial / "digest").write_text("d")
    records = [{"step": 20, "loss": 3.0, "tokens_per_s": 1.0}, {"step": 40, "loss": 2.5, "tokens_per_s": 1280.0}]
    (partial / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def jobs(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's jobs and what squeue says of them."""
    submitted = [(12, "prune", ["prune"]), (15, "distill", ["distill", "eval_distilled"]), (13, "export", ["export"])]
    for number, names in (("001", submitted[:1]), ("002", submitted[1:])):
        (run / "jobs" / number).mkdir(parents=True)
        content = [{"job_id": job, "name": name, "stages": stages} for job, name, stages in names]
        (run / "jobs" / number / "jobs.json").write_text(json.dumps(content))
    folder = run.parents[1] / "bin"
    folder.mkdir()
    said = "15|RUNNING|1:00:00|None\n13|PENDING|4:00:00|Dependency\n"
    (folder / "squeue").write_text(f"#!/bin/sh\nprintf '{said}'\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_stages_steps_and_jobs(run: Path, jobs: Path) -> None:
    assert status_of(run) == [
        StageStatus("prune", "done", 12, seconds=75.0),
        # 60 steps of 256 tokens at 1280 tokens/s
        StageStatus("distill", "running", 15, "job ends in 1:00:00", step=40, num_steps=100, loss=2.5, seconds=12.0),
        StageStatus("eval_distilled", "waiting", 15),
        StageStatus("export", "waiting", 13, "Dependency"),
        StageStatus("import", "done", seconds=3.0),
    ]


def test_without_slurm(run: Path) -> None:
    assert status_of(run) == [
        StageStatus("import", "done", seconds=3.0),
        StageStatus("prune", "done", seconds=75.0),
        StageStatus("distill", "begun", step=40, num_steps=100, loss=2.5, seconds=12.0),
    ]


def test_stages_that_nobody_has_begun(run: Path) -> None:
    (run / "wanted.json").write_text(json.dumps(["import", "prune", "distill", "export", "report"]))
    assert [(row.stage, row.state) for row in status_of(run)] == [
        ("import", "done"),
        ("prune", "done"),
        ("distill", "begun"),
        ("export", "waiting"),
        ("report", "waiting"),
    ]


def test_slurm_that_does_not_answer(run: Path, jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (jobs / "squeue").write_text("#!/bin/sh\necho 'squeue: error: slurm_load_jobs: Unable to contact' >&2; exit 1\n")
    assert {row.stage: row.state for row in status_of(run)}["distill"] == "begun"
    assert "SLURM does not answer (squeue: error: slurm_load_jobs: Unable to contact)" in capsys.readouterr().err
    with pytest.raises(PlatformError, match="try again"):  # a second set of jobs is not handed in on a guess
        refuse_while_running(RunFolder(run))


def test_a_failed_job(run: Path, jobs: Path) -> None:
    (jobs / "squeue").write_text("#!/bin/sh\nprintf '15|FAILED|0:00|NonZeroExitCode\n13|CANCELLED|0:00|Dependency\n'\n")
    shown = {row.stage: (row.state, row.note) for row in status_of(run)}
    assert shown["distill"] == ("failed", "NonZeroExitCode")
    assert shown["export"] == ("cancelled", "Dependency")


def _stand_in(jobs: Path, name: str, said: str, code: int = 0) -> None:
    (jobs / name).write_text(f"#!/bin/sh\nprintf '{said}'\nexit {code}\n")
    (jobs / name).chmod(0o755)


def test_jobs_that_squeue_has_forgotten(run: Path, jobs: Path) -> None:
    """MinJobAge after its end a job is known to the accounting only, where a cluster has one."""
    _stand_in(jobs, "squeue", "13|PENDING|4:00:00|Dependency\\n")
    _stand_in(jobs, "sacct", "", 1)  # Slurm accounting storage is disabled
    unknown = {row.stage: row.state for row in status_of(run)}
    assert unknown["distill"] == unknown["eval_distilled"] == "unknown to SLURM"
    assert (unknown["prune"], unknown["export"]) == ("done", "waiting")
    for said, shown in (
        ("FAILED|NonZeroExitCode", ("failed", "NonZeroExitCode")),
        ("CANCELLED by 1000|None", ("cancelled", "")),
        ("RUNNING|None", ("unknown to SLURM", "")),  # an end that was never accounted
    ):
        _stand_in(jobs, "sacct", f"15|{said}\\n")
        assert {row.stage: (row.state, row.note) for row in status_of(run)}["distill"] == shown


def test_printed_without_torch(run: Path, jobs: Path) -> None:
    code = (
        "import sys; from minitron.cli.main import main; main(['status', sys.argv[1]]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[2] == [
        "distill",
        "running",
        "15",
        "40/100",
        "2.5000",
        "12",
        "s",
        "left",
        "job",
        "ends",
        "in",
        "1:00:00",
    ]
    assert lines[1] == ["prune", "done", "12", "1", "min", "15", "s"]
    assert lines[-1] == ["False"]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 8
    assert f"{tmp_path} is not a run's folder (it has no resolved.yaml); give one" in capsys.readouterr().err


def test_a_search_s_stages(run: Path) -> None:
    for stage in ("search/L3-h64/prune", "search/result"):
        (run / stage).mkdir(parents=True)
        (run / stage / "meta.json").write_text(json.dumps({"seconds": 5, "finished": "2026-01-03", "digest": "d"}))
    (run / "superseded" / "prune").mkdir(parents=True)
    (run / "superseded" / "prune" / "meta.json").write_text("{}")
    done = {row.stage for row in status_of(run) if row.state == "done"}
    assert done == {"import", "prune", "search/L3-h64/prune", "search/result"}


def test_steps_of_a_candidate(run: Path) -> None:
    folder = run / ".partial" / "search" / "L3-h64" / "distill_40"
    folder.mkdir(parents=True)
    (folder / "digest").write_text("d")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 30, "loss": 2.0, "tokens_per_s": 512.0}) + "\n")
    [row] = [row for row in status_of(run) if row.stage.startswith("search/")]
    # 10 steps of 256 tokens at 512 tokens/s
    assert (row.state, row.step, row.num_steps, row.loss, row.seconds) == ("begun", 30, 40, 2.0, 5.0)


def test_a_configuration_of_another_version_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "resolved.yaml"
    file.write_text(file.read_text() + "no_such_key: 1\n")
    assert main(["status", str(run)]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert "resolved.yaml was not written by this version of minitron" in line
