"""launch=slurm on a real SLURM of a head and two nodes, one rank each; figures against a run in one piece."""

import json
import re
import time
from pathlib import Path

import pytest

from minitron.cli.status import status_of
from minitron.report.search import read_search
from minitron.runtime.slurm import read_jobs
from minitron.runtime.tracking import read_metrics
from tests.launch.cluster import Shown, SlurmCluster
from tests.launch.conftest import Unbroken, losses_of
from tests.launch.hosts import wait_until
from tests.launch.line import NAME, REPOSITORY, TOKENS_PER_STEP, command, environment, minitron

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def _submit(cluster: SlurmCluster, verb: str, runs_dir: Path, *overrides: str) -> dict[str, int]:
    """Submit a verb from the head; numbers of its jobs by name."""
    before = {job for job, _, _ in read_jobs(runs_dir / NAME)}
    words = command(verb, runs_dir, "launch=slurm", "cluster=generic", *overrides)
    env = {**environment(), "SLURM_CONF": cluster.env["SLURM_CONF"]}
    done = cluster.head.run(words, cwd=REPOSITORY, env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: job for job, name, _ in read_jobs(runs_dir / NAME) if job not in before}


def _log(runs_dir: Path, name: str, job: int) -> str:
    (file,) = (runs_dir / NAME / "jobs").glob(f"*/{name}-{job}.log")
    return file.read_text()


def _preflight(log: str) -> dict[str, str]:
    """Result of every check at the start of a job's log, by name; nothing but the job's own line is before it."""
    start, *rows = log.partition("[1/")[0].splitlines()
    assert start.startswith("-- job ")
    columns = [re.split(r"\s{2,}", row.strip()) for row in rows]
    return {words[0]: " ".join(words[1:]) for words in columns if len(words) == 3}


def _wait_for_step(runs_dir: Path, step: int) -> None:
    run = runs_dir / NAME
    wait_until(f"step {step} of distill", lambda: len(losses_of(run)) >= step, timeout_s=400, interval_s=0.05)
    assert not (run / "distill").exists(), "distill is over already"


def test_compress_as_jobs_over_two_nodes(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    jobs = _submit(cluster, "compress", tmp_path)
    names = ["import", "eval_teacher", "score", "distill", "export"]  # verify shares with score, report with export
    assert list(jobs) == names
    ended = cluster.wait(list(jobs.values()), timeout_s=600)
    states = {name: (ended[job].state, ended[job].restarts) for name, job in jobs.items()}
    log = _log(tmp_path, "score", jobs["score"])
    assert states == dict.fromkeys(names, ("COMPLETED", 0)), log
    assert "on node[1-2], attempt 1" in log
    for name, job in jobs.items():
        checks = _preflight(_log(tmp_path, name, job))
        ranks = "1 on node1" if name in ("import", "export") else "2 on 2 hosts"
        assert (checks["ranks"], checks["run folder"]) == (f"ok {ranks}", "ok seen by all ranks"), name
    run = tmp_path / NAME
    assert losses_of(run) == unbroken.losses
    for stage in ("import", "data", "score", "prune", "verify", "distill", "export", "report"):
        here, there = (json.loads((folder / stage / "meta.json").read_text()) for folder in (run, unbroken.run))
        assert here["digest"] == there["digest"], stage
    rows = {row.stage: row for row in status_of(run)}
    assert {row.state for row in rows.values()} == {"done"}
    assert (rows["distill"].step, rows["distill"].num_steps) == (len(unbroken.losses),) * 2


def test_a_job_on_unfit_machines_ends_at_its_preflight(
    cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path
) -> None:
    folder = unbroken.copy_undistilled(tmp_path)
    (job,) = _submit(cluster, "distill", tmp_path, "preflight.min_free_gb=1e9").values()
    ended = cluster.wait([job], timeout_s=120)[job]
    log = _log(tmp_path, "distill", job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", "10:0", 0), log
    checks = _preflight(log)
    assert [name for name, found in checks.items() if found.startswith("FAILED")] == ["disk space"]
    assert log.count("error: preflight: 1 of 10 checks failed: disk space; the table says why") == 1
    assert not (folder / ".partial" / "distill").exists()


def _distilling(cluster: SlurmCluster, unbroken: Unbroken, runs_dir: Path, *overrides: str, step: int) -> int:
    """Number of a job that has come to a step of distill."""
    unbroken.copy_undistilled(runs_dir)
    (job,) = _submit(cluster, "distill", runs_dir, *overrides).values()
    _wait_for_step(runs_dir, step)
    return job


def _went_on(job: int, ended: Shown, unbroken: Unbroken, runs_dir: Path) -> str:
    """The log of a job that was started again once, and came to the figures of the unbroken run."""
    log = _log(runs_dir, "distill", job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log
    assert losses_of(runs_dir / NAME) == unbroken.losses
    return log


NEVER = "distill.train.save_interval_steps=0"
"""Only what is saved when asked can be resumed."""


def test_requeued_in_the_middle_of_distilling(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    """SLURM takes the nodes away: the ranks get SIGTERM and end as they are; the newest saved step counts."""
    job = _distilling(cluster, unbroken, tmp_path, step=60)
    cluster.client("scontrol", "requeue", str(job))
    _went_on(job, cluster.wait([job], timeout_s=500)[job], unbroken, tmp_path)


def test_asked_to_stop_it_saves_and_requeues_itself(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    job = _distilling(cluster, unbroken, tmp_path, NEVER, step=50)
    cluster.client("scancel", "--signal=USR1", str(job))
    log = _went_on(job, cluster.wait([job], timeout_s=500)[job], unbroken, tmp_path)
    assert "stopped after step" in log
    assert "stopped and saved: back into the queue" in log


def test_tokenizing_saves_and_requeues_itself_too(cluster: SlurmCluster, tmp_path: Path) -> None:
    slurm, here = tmp_path / "slurm", tmp_path / "here"
    sources = [source.read_text() for source in sorted((REPOSITORY / "minitron").rglob("*.py"))]
    lines = [json.dumps({"text": f"{number}\n{source}"}) for number in range(12) for source in sources]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    text = [f"data.paths=[{tmp_path}/text.jsonl]", "data.max_bytes=null"]
    for runs_dir in (slurm, here):
        done = minitron("import", runs_dir, *text)
        assert done.returncode == 0, done.stderr
    (job,) = _submit(cluster, "data", slurm, *text).values()
    ids = slurm / NAME / ".partial" / "data" / "train.bin"
    wait_until("some ids", lambda: ids.exists() and ids.stat().st_size > 2**20, timeout_s=200, interval_s=0.05)
    cluster.client("scancel", "--signal=USR1", str(job))
    ended = cluster.wait([job], timeout_s=300)[job]
    log = _log(slurm, "data", job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log
    assert "documents, saved; the same command goes on from there" in log
    done = minitron("data", here, *text)
    assert done.returncode == 0, done.stderr
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "data.json"):
        assert (slurm / NAME / "data" / name).read_bytes() == (here / NAME / "data" / name).read_bytes(), name


def _preempt(cluster: SlurmCluster, job: int, folder: Path) -> Shown:
    """Let a job of a queue that goes first take the nodes for a moment; what the job that had them has come to."""
    output = f"--output={folder}/urgent.log"
    words = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", output, "--wrap=srun sleep 5"]
    urgent = int(cluster.client("sbatch", *words))
    ended = cluster.wait([urgent, job], timeout_s=500)
    assert ended[urgent].state == "COMPLETED", (folder / "urgent.log").read_text()
    return ended[job]


def test_preempted_it_goes_back_into_the_queue(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    """In the queue's GraceTime the ranks get SIGTERM and end as they are; the newest saved step counts."""
    job = _distilling(cluster, unbroken, tmp_path, step=60)
    log = _went_on(job, _preempt(cluster, job, tmp_path), unbroken, tmp_path)
    assert "preempted: back into the queue" in log


def test_preempted_it_saves_first_where_slurm_sends_the_job_s_signal(
    cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path
) -> None:
    with cluster.configured("SlurmctldParameters=preempt_send_user_signal"):
        job = _distilling(cluster, unbroken, tmp_path, NEVER, step=50)
        ended = _preempt(cluster, job, tmp_path)
    assert "stopped after step" in _went_on(job, ended, unbroken, tmp_path)


def test_search_as_a_job(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    """Stopped while a candidate is distilled, it requeues itself and finds what a search in one piece does."""
    grid = ["search.grid.hidden_size=[48,56]", f"search.num_tokens={40 * TOKENS_PER_STEP}", "search.eval_tokens=1024"]
    slurm, here = tmp_path / "slurm", tmp_path / "here"
    for runs_dir in (slurm, here):
        unbroken.copy_undistilled(runs_dir)
    jobs = _submit(cluster, "search", slurm, *grid)
    assert list(jobs) == ["search"]  # what comes before the candidates is done
    place = slurm / NAME / ".partial" / "search"
    wait_until(
        "a candidate's step 10",
        lambda: any(len(read_metrics(file.parent)) >= 10 for file in place.rglob("metrics.jsonl")),
        timeout_s=400,
    )
    cluster.client("scancel", "--signal=USR1", str(jobs["search"]))
    ended = cluster.wait([jobs["search"]], timeout_s=500)[jobs["search"]]
    log = _log(slurm, "search", jobs["search"])
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log
    assert "stopped and saved: back into the queue" in log
    assert {row.state for row in status_of(slurm / NAME) if row.job == jobs["search"]} == {"done"}
    done = minitron("search", here, *grid)
    assert done.returncode == 0, done.stderr
    found, expected = (read_search(runs_dir / NAME / "search" / "result") for runs_dir in (slurm, here))
    assert found == expected


def test_preflight_as_a_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    for overrides, code in ([], "0:0"), (["preflight.min_free_gb=1e9"], "10:0"):
        runs_dir = tmp_path / f"{len(overrides)}"
        before = {int(word) for word in cluster.client("squeue", "-h", "--states=all", "-o", "%i").split()}
        assert _submit(cluster, "preflight", runs_dir, *overrides) == {}  # no stage of the run
        after = {int(word) for word in cluster.client("squeue", "-h", "--states=all", "-o", "%i").split()}
        (job,) = after - before
        ended = cluster.wait([job], timeout_s=120)[job]
        log = _log(runs_dir, "preflight", job)
        assert (ended.exit_code, ended.restarts) == (code, 0), log
        assert re.search(r"ranks +ok +2 on 2 hosts", log), log


def test_time_limit(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    """A run longer than its job's two minutes is asked to save, requeues itself, and goes on from the saved step."""
    unbroken.copy_undistilled(tmp_path)
    num_steps = 1600
    longer = [f"distill.train.num_tokens={num_steps * TOKENS_PER_STEP}", NEVER]
    limits = ["launch.time_limit=00:02:00", "launch.signal_lead_s=60"]
    started = time.monotonic()
    (job,) = _submit(cluster, "distill", tmp_path, *longer, *limits).values()
    wait_until("a restart", lambda: cluster.show(job).restarts > 0, timeout_s=300, interval_s=0.5)
    log = _log(tmp_path, "distill", job)
    assert "stopped after step" in log
    assert time.monotonic() - started < 120, "that was the limit itself"
    ended = cluster.wait([job], timeout_s=600)[job]
    log = _log(tmp_path, "distill", job)
    assert (ended.state, log.count("stopped after step")) == ("COMPLETED", ended.restarts), log
    whole = tmp_path / "whole"
    unbroken.copy_undistilled(whole)
    done = minitron("distill", whole, *longer)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / NAME) == losses_of(whole / NAME)


def test_a_failed_job_cancels_those_that_wait_for_it(cluster: SlurmCluster, unbroken: Unbroken, tmp_path: Path) -> None:
    folder = unbroken.copy_undistilled(tmp_path)
    weights = next((folder / "prune" / "weights").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:100])
    jobs = _submit(cluster, "compress", tmp_path)
    assert list(jobs) == ["distill", "export"]  # which takes report along: it waits for nothing else
    ended = cluster.wait(list(jobs.values()), timeout_s=200)
    assert [(ended[job].state, ended[job].restarts) for job in jobs.values()] == [
        ("FAILED", 0),
        ("CANCELLED", 0),
    ]
    assert ended[jobs["distill"]].exit_code != "0:0"
    assert not (folder / "distill").exists()
