"""launch=slurm up to sbatch: which jobs there are, what their scripts say, what is submitted, what is refused.

A few lines of shell stand in for SLURM's programs; the real ones run in tests/launch.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron.cli.job import wanted_stages
from minitron.cli.main import main
from minitron.cli.stages import stages_of
from minitron.cli.submit import jobs_of
from minitron.config.compose import compose_run, load_resolved, to_yaml
from minitron.config.run import Device
from minitron.pipeline import outside_hashes, plan_stages
from minitron.runtime.artefact import RunFolder
from minitron.runtime.slurm import job_states, read_jobs

TWO = ["parallel.pipeline_model_parallel_size=2"]
SLURM = ["prune.reconstruct.enabled=false", "launch=slurm", "cluster=generic"]

FAKE = """#!/bin/bash
# Numbers jobs from 101; refuses the one that $REFUSED names; squeue shows what is in the file "queue".
cd "$(dirname "$0")" || exit 1
echo "$(basename "$0") $*" >>calls
case $(basename "$0") in
    sbatch)
        case $* in *"${REFUSED:-nothing}.sbatch") echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac
        echo x >>count
        echo "$((100 + $(wc -l <count)));cluster" ;;
    squeue) cat queue ;;
esac
"""

Compress = Callable[..., int]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the stand-ins; ``calls`` in it has a line for each call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scancel", "squeue"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compress:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text.txt").write_text("A text of some words.\n" * 100)
    text = ["data=files", f"data.paths=[{tmp_path / 'text.txt'}]", "data.seq_length=32", "data.num_workers=1"]

    def run(*overrides: str, verb: str = "compress") -> int:
        return main([verb, "experiment=tiny", f"runs_dir={tmp_path / 'runs'}", *text, *SLURM, *overrides])

    return run


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
        ("distill", ("distill", "eval_distilled"), ("prune",), two),
        ("baseline", ("baseline", "eval_baseline"), ("prune",), two),
        ("export", ("export",), ("distill",), one),
        ("report", ("report",), ("eval_teacher", "verify", "eval_pruned", "baseline", "export"), one),
    ]


def test_steps_of_a_chain() -> None:
    sliced = "prune: {reconstruct: {enabled: false}}"
    jobs = {
        name: (stages, after)
        for name, stages, after, _ in _jobs(f"chain=[{{name: a, {sliced}}}, {{name: b, {sliced}}}]")
    }
    assert jobs["a.score"] == (("steps/a/score",), ("import",))
    assert jobs["a.distill"] == (("steps/a/distill", "steps/a/eval_distilled", "steps/b/score"), ("a.prune",))
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
        "distill.sbatch, after prune",
        "baseline.sbatch, after prune",
        "export.sbatch, after distill",
        "report.sbatch, after eval_teacher, verify, eval_pruned, baseline, export",
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
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=USR1@600
#SBATCH --partition=batch
#SBATCH --account=llm
#SBATCH --nice=10

RUN_JOBS={run}/jobs
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}" # say what went wrong, and nothing else
export NCCL_IB_HCA="${{NCCL_IB_HCA:-=mlx5_0,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_9,mlx5_10,mlx5_11}}" # the eight compute \
cards; the others carry storage and management
export NCCL_SOCKET_IFNAME="${{NCCL_SOCKET_IFNAME:-^lo,docker0}}" # no first contact over an interface that leads nowhere
export PYTORCH_ALLOC_CONF="${{PYTORCH_ALLOC_CONF:-expandable_segments:True}}" # less memory lost between pieces of \
changing size
SRUN_OPTIONS=(
    --container-image=/images/minitron.sqsh
    --container-mounts={cwd}:{cwd},{runs}:{runs},/lustre:/lustre
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
    container = ["launch.container_image=/images/minitron.sqsh", "launch.container_mounts=['/lustre:/lustre']"]
    cluster = ["cluster=dgx_h100", "cluster.account=llm", "launch.dry_run=true"]
    assert compress(*cluster, *layout, *settings, *container) == 0
    scripts = capsys.readouterr().out.split("# ---- ")[1:]
    script = next(part for part in scripts if "/distill.sbatch," in part.splitlines()[0]).partition("\n")[2]
    runs = tmp_path / "runs"
    names = {"cwd": Path.cwd(), "runs": runs, "run": runs / "tiny", "folder": runs / "tiny" / "jobs" / "001"}
    assert script.rstrip("\n") == DGX.format(**names).rstrip("\n")
    alone = next(part for part in scripts if "/prune.sbatch," in part.splitlines()[0])
    for option in ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=14", "--mem=240G", "--time=04:00:00"):
        assert f"#SBATCH {option}\n" in alone
    for absent in ("gpus-per-node", "signal", "exclusive", "NCCL"):
        assert absent not in alone
    assert 'export CUDA_VISIBLE_DEVICES=""' in alone


def test_jobs_are_submitted_in_order(
    compress: Compress, slurm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress(*TWO, "baseline.enabled=false") == 0
    folder = tmp_path / "runs" / "tiny" / "jobs" / "001"
    after = [[], [101], [101], [103], [104], [104], [104], [107], [102, 105, 106, 108]]
    names = ["import", "eval_teacher", "score", "prune", "verify", "eval_pruned", "distill", "export", "report"]
    expected = []
    for name, jobs in zip(names, after, strict=True):
        waits = f"--dependency=afterok:{':'.join(map(str, jobs))} --kill-on-invalid-dep=yes " if jobs else ""
        expected.append(f"sbatch --parsable {waits}{folder / name}.sbatch")
    assert [call for call in (slurm / "calls").read_text().splitlines() if call.startswith("sbatch")] == expected
    assert [(job, name) for job, name, _ in read_jobs(folder.parents[1])] == list(enumerate(names, start=101))
    table = capsys.readouterr().out
    assert "107  distill, eval_distilled  2 x 1      104" in table
    assert "104  prune                    1, CPU     103" in table
    assert load_resolved(folder / "resolved.yaml") == load_resolved(tmp_path / "runs" / "tiny" / "resolved.yaml")
    config = load_resolved(folder / "resolved.yaml")
    assert json.loads((folder / "outside.json").read_text()) == outside_hashes(stages_of(config), config)


def test_a_gpu_cluster_computes_on_gpus(compress: Compress, slurm: Path, tmp_path: Path) -> None:
    assert compress("cluster=dgx_h100", verb="import") == 0
    assert load_resolved(tmp_path / "runs" / "tiny" / "jobs" / "001" / "resolved.yaml").device is Device.cuda


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision=fp8_current"],
            (
                "precision.fp8_recipe=tensorwise needs an NVIDIA GPU of compute capability 8.9 or higher, but the job "
                "has none (cluster.gpus_per_node=0); set precision=bf16"
            ),
        ),
        (
            ["cluster=dgx_h100", "device=cpu", "precision=bf16", "distill.teacher.fp8_recipe=blockwise"],
            (
                "distill.teacher.fp8_recipe=blockwise needs an NVIDIA GPU of compute capability 9.0 or higher, but the "
                "job has none (device=cpu); set precision=bf16"
            ),
        ),
        (
            ["cluster=dgx_a100", "precision=fp8_delayed"],
            (
                "precision.fp8_recipe=delayed cannot run on cluster.gpu=a100: delayed needs compute capability 8.9 or "
                "higher, not 8.0; choose another recipe, or bf16"
            ),
        ),
        (
            ["cluster=dgx_h100", "precision=mxfp8", "prune.hidden_size=64"],
            (
                "precision.fp8_recipe=mxfp8 cannot run on cluster.gpu=h100: mxfp8 needs compute capability 10.0 or "
                "higher and below 12.0, not 9.0"
            ),
        ),
    ],
    ids=["no GPUs", "device=cpu", "A100", "H100"],
)
def test_fp8_that_the_nodes_cannot_do(
    compress: Compress,
    slurm: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    assert compress(*overrides) == 10
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (slurm / "calls").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=fp8_blockwise"],
        ["precision=mxfp8", "prune.hidden_size=64", "cluster.gpu=b200"],
        ["cluster.gpu=null"],
    ],
)
def test_fp8_that_the_nodes_may_do(compress: Compress, slurm: Path, overrides: list[str]) -> None:
    assert compress("cluster=dgx_h100", *overrides, verb="import") == 0


def test_a_rank_refuses_fp8_without_a_gpu(tmp_path: Path) -> None:
    """Its node may be another than the submitting machine was told of; one process alone has no GPU, and needs none."""
    overrides = ["experiment=tiny", "precision=fp8_current", "device=cpu", f"runs_dir={tmp_path / 'runs'}", *SLURM]
    config = compose_run(overrides)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    (tmp_path / "outside.json").write_text(json.dumps({stage.name: {} for stage in stages_of(config)}))
    step = {"PROCID": "0", "STEP_NUM_TASKS": "1", "LOCALID": "0", "STEP_NODELIST": "localhost", "JOB_ID": "5"}
    env = {**os.environ, **{f"SLURM_{name}": value for name, value in step.items()}}

    def rank(stage: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "minitron.cli.worker", tmp_path / "resolved.yaml", stage]
        command.append(tmp_path / "outside.json")
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    refused = rank("distill")
    assert refused.returncode == 10, refused.stderr
    [line] = refused.stderr.splitlines()
    assert line.startswith("error: precision.fp8_recipe=tensorwise needs an NVIDIA GPU")
    assert not (tmp_path / "runs").exists()
    imported = rank("import")
    assert imported.returncode == 0, imported.stderr
    assert (tmp_path / "runs" / "tiny" / "import").is_dir()


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


def test_no_slurm_here(compress: Compress, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert compress(verb="import") == 10
    assert "sbatch cannot be started (No such file or directory); launch=slurm needs a machine that can submit" in (
        capsys.readouterr().err
    )


def test_shells_agree_with_the_scripts(compress: Compress, slurm: Path, tmp_path: Path) -> None:
    """Values with quotes and spaces reach the ranks as they are; shellcheck has nothing to say."""
    assert compress("cluster=dgx_a100", "launch.python='/opt/my python/bin/python'", verb="import") == 0
    folder = tmp_path / "runs" / "tiny" / "jobs" / "001"
    (slurm / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 7\n')
    (slurm / "srun").chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "2"}
    done = subprocess.run(["bash", folder / "import.sbatch"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "job 5 on n1, attempt 1" in done.stdout
    assert "\n/opt/my python/bin/python\n-m\nminitron.cli.worker\n" in done.stdout
    assert "-- ended with exit code 7" in done.stdout
    if shutil.which("shellcheck") is not None:
        scripts = shlex.join([str(folder / "import.sbatch")])
        checked = subprocess.run(f"shellcheck --exclude=SC1091,SC2034 {scripts}", shell=True, check=False)
        assert checked.returncode == 0


@pytest.mark.parametrize(("stops", "code"), [(True, 75), (False, 0)])
def test_a_job_that_stopped_saved_goes_back_into_the_queue(
    compress: Compress, slurm: Path, tmp_path: Path, stops: bool, code: int
) -> None:
    assert compress(verb="import") == 0
    jobs = tmp_path / "runs" / "tiny" / "jobs"
    (jobs / "5.stopped").touch()  # of the attempt before: it says nothing about this one
    leave_mark = (
        f"touch {jobs}/5.stopped; exit 137" if stops else "exit 0"
    )  # cut off while it ended: saved all the same
    (slurm / "srun").write_text(f"#!/bin/bash\n{leave_mark}\n")
    (slurm / "scontrol").write_text(FAKE)
    for name in ("srun", "scontrol"):
        (slurm / name).chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(
        ["bash", jobs / "001" / "import.sbatch"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "attempt 2" in done.stdout
    assert ("scontrol requeue 5" in (slurm / "calls").read_text().splitlines()) == stops
