"""launch=slurm up to sbatch: which jobs there are, what their scripts say, what is submitted, what is refused.

A few lines of shell stand in for SLURM's programs; the real ones run in tests/launch.
"""

import json
from pathlib import Path

import pytest

from minitron.cli.job import wanted_stages
from minitron.cli.stages import stages_of
from minitron.cli.status import status_of
from minitron.cli.submit import jobs_of
from minitron.config.compose import compose_run, load_resolved
from minitron.pipeline import outside_hashes, plan_stages
from minitron.runtime.artefact import RunFolder, read_wanted
from minitron.runtime.slurm import job_states, read_jobs
from tests.unit.cli.conftest import SLURM, Compress

TWO = ["parallel.pipeline_model_parallel_size=2"]


def _jobs(*overrides: str) -> list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[int, int]]]:
    config = compose_run(["experiment=tiny", *SLURM, *overrides])
    stages = stages_of(config)
    wanted = wanted_stages("compress", config)
    planned = plan_stages(stages, config, RunFolder(Path("/nowhere")), wanted, {stage.name: {} for stage in stages})
    return [(job.name, job.stages, job.after, (job.nodes, job.ranks_per_node)) for job in jobs_of(planned, config)]


def test_jobs_are_the_stages_with_what_they_wait_for() -> None:
    one, two = (1, 1), (2, 1)
    assert _jobs(*TWO) == [
        ("import", ("import", "data"), (), one),
        ("eval_teacher", ("eval_teacher",), ("import",), two),
        ("score", ("score",), ("import",), two),
        ("prune", ("prune",), ("score",), one),
        ("verify", ("verify",), ("prune",), two),
        ("eval_pruned", ("eval_pruned",), ("prune",), two),
        ("distill", ("distill", "eval_distilled"), ("eval_teacher", "verify"), two),
        ("baseline", ("baseline", "eval_baseline"), ("eval_teacher", "prune"), two),
        ("export", ("export",), ("distill",), one),
        ("report", ("report",), ("eval_pruned", "baseline", "export"), one),
    ]


def test_steps_of_a_chain() -> None:
    sliced = "prune: {reconstruct: {enabled: false}}"
    jobs = {
        name: (stages, after)
        for name, stages, after, _ in _jobs(f"chain=[{{name: a, {sliced}}}, {{name: b, {sliced}}}]")
    }
    assert jobs["a.score"] == (("steps/a/score",), ("import",))
    assert jobs["a.distill"] == (
        ("steps/a/distill", "steps/a/eval_distilled", "steps/b/score"),
        ("eval_teacher", "a.verify"),
    )
    assert jobs["b.prune"] == (("steps/b/prune",), ("a.distill",))


def test_dry_run_prints_every_script_and_writes_nothing(
    compress: Compress, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress("launch.dry_run=true", *TWO) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert [line.split("/")[-1] for line in out.splitlines() if line.startswith("# ---- ")] == [
        "import.sbatch",
        "eval_teacher.sbatch, after import",
        "score.sbatch, after import",
        "prune.sbatch, after score",
        "verify.sbatch, after prune",
        "eval_pruned.sbatch, after prune",
        "distill.sbatch, after eval_teacher, verify",
        "baseline.sbatch, after eval_teacher, prune",
        "export.sbatch, after distill",
        "report.sbatch, after eval_pruned, baseline, export",
    ]
    assert out.count("#!/bin/bash\n") == 10


DGX = """\
#!/bin/bash
# minitron: distill, eval_distilled. Submitted in {cwd}
#SBATCH --job-name=tiny-distill
#SBATCH --output={folder}/distill-%j.log
#SBATCH --open-mode=append
#SBATCH --chdir={cwd}
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=14
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@600
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --partition=batch
#SBATCH --account=llm
#SBATCH --nice=10

RUN_JOBS={run}/jobs
export MELLANOX_VISIBLE_DEVICES="${{MELLANOX_VISIBLE_DEVICES:-all}}" # InfiniBand in containers \
of sites that restrict /dev
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}" # say what went wrong, and nothing else
export NCCL_IB_HCA="${{NCCL_IB_HCA:-=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11}}" # the eight compute \
cards; the others carry storage and management
export PYTORCH_ALLOC_CONF="${{PYTORCH_ALLOC_CONF:-expandable_segments:True}}" # less memory lost between pieces of \
changing size
RANK_VARIABLES=(MELLANOX_VISIBLE_DEVICES NCCL_DEBUG NCCL_IB_HCA PYTORCH_ALLOC_CONF)
SRUN_OPTIONS=(
    --cpu-bind=none
    --container-image=/images/minitron.sqsh
    --container-mounts={cwd}:{cwd},{runs}:{runs},/lustre:/lustre,{text}
    --container-workdir={cwd}
    --no-container-mount-home)

. "{folder}/common.sh"

say_where
run_ranks python \\
    -m \\
    minitron.cli.worker \\
    {folder}/resolved.yaml \\
    distill,eval_distilled \\
    {folder}/outside.json
go_on_or_end
"""


def test_script_of_a_dgx_job(compress: Compress, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layout = [*TWO, "parallel.data_parallel_size=8", "distill.train.micro_batch_size=1"]
    settings = ["launch.time_limit=1-00:00:00", "launch.signal_lead_s=600", "cluster.options=['--nice=10']"]
    container = [
        "launch.container_image=/images/minitron.sqsh",
        f"launch.container_mounts=['/lustre:/lustre',{tmp_path}]",
    ]
    cluster = ["cluster=dgx_h100", "cluster.account=llm", "launch.dry_run=true"]
    assert compress(*cluster, *layout, *settings, *container) == 0
    scripts = capsys.readouterr().out.split("# ---- ")[1:]
    script = next(part for part in scripts if "/distill.sbatch," in part.splitlines()[0]).partition("\n")[2]
    runs = tmp_path / "runs"
    names = {
        "cwd": Path.cwd(),
        "text": tmp_path,
        "runs": runs,
        "run": runs / "tiny",
        "folder": runs / "tiny" / "jobs" / "001",
    }
    assert script.rstrip("\n") == DGX.format(**names).rstrip("\n")
    alone = next(part for part in scripts if "/prune.sbatch," in part.splitlines()[0])
    for option in (
        "--nodes=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=14",
        "--mem=240G",
        "--signal=USR1@600",
        "--time=04:00:00",
    ):
        assert f"#SBATCH {option}\n" in alone
    for absent in ("gpus-per-node", "exclusive", "NCCL"):
        assert absent not in alone
    assert 'export CUDA_VISIBLE_DEVICES=""' in alone


def test_jobs_are_submitted_in_order(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress(*TWO, "baseline.enabled=false") == 0
    folder = tmp_path / "runs" / "tiny" / "jobs" / "001"
    after = [[], [101], [101], [103], [104], [104], [102, 105], [107], [106, 108]]
    names = ["import", "eval_teacher", "score", "prune", "verify", "eval_pruned", "distill", "export", "report"]
    expected = []
    for name, jobs in zip(names, after, strict=True):
        waits = f"--dependency=afterok:{':'.join(map(str, jobs))} --kill-on-invalid-dep=yes " if jobs else ""
        expected.append(f"sbatch --parsable {waits}{folder / name}.sbatch")
    assert [call for call in (slurm / "calls").read_text().splitlines() if call.startswith("sbatch")] == expected
    assert [(job, name) for job, name, _ in read_jobs(folder.parents[1])] == list(enumerate(names, start=101))
    table = capsys.readouterr().out
    assert "107  distill, eval_distilled  2 x 1      102, 105" in table
    assert "104  prune                    1, CPU     103" in table
    assert load_resolved(folder / "resolved.yaml") == load_resolved(tmp_path / "runs" / "tiny" / "resolved.yaml")
    config = load_resolved(folder / "resolved.yaml")
    assert json.loads((folder / "outside.json").read_text()) == outside_hashes(stages_of(config), config)


GRID = ["search.grid.hidden_size=[48,56]", "search.num_tokens=2048", "search.eval_tokens=512"]


def test_a_search_is_one_job_after_what_one_process_does(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress(*TWO, *GRID, "launch.dry_run=true", verb="search") == 0
    out = capsys.readouterr().out
    assert out.startswith("search: 2 shapes, 2 candidates\n# the nodes have no GPUs")
    assert "import.sbatch\n" in out
    assert "search.sbatch, after import\n" in out
    assert not (tmp_path / "runs").exists()
    assert compress(*TWO, *GRID, verb="search") == 0
    run = tmp_path / "runs" / "tiny"
    stages = ["eval_teacher", "score", "search"]
    assert read_jobs(run) == [(101, "import", ["import", "data"]), (102, "search", stages)]
    assert (
        f"sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {run}/jobs/001/search.sbatch"
        in (slurm / "calls").read_text()
    )
    script = (run / "jobs" / "001" / "search.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    assert f"{run}/jobs/001/resolved.yaml \\\n    eval_teacher,score,search \\\n" in script
    (slurm / "queue").write_text("101|PENDING|1:00|Priority\n102|PENDING|1:00|Dependency\n")
    assert [(row.stage, row.state, row.job) for row in status_of(run)] == [
        ("import", "waiting", 101),
        ("data", "waiting", 101),
        ("eval_teacher", "waiting", 102),
        ("score", "waiting", 102),
        ("search/result", "waiting", 102),
    ]
    capsys.readouterr()
    assert compress(*TWO, *GRID, verb="search") == 8
    assert "has jobs in the queue (101 102)" in capsys.readouterr().err
    assert compress(*TWO, *GRID, "search.workers=2", verb="search") == 3
    assert "search.workers=2 starts ranks of its own, on this machine; set it to 1 with torchrun and SLURM" in (
        capsys.readouterr().err
    )


def test_a_preflight_is_a_job_of_the_whole_allocation_beside_others(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    assert compress(verb="import") == 0
    (slurm / "queue").write_text("101|PENDING|1:00|Priority\n")
    capsys.readouterr()
    assert compress(*TWO, verb="preflight") == 0
    assert "102  preflight  2 x 1      -" in capsys.readouterr().out
    assert f"sbatch --parsable {run}/jobs/002/preflight.sbatch" in (slurm / "calls").read_text()
    script = (run / "jobs" / "002" / "preflight.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert f"{run}/jobs/002/resolved.yaml \\\n    preflight \\\n" in script
    assert read_jobs(run) == [(101, "import", ["import"])]
    assert read_wanted(run) == ["import"]
    assert load_resolved(run / "resolved.yaml").parallel.pipeline_model_parallel_size == 1  # import's, as it was
    assert "#SBATCH --time=01:00:00\n" in script  # its ranks wait half an hour for each other
    assert compress("cluster=dgx_a100", "precision=fp8_current", verb="preflight") == 10
    assert "cannot run on cluster.gpu=a100" in capsys.readouterr().err


def test_values_with_spaces_reach_sbatch_in_one_piece(
    compress: Compress, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spaced = [f"runs_dir='{tmp_path}/my runs'", "cluster.account='large models'", "cluster.options=['--comment=a b']"]
    assert compress(*spaced, "launch.dry_run=true", verb="import") == 0
    script = capsys.readouterr().out
    assert f'#SBATCH --output="{tmp_path}/my runs/tiny/jobs/001/import-%j.log"\n' in script
    assert '#SBATCH --account="large models"\n' in script
    assert '#SBATCH --comment="a b"\n' in script


def test_a_variable_of_one_s_own(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    dry = ["cluster=dgx_h100", "launch.dry_run=true", "parallel.data_parallel_size=8"]
    dry += ["distill.train.micro_batch_size=1"]
    assert compress(*dry, "+cluster.variables={NCCL_IB_TC: {value: 106, why: our switches}}") == 0
    out = capsys.readouterr().out
    assert 'export NCCL_IB_TC="${NCCL_IB_TC:-106}" # our switches\n' in out
    assert 'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"' in out  # the cluster's own are kept
    for words in ("+cluster.variables.A.value=1", "cluster.variables={A: {value: 1, why: b}}", "cluster.variables.A=1"):
        assert compress(*dry, words) == 3
        assert "add a variable with '+cluster.variables={NAME: {value: ..., why: ...}}'" in capsys.readouterr().err
    for words, said in (("{A: {value: '$(id)', why: b}}", "'$(id)'"), ("{A B: {value: 1, why: b}}", "'A B'")):
        assert compress(*dry, f"+cluster.variables={words}") == 3
        assert said in capsys.readouterr().err


def test_a_cluster_without_slurm_is_refused(compress: Compress, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress("launch=local", "cluster.account=llm") == 3
    assert "cluster=generic is read with launch=slurm only, but launch=local; leave it out" in capsys.readouterr().err


def test_a_refused_job_takes_back_those_before_it(
    compress: Compress, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFUSED", "score")
    assert compress() == 10
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch refuses ")
    assert "/score.sbatch: sbatch: error: invalid partition; change cluster=, cluster.* or launch.*" in error
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 101 102"


def test_a_run_with_jobs_in_the_queue_is_left_alone(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress(verb="import") == 0
    (slurm / "queue").write_text("101|PENDING|1:00|Priority\n")
    assert compress(verb="import") == 8
    assert f"{tmp_path / 'runs' / 'tiny'} has jobs in the queue (101); wait for them" in capsys.readouterr().err
    (slurm / "queue").write_text("101|FAILED|0:00|NonZeroExitCode\n")
    assert job_states([101])[101].is_over
    assert compress(verb="import") == 0
    assert (tmp_path / "runs" / "tiny" / "jobs" / "002" / "import.sbatch").exists()


def test_no_slurm_here(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert compress(verb="import") == 10
    assert "sbatch cannot be started (No such file or directory); launch=slurm needs a machine that can submit" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: fetch_config: DNS SRV lookup failed\nsbatch: fatal: Could not establish a configuration source",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ],
)
def test_no_cluster_behind_sbatch(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, said: str
) -> None:
    (slurm / "sbatch").write_text(f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")
    assert compress(verb="import") == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: SLURM's controller was not reached (sbatch: ")
    assert line.endswith("submit from a machine of the cluster, and see SLURM_CONF and `scontrol ping`")
    assert not list(tmp_path.glob("runs/tiny/jobs/*"))
