"""Jobs of a SLURM cluster: their scripts, submitting them in order, and asking what has become of them."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import minitron
from minitron.config.launch import ClusterConfig, LaunchConfig
from minitron.errors import ConfigError, PlatformError

SCRIPT_TEMPLATE = "stage.sbatch"
COMMON_SCRIPT = "common.sh"
JOBS_DIR = "jobs"
JOBS_FILE = "jobs.json"


_UNREACHED = ("Could not establish a configuration source", "Unable to contact slurm controller")
"""What SLURM's programs say where they find no cluster, or its controller does not answer."""


class NoSlurmError(PlatformError):
    """There is no SLURM to hand jobs to."""


@dataclass(frozen=True)
class Job:
    """Stages that one SLURM job runs, one after the other.

    Attributes:
        name: Name of the job, and of its script and log.
        stages: Names of the stages.
        after: Names of the jobs that must have succeeded.
        nodes: Hosts.
        ranks_per_node: Processes on each.
        alone: One process on CPUs does it.
    """

    name: str
    stages: tuple[str, ...]
    after: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    alone: bool


@dataclass(frozen=True)
class Place:
    """Where the jobs of a run work.

    Attributes:
        cwd: Working folder, absolute.
        run: The run's folder, absolute.
        folder: Folder of one submission: configuration, scripts, logs.
        python: Interpreter on the nodes.
    """

    cwd: Path
    run: Path
    folder: Path
    python: str


def template_dir() -> Path:
    """Folder of the scripts' templates: inside an installed package, or beside it in a checkout.

    Raises:
        PlatformError: Neither is there.
    """
    package = Path(minitron.__file__).parent
    for folder in (package / "launch" / "slurm", package.parent / "launch" / "slurm"):
        if (folder / SCRIPT_TEMPLATE).exists():
            return folder
    raise PlatformError(f"no launch/slurm/{SCRIPT_TEMPLATE} in {package} or beside it; install minitron again")


def render_script(
    job: Job, arguments: Sequence[str], place: Place, launch: LaunchConfig, cluster: ClusterConfig
) -> str:
    """The script of a job, for sbatch.

    Args:
        job: What it runs.
        arguments: Arguments of every rank's worker.
        place: Where.
        launch: Time limits, container.
        cluster: Queue, account, size of a node, environment.
    """
    template = (template_dir() / SCRIPT_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    command = [place.python, "-m", "minitron.cli.worker", *arguments]
    return environment.from_string(template).render(
        title=f"minitron: {', '.join(job.stages)}. Submitted in {place.cwd}",
        header="\n".join(f"#SBATCH {option}" for option in _header(job, place, launch, cluster)),
        environment=_environment(job, place, launch, cluster),
        folder=place.folder,
        command=" \\\n    ".join(shlex.quote(word) for word in command),
    )


def _header(job: Job, place: Place, launch: LaunchConfig, cluster: ClusterConfig) -> list[str]:
    """Options of sbatch; the signal goes to the ranks, not to the script, so no ``B:``."""
    partition = (cluster.alone_partition or cluster.partition) if job.alone else cluster.partition
    options = [
        f"--job-name={place.run.name}-{job.name}",
        f"--output={place.folder}/{job.name}-%j.log",
        "--open-mode=append",
        f"--chdir={place.cwd}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.ranks_per_node}",
        f"--cpus-per-task={cluster.alone_cpus if job.alone else cluster.cpus_per_rank}",
        f"--time={launch.alone_time_limit if job.alone else launch.time_limit}",
        "--requeue",
        f"--signal=USR1@{launch.signal_lead_s}",
    ]
    if job.alone:
        options += [f"--mem={cluster.alone_memory}"] if cluster.alone_memory else []
    else:
        options += [f"--gpus-per-node={job.ranks_per_node}"] if cluster.gpus_per_node else []
        options += ["--exclusive", "--mem=0"] if cluster.exclusive else []
    for name, value in (("partition", partition), ("account", cluster.account), ("qos", cluster.qos)):
        options += [f"--{name}={value}"] if value else []
    return [_one_word(option) for option in (*options, *cluster.options)]


def _one_word(option: str) -> str:
    """An option of sbatch whose value may have spaces."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if any(letter.isspace() for letter in value) else option


def _environment(job: Job, place: Place, launch: LaunchConfig, cluster: ClusterConfig) -> str:
    lines = [f"RUN_JOBS={shlex.quote(str(place.run / JOBS_DIR))}"]
    if job.alone:
        lines.append('export CUDA_VISIBLE_DEVICES="" # one process on the CPU')
    else:
        for name, variable in sorted(cluster.variables.items()):
            default = f'export {name}="${{{name}:-{variable.value}}}"'
            lines.append(f"{default} # {variable.why}" if variable.why else default)
    options = []
    if not job.alone and cluster.gpus_per_node:
        options.append("--cpu-bind=none")  # by default every other rank gets cores of the socket away from its GPU
    if launch.container_image:
        if job.alone or not cluster.gpus_per_node:
            lines.append('export NVIDIA_VISIBLE_DEVICES="void" # or enroot ends where there is no driver')
        options += [
            f"--container-image={container_image(launch.container_image, place.cwd)}",
            f"--container-mounts={','.join(mounts(place, launch))}",
            f"--container-workdir={place.cwd}",
            "--no-container-mount-home",
        ]
    lines.append(f"RANK_VARIABLES=({'' if job.alone else ' '.join(sorted(cluster.variables))})")
    words = "".join(f"\n    {shlex.quote(option)}" for option in options)
    lines.append(f"SRUN_OPTIONS=({words})")
    return "\n".join(lines)


def container_image(image: str, cwd: Path) -> str:
    """The image as pyxis takes it: a name that begins with neither ``/`` nor ``.`` is one of a registry.

    Args:
        image: `launch.container_image`; a .sqsh file may be relative.
        cwd: Working folder.

    Raises:
        ConfigError: A relative file is not there. (An absolute one may be on the nodes alone.)
    """
    if not image.endswith(".sqsh"):
        return image
    file = cwd / image
    if not Path(image).is_absolute() and not file.is_file():
        raise ConfigError(f"launch.container_image={image}: there is no {file}; name a file, or registry#name:tag")
    return str(file)


def mounts(place: Place, launch: LaunchConfig) -> list[str]:
    """Folders of a job's container, ``from:to``: where the jobs work, and `launch.container_mounts`."""
    own = dict.fromkeys(f"{path}:{path}" for path in (place.cwd, place.run.parent))
    return [*own, *launch.container_mounts]


def submit(script: Path, after: Sequence[int]) -> int:
    """Hand a script to SLURM.

    Args:
        script: The script.
        after: Numbers of the jobs that must have succeeded; if one fails, SLURM cancels this one.

    Returns:
        The job's number.

    Raises:
        NoSlurmError: There is no SLURM here, or its controller is not reached.
        PlatformError: It refuses; with its words.
    """
    options = ["--parsable"]
    if after:
        options += [f"--dependency=afterok:{':'.join(map(str, after))}", "--kill-on-invalid-dep=yes"]
    done = _client(["sbatch", *options, str(script)])
    if done.returncode:
        refusal = done.stderr.strip().replace("\n", "; ")
        if any(words in refusal for words in _UNREACHED):
            raise NoSlurmError(
                f"SLURM's controller was not reached ({refusal}); submit from a machine of the cluster, and see "
                "SLURM_CONF and `scontrol ping`"
            )
        raise PlatformError(f"sbatch refuses {script}: {refusal}; change cluster=, cluster.* or launch.*")
    number = done.stdout.strip().split("\n")[-1].split(";")[0]  # a site's own words come before
    if not number.isdecimal():
        raise PlatformError(f"sbatch gives no job number for {script} but {done.stdout!r}; see squeue and scancel")
    return int(number)


def cancel(jobs: Sequence[int]) -> None:
    """Take jobs back."""
    if jobs:
        _client(["scancel", *map(str, jobs)])


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        state: Its word, such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED.
        time_left: Until its time limit.
        reason: Why it waits or has failed.
    """

    state: str
    time_left: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run again."""
        return self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def job_states(jobs: Sequence[int]) -> dict[int, JobState]:
    """What SLURM knows of these jobs; without those it has forgotten, and empty where there is no SLURM.

    Raises:
        PlatformError: SLURM does not answer.
    """
    if not jobs or shutil.which("squeue") is None:
        return {}
    form = ["--noheader", "--states=all", "--format=%i|%T|%L|%r"]
    done = _client(["squeue", *form, f"--jobs={','.join(map(str, jobs))}"])
    if done.returncode and "Invalid job id" not in done.stderr:  # what it says of a single job that it has forgotten
        reason = done.stderr.strip().split("\n")[-1]
        raise PlatformError(f"SLURM does not answer ({reason}); try again")
    states = {}
    for line in done.stdout.splitlines():
        job, state, left, reason = line.split("|", 3)
        states[int(job)] = JobState(state, left, "" if reason == "None" else reason)
    return states


def ended_states(jobs: Sequence[int]) -> dict[int, JobState]:
    """What SLURM's accounting says of jobs that squeue has forgotten; empty where a cluster keeps none.

    squeue knows a job for MinJobAge after its end, five minutes by default.
    """
    if not jobs or shutil.which("sacct") is None:
        return {}
    form = ["--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State,Reason"]
    done = _client(["sacct", *form, f"--jobs={','.join(map(str, jobs))}"])
    states = {}
    for line in done.stdout.splitlines():
        job, state, reason = line.split("|", 2)
        found = JobState(state.split()[0], "", "" if reason == "None" else reason)  # such as "CANCELLED by 1000"
        if found.is_over:  # an end that was never accounted is none
            states[int(job)] = found
    return states


def read_jobs(run: Path) -> list[tuple[int, str, list[str]]]:
    """Number, name and stages of every job that was submitted for a run, oldest first."""
    found = []
    for file in sorted(run.glob(f"{JOBS_DIR}/*/{JOBS_FILE}")):
        for job in json.loads(file.read_text(encoding="utf-8")):
            found.append((int(job["job_id"]), str(job["name"]), list(job["stages"])))
    return found


def _client(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoSlurmError(
            f"{command[0]} cannot be started ({error.strerror}); launch=slurm needs a machine that can submit jobs, "
            "launch.dry_run=true prints the scripts anywhere"
        ) from error
