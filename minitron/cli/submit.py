"""launch=slurm: a run's stages as jobs of the cluster, each after those whose results it reads."""

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minitron.cli.start import write_resolved
from minitron.config.compose import to_yaml
from minitron.config.launch import ClusterConfig, nodes_of
from minitron.config.run import Device, RunConfig
from minitron.errors import ArtefactError, ConfigError, MinitronError
from minitron.pipeline import OutsideHashes, Planned
from minitron.runtime.artefact import OUTSIDE_FILE, RESOLVED_FILE, RunFolder, storage_error, write_json
from minitron.runtime.slurm import (
    COMMON_SCRIPT,
    JOBS_DIR,
    JOBS_FILE,
    Job,
    NoSlurmError,
    Place,
    cancel,
    job_states,
    mounts,
    read_jobs,
    render_script,
    submit,
    template_dir,
)

_CPUS_ONLY = (
    "the nodes have no GPUs (cluster.gpus_per_node=0): ranks compute on their cores. Others are named with cluster=, "
    "such as cluster=dgx_h100; device=cpu says that this is meant"
)


def submit_run(
    jobs: Sequence[Job], config: RunConfig, run: RunFolder, outside: OutsideHashes, *, wanted: Sequence[str]
) -> None:
    """Write the scripts of jobs, submit them, and print the table of jobs.

    With ``launch.dry_run`` nothing is written or submitted: the scripts are printed.

    Args:
        jobs: What to submit, in order.
        config: The run, checked for the nodes it asks for.
        run: Its folder.
        outside: Hashes of what lies outside the folder; the jobs take them as they are now.
        wanted: All stages that were asked for, done or not; see `write_resolved`. Jobs for none of them, such as a
            preflight, disturb no other of the run.

    Raises:
        ArtefactError: Jobs of this run are in the queue, or its folder cannot be written.
        ConfigError: What the jobs read is not in their container; the nodes have no GPUs, and the run wants them.
        PlatformError: SLURM refuses a job; those before it are taken back.
    """
    console = Console(soft_wrap=True)
    place = _place(config, run)
    check_mounts(config, place)
    if not config.cluster.gpus_per_node and config.device is Device.auto and any(not job.alone for job in jobs):
        console.print(f"# {_CPUS_ONLY}", highlight=False, markup=False)
    given, (config, cluster) = config, _on_nodes(config)
    arguments = [str(place.folder / RESOLVED_FILE), str(place.folder / OUTSIDE_FILE)]
    scripts = {
        job.name: render_script(job, [arguments[0], ",".join(job.stages), arguments[1]], place, config.launch, cluster)
        for job in jobs
    }
    if config.launch.dry_run:
        for job in jobs:
            after = f", after {', '.join(job.after)}" if job.after else ""
            console.print(f"# ---- {_script(place, job)}{after}", highlight=False, markup=False)
            sys.stdout.write(scripts[job.name] + "\n")
        return
    if wanted:
        refuse_while_running(run)
    try:
        place.folder.mkdir(parents=True)
        (place.folder / RESOLVED_FILE).write_text(to_yaml(config), encoding="utf-8")
        write_json(place.folder / OUTSIDE_FILE, outside)
        common = (template_dir() / COMMON_SCRIPT).read_text(encoding="utf-8")
        (place.folder / COMMON_SCRIPT).write_text(common, encoding="utf-8")
        for job in jobs:
            _script(place, job).write_text(scripts[job.name], encoding="utf-8")
    except OSError as error:
        raise storage_error(error, place.folder) from error
    numbers = _submit_all(jobs, place, noted=bool(wanted))
    if wanted:
        write_resolved(run, given, wanted)
    console.print(_table(jobs, numbers))
    status = f"; how it goes: minitron status {run.path}" if wanted else ""
    console.print(f"scripts and logs: {place.folder}/{status}", highlight=False)


def _on_nodes(config: RunConfig) -> tuple[RunConfig, ClusterConfig]:
    """The run and its nodes as the jobs take them, by the device."""
    cluster = config.cluster
    if config.device is Device.cpu:  # as many ranks, and no GPU of theirs
        return config, replace(cluster, gpus_per_node=0, ranks_per_node=cluster.most_ranks)
    if cluster.gpus_per_node:  # a node without its GPUs is an error, not a slow job
        return replace(config, device=Device.cuda), cluster
    if config.device is Device.cuda:
        raise ConfigError(
            "device=cuda, but the nodes have no GPUs (cluster.gpus_per_node=0); name others, such as cluster=dgx_h100"
        )
    return config, cluster


def check_mounts(config: RunConfig, place: Place) -> None:
    """Refuse what the run reads from a folder that its jobs' container does not have.

    Raises:
        ConfigError: With what to mount.
    """
    if not config.launch.container_image:
        return
    read: dict[str, Sequence[str | None]] = {
        "source.path": [config.source.path],
        "data.paths": config.data.paths,
        "distill.teacher.path": [config.distill.teacher.path],
        "distill.teacher.cache": [config.distill.teacher.cache],
        "eval.checkpoint": [config.eval.checkpoint],
    }
    parts = [mount.split(":") for mount in mounts(place, config.launch)]
    for key, paths in read.items():
        for path in filter(None, paths):
            named = Path(os.path.abspath(place.cwd / path))
            real = named.resolve()  # where a link leads has to be there too
            if not any(named.is_relative_to(words[:2][-1]) for words in parts):
                lacking = named
            elif not any(real.is_relative_to(Path(words[0]).resolve()) for words in parts):
                lacking = real
            else:
                continue
            folder = lacking if lacking.is_dir() else lacking.parent
            raise ConfigError(
                f"{key}={path} is not in the container, which has {', '.join(dict.fromkeys(w[0] for w in parts))}; "
                f"add {folder}:{folder} to launch.container_mounts"
            )


def jobs_of(planned: Sequence[Planned], config: RunConfig) -> list[Job]:
    """Group the stages that are not done into jobs.

    A stage goes into the newest job that makes one of its inputs when that job has the same size and whatever else it
    waits for is over by then, such as the evaluation of a trained model; else it is a job of its own.
    """
    nodes, ranks_per_node = nodes_of(config.launch, config.cluster, config.parallel)
    jobs: dict[str, Job] = {}
    home: dict[str, str] = {}  # job of each stage
    for item in planned:
        if item.done:
            continue
        stage = item.stage
        makers = {home[name] for name in stage.needs if name in home}
        awaited = makers | {home[name] for name in stage.waits_for if name in home}
        earlier = {name for job in awaited for name in _all_before(jobs[job], jobs)}
        after = [name for name in jobs if name in awaited - earlier]  # the others are over by then
        if len(after) == 1 and after[0] in makers and jobs[after[0]].alone == stage.alone:
            host = jobs[after[0]]
            jobs[host.name] = replace(host, stages=(*host.stages, stage.name))
        else:
            name = stage.name.removeprefix("steps/").replace("/", ".")
            size = (1, 1) if stage.alone else (nodes, ranks_per_node)
            host = jobs[name] = Job(name, (stage.name,), tuple(after), *size, stage.alone)
        home[stage.name] = host.name
    return list(jobs.values())


def _all_before(job: Job, jobs: dict[str, Job]) -> set[str]:
    return {name for before in job.after for name in (before, *_all_before(jobs[before], jobs))}


def _place(config: RunConfig, run: RunFolder) -> Place:
    path = run.path.resolve()
    numbers = [int(folder.name) for folder in (path / JOBS_DIR).glob("[0-9][0-9][0-9]")]
    folder = path / JOBS_DIR / f"{max(numbers, default=0) + 1:03d}"
    python = config.launch.python or ("python" if config.launch.container_image else sys.executable)
    return Place(cwd=Path.cwd(), run=path, folder=folder, python=python)


def _script(place: Place, job: Job) -> Path:
    return place.folder / f"{job.name}.sbatch"


def _submit_all(jobs: Sequence[Job], place: Place, *, noted: bool) -> dict[str, int]:
    """Numbers of the jobs by name, also written down for `minitron status` if they are to be `noted`."""
    numbers: dict[str, int] = {}
    try:
        for job in jobs:
            numbers[job.name] = submit(_script(place, job), [numbers[name] for name in job.after])
        if noted:
            written = [{"job_id": numbers[job.name], "name": job.name, "stages": job.stages} for job in jobs]
            write_json(place.folder / JOBS_FILE, written)
    except (MinitronError, OSError) as error:
        if isinstance(error, NoSlurmError) and not numbers:
            shutil.rmtree(place.folder)  # scripts that nobody has
            for folder in (place.folder.parent, place.run):
                with contextlib.suppress(OSError):  # it has more than these
                    folder.rmdir()
        cancel(list(numbers.values()))
        raise
    return numbers


def refuse_while_running(run: RunFolder) -> None:
    """Two jobs must not work on one stage.

    Raises:
        ArtefactError: Jobs of this run are in the queue.
    """
    states = job_states([number for number, _, _ in read_jobs(run.path)])
    alive = sorted(number for number, state in states.items() if not state.is_over)
    if alive:
        shown = " ".join(map(str, alive))
        raise ArtefactError(
            f"{run.path} has jobs in the queue ({shown}); wait for them (minitron status {run.path}), or take them "
            f"back with scancel {shown}, or use another name="
        )


def _table(jobs: Sequence[Job], numbers: dict[str, int]) -> Table:
    table = Table("job", "stages", "processes", "after", box=None, pad_edge=False)
    for job in jobs:
        after = ", ".join(str(numbers[name]) for name in job.after) or "-"
        size = f"{job.nodes} x {job.ranks_per_node}" if not job.alone else "1, CPU"
        table.add_row(str(numbers[job.name]), ", ".join(job.stages), size, after)
    return table
