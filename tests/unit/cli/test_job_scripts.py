"""The scripts of SLURM jobs, run by a shell: stand-ins for SLURM's programs say what becomes of the ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import FAKE, Compress


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
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert shellcheck.exists()
    scripts = [folder / "import.sbatch", folder / "common.sh"]
    checked = subprocess.run(
        [shellcheck, "--exclude=SC1091,SC2034", *scripts], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_variables_and_a_held_back_signal_reach_the_ranks(compress: Compress, slurm: Path, tmp_path: Path) -> None:
    """In a container its image's values count for more than the job's, which therefore are given once more."""
    spaced = "+cluster.variables={OUR_SWITCHES: {value: 'a b  c=d', why: spaces}}"
    rank = tmp_path / "my rank"
    rank.write_text('#!/bin/bash\nkill -USR1 $$\necho "<$OUR_SWITCHES> <$OMP_NUM_THREADS>" "$2"\n')
    rank.chmod(0o755)
    assert compress(spaced, f"launch.python='{rank}'", verb="preflight") == 0
    (slurm / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexport OUR_SWITCHES=image OMP_NUM_THREADS=1\nexec "$@"\n'
    )
    (slurm / "srun").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "3"}
    script = tmp_path / "runs" / "tiny" / "jobs" / "001" / "preflight.sbatch"
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\n<a b  c=d> <3> minitron.cli.worker\n" in done.stdout


def test_a_job_ends_with_the_code_of_the_error_not_of_the_ranks_that_it_cut_off(
    compress: Compress, slurm: Path, tmp_path: Path
) -> None:
    assert compress(verb="import") == 0
    jobs = tmp_path / "runs" / "tiny" / "jobs"
    (jobs / "5.code").write_text("3\n")  # of the attempt before
    (slurm / "srun").write_text(f"#!/bin/bash\n[ -e {jobs}/5.code ] || echo 10 >{jobs}/5.code\nexit 143\n")
    (slurm / "srun").chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash", jobs / "001" / "import.sbatch"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 10, done.stderr
    assert "-- ended with exit code 10" in done.stdout
    assert "requeue" not in (slurm / "calls").read_text()


@pytest.mark.parametrize(("since", "code"), [("2026-11-28T10:34:00", 75), ("None", 10)])
def test_a_job_that_slurm_takes_off_its_nodes_goes_back_into_the_queue(
    compress: Compress, slurm: Path, tmp_path: Path, since: str, code: int
) -> None:
    """Whatever the ranks made of SIGTERM, such as a lost peer; one that was done by then is done."""
    assert compress(verb="import") == 0
    jobs = tmp_path / "runs" / "tiny" / "jobs"
    shown = f"JobId=5 PreemptEligibleTime=2026-11-28T10:33:49 PreemptTime={since} SuspendTime=None"
    (slurm / "scontrol").write_text(f"{FAKE}\necho '{shown}'\n")
    (slurm / "scontrol").chmod(0o755)
    env = {**os.environ, "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1"}
    for ranks, ended in ((f"echo 10 >{jobs}/5.code; exit 143", code), ("exit 0", 0)):
        (slurm / "srun").write_text(f"#!/bin/bash\n{ranks}\n")
        (slurm / "srun").chmod(0o755)
        script = ["bash", jobs / "001" / "import.sbatch"]
        done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == ended, done.stderr
        assert ("preempted: back into the queue" in done.stdout) == (ended == 75)
    assert (slurm / "calls").read_text().splitlines().count("scontrol requeue 5") == (code == 75)


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
