"""Start a search: check the space, then run its rounds in one job, or in several side by side."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from minitron.cli.search_stages import LATENCY, first_stages, is_search, latencies, search_plans, search_space
from minitron.cli.source import source_model
from minitron.cli.stages import stages_of
from minitron.cli.start import given_to_ranks, start_ranks, write_resolved
from minitron.cli.submit import jobs_of, submit_run
from minitron.cli.turn import in_turn
from minitron.cli.worker import run_rank
from minitron.config.families import check_family
from minitron.config.intermediate import find_matches
from minitron.config.launch import LaunchKind, nodes_of
from minitron.config.model import ModelConfig
from minitron.config.run import Device, RunConfig
from minitron.config.search import RESULT, SEARCH
from minitron.errors import ConfigError, StoppedError
from minitron.pipeline import OutsideHashes, Planned, outside_hashes, plan_stages
from minitron.report.search import print_search, read_search
from minitron.runtime.artefact import RunFolder
from minitron.runtime.device import check_devices, resolve_device
from minitron.runtime.env import DistEnv
from minitron.runtime.launch import launch_side_by_side
from minitron.runtime.slurm import Job
from minitron.search.space import Space, require_candidates


def run_search(
    config: RunConfig,
    run: RunFolder,
    env: DistEnv | None,
    console: Console,
    *,
    teacher: ModelConfig | None,
) -> int:
    """Run `minitron search` to its end; what is done is skipped.

    Args:
        config: The composed configuration.
        run: The run's folder.
        env: This process's rank when torchrun started it, else None.
        console: Where to write.
        teacher: Architecture of the model to learn from, where it is not the source.

    Returns:
        Exit code.
    """
    with in_turn(env):
        space = check_search(config, run, teacher=teacher, alone=env is None)
    wanted = [*(stage.name for stage in first_stages(config)), RESULT]
    is_main = env is None or env.rank == 0
    if is_main:
        dropped = f", dropped: {space.reasons}" if space.dropped else ""
        console.print(
            f"search: {space.num_points} shapes, {len(space.candidates)} candidates{dropped}", highlight=False
        )
    if env is not None:
        if is_main:
            write_resolved(run, config, wanted)
        run_rank(config, [SEARCH], env)
    else:
        outside = outside_hashes(stages_of(config), config)
        if not _is_done(config, run, outside):
            if config.launch.kind is LaunchKind.slurm:
                submit_run(_jobs_of(config, run, outside), config, run, outside, wanted=wanted)
                return 0
            ranks = f"{config.parallel.arithmetic()} ranks"
            workers = f", {config.search.workers} candidates side by side" if config.search.workers > 1 else ""
            console.print(f"[bold]{config.name}[/]: {ranks}{workers}, artefacts in {run.path}/")
            if config.search.workers == 1:
                code = start_ranks(config, [SEARCH], outside, run=run, wanted=wanted)
            else:
                write_resolved(run, config, wanted)
                with given_to_ranks(config, outside) as given:
                    code = _run_side_by_side(config, run, given, outside)
            if code or not _is_done(config, run, outside):
                return code or StoppedError.exit_code  # rank 0 has said where it stopped
    if is_main:
        print_search(read_search(run.stage(RESULT)), run.stage(RESULT), console)
    return 0


def check_search(config: RunConfig, run: RunFolder, *, teacher: ModelConfig | None, alone: bool) -> Space:
    """Check everything that can be checked before any work.

    Raises:
        ConfigError: There is nothing to search, nothing left of it, or too much; a pair of intermediate states names a
            layer that a candidate does not have; several workers are asked for where they cannot be started.
    """
    search = config.search
    if search.grid.is_empty:
        raise ConfigError(
            "minitron search has no grid; give at least one axis, such as 'search.grid.hidden_size=[448,512]', or "
            "choose one: search=nemotron4_15b_to_4b"
        )
    space = search_space(config, run)
    if latencies(config, run) is not None or not space.candidates:
        require_candidates(space, search)
    source = source_model(config)
    for candidate in space.candidates:
        check_family(source, candidate.model, candidate.prune(config.prune), config.score)
        try:
            beside = teacher or source
            find_matches(config.distill.intermediate, beside, candidate.model, config.parallel)
        except ConfigError as error:
            raise ConfigError(f"search: {candidate.name}: {error}; rules such as last-2 fit every depth") from error
    if search.workers > 1:
        if not alone or config.launch.kind is not LaunchKind.local:
            raise ConfigError(
                f"search.workers={search.workers} starts ranks of its own, on this machine; set it to 1 with "
                "torchrun and SLURM, or start minitron search with launch=local by itself"
            )
        check_devices(config.parallel.num_ranks, config, places=search.workers)
    return space


def _is_done(config: RunConfig, run: RunFolder, outside: OutsideHashes) -> bool:
    """Whether every round is done: each is planned from what the one before left."""
    return all(all(item.done for item in planned) for planned in search_plans(config, run, outside))


def _jobs_of(config: RunConfig, run: RunFolder, outside: OutsideHashes) -> list[Job]:
    """For SLURM: what one process does of the first stages, and all the rest in one job of the whole allocation."""
    first = [stage.name for stage in first_stages(config) if stage.name != LATENCY]
    planned = plan_stages(stages_of(config), config, run, first, outside)
    jobs = jobs_of([item for item in planned if item.stage.alone], config)
    together = [item.stage.name for item in planned if not item.stage.alone and not item.done]
    nodes, ranks_per_node = nodes_of(config.launch, config.cluster, config.parallel)
    after = tuple(job.name for job in jobs)
    return [*jobs, Job(SEARCH, (*together, SEARCH), after, nodes, ranks_per_node, alone=False)]


def _run_side_by_side(config: RunConfig, run: RunFolder, given: tuple[str, str], outside: OutsideHashes) -> int:
    """Each round's candidates dealt over several jobs, which share no device."""
    resolved, hashes = given
    for planned in search_plans(config, run, outside):
        jobs = deal([item for item in planned if not item.done], config.search.workers)
        code = launch_side_by_side(
            [[resolved, ",".join(names), hashes] for names in jobs],
            num_ranks=config.parallel.num_ranks,
            num_places=config.search.workers,
            logs=run.path / SEARCH / "logs",
            uses_cuda=resolve_device(config.device) is Device.cuda,
        )
        if code or any(run.meta(item.stage.name) is None for item in planned):  # stopped: the next round needs them
            return code
    return 0


def deal(planned: Sequence[Planned], workers: int) -> list[list[str]]:
    """Stages of each worker: a candidate's stay together, what is no candidate's goes to the first."""
    names = [item.stage.name for item in planned]
    candidates = list(dict.fromkeys(Path(name).parent.name for name in names if _is_candidates(name)))
    jobs: list[list[str]] = [[] for _ in range(workers)]
    for name in names:
        number = candidates.index(Path(name).parent.name) if _is_candidates(name) else 0
        jobs[number % workers].append(name)
    return [job for job in jobs if job]


def _is_candidates(stage: str) -> bool:
    return is_search([stage]) and stage not in (RESULT, LATENCY)
