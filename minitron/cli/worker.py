"""One rank of a job: loads the composed configuration, joins the group, runs the stages that are not done.

What takes seconds to import is imported after the signal to stop is held back.
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minitron.cli.turn import end_process, in_turn, report_error
from minitron.config.launch import LaunchKind
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device, RunConfig
from minitron.config.search import SEARCH
from minitron.errors import MinitronError, PlatformError, StoppedError
from minitron.runtime.env import DistEnv, dist_env, prepare_rank, slurm_env
from minitron.runtime.signals import hold_stop_signal

if TYPE_CHECKING:
    from minitron.pipeline import OutsideHashes, Planned
    from minitron.runtime.artefact import RunFolder

PREFLIGHT = "preflight"
"""In the place of stages: check the machines, run nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run stages on this rank.

    Args:
        argv: Path of the resolved configuration, the stages' names joined by commas, and the path of the hashes of
            outside content that the starting process made (`pipeline.outside_hashes`), in JSON.

    Returns:
        Exit code.
    """
    hold_stop_signal()
    resolved, stages, outside = sys.argv[1:] if argv is None else argv
    env = dist_env() or slurm_env()
    config = None
    try:
        if env is None:
            raise PlatformError(f"{__name__} is started by minitron or torchrun, not by hand")
        prepare_rank()
        from minitron.config.compose import load_resolved

        hashes = json.loads(Path(outside).read_text(encoding="utf-8"))
        config = load_resolved(Path(resolved))
        run_rank(config, stages.split(","), env, outside=hashes)
    except StoppedError as stopped:
        report_error(stopped, env)
        return stopped_code(env)
    except MinitronError as error:
        report_error(error, env)
        if config is not None and config.launch.kind is LaunchKind.slurm:
            from minitron.cli.attempts import note_error

            note_error(Path(config.runs_dir) / config.name, error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:  # the process that started this rank speaks
        return 130
    return 0


def stopped_code(env: DistEnv | None) -> int:
    """Exit code of a rank that stopped on request. torchrun would start it again if it were not 0."""
    return 0 if env is not None and env.launcher == "torchrun" else StoppedError.exit_code


def runs_alone(config: RunConfig, wanted: Sequence[str]) -> bool:
    """Whether one process does all of these stages."""
    from minitron.cli.stages import stages_of

    return set(wanted) <= {stage.name for stage in stages_of(config) if stage.alone}


def as_started(config: RunConfig, wanted: Sequence[str], world_size: int) -> RunConfig:
    """The run in the layout of one process, where one was started for stages that need no more."""
    if world_size > 1 or not runs_alone(config, wanted):
        return config
    # A SLURM job of one process has no GPU, whatever the node has.
    device = Device.cpu if config.launch.kind is LaunchKind.slurm else config.device
    return replace(config, parallel=ParallelConfig(), device=device)


def run_rank(config: RunConfig, wanted: Sequence[str], env: DistEnv, *, outside: "OutsideHashes | None" = None) -> None:
    """Join the job as one rank and run the wanted stages that are not done.

    Args:
        config: The resolved configuration.
        wanted: Names of the stages.
        env: This process's rank.
        outside: See `plan_stages`.

    Raises:
        StoppedError: The job was asked to stop, on all ranks alike; what it had is saved.
    """
    _quiet()
    if list(wanted) == [PREFLIGHT]:
        from minitron.cli.preflight import check_rank

        check_rank(config, env)
        return
    import torch
    from rich.console import Console

    from minitron.cli.attempts import note_attempt, note_stop
    from minitron.cli.preflight import check_job
    from minitron.parallel.groups import model_parallel
    from minitron.pipeline import run_stages
    from minitron.runtime.artefact import RunFolder
    from minitron.runtime.device import (
        check_num_ranks,
        check_precision,
        check_transformer_engine,
        process_group,
        resolve_device,
    )
    from minitron.runtime.session import Session

    config = as_started(config, wanted, env.world_size)
    with in_turn(env):
        check_num_ranks(env, config.parallel)
        device = resolve_device(config.device)
        in_fp8 = not runs_alone(config, wanted)  # what one process does is not in FP8, and it may have no GPU
        if in_fp8:
            check_precision(config, device)
    if config.launch.kind is LaunchKind.slurm:
        check_job(config, env, in_fp8=in_fp8)
    run = RunFolder(Path(config.runs_dir) / config.name)
    with process_group(env, device), model_parallel(config.parallel, seed=config.seed) as groups, in_turn(env):
        check_transformer_engine(config, device)
        session = Session(config=config, run=run, groups=groups, device=device, console=Console(soft_wrap=True))
        # Rank 0 plans: the others must not look while it moves folders.
        is_job = session.is_main and config.launch.kind is LaunchKind.slurm
        if is_job:
            note_attempt(run.path, wanted, limit=config.launch.max_restarts_without_progress)
        plans = _plans(config, run, wanted, outside) if session.is_main else iter(())
        try:
            while True:
                plan: list[object] = [None]
                if (todo := next(plans, None)) is not None:
                    plan = [[(item.stage.name, item.identity, item.done, item.changed, item.digests) for item in todo]]
                torch.distributed.broadcast_object_list(plan, src=0)
                if plan[0] is None:
                    break
                run_stages(_rebuild(plan[0], config, run), session)
        except StoppedError:
            if is_job:
                note_stop(run.path)
            raise


def _plans(
    config: RunConfig, run: "RunFolder", wanted: Sequence[str], outside: "OutsideHashes | None"
) -> "Iterator[list[Planned]]":
    """What to run, one plan after the other: only a search has several, for its rounds depend on each other."""
    from minitron.cli.search_stages import is_search, plan_search, search_plans
    from minitron.cli.stages import stages_of
    from minitron.pipeline import plan_stages

    if SEARCH in wanted:  # all of it, whatever stages of it are named beside for `minitron status`
        return search_plans(config, run, outside or {})
    if is_search(wanted):
        return iter([plan_search(config, run, wanted, outside or {})])
    return iter([plan_stages(stages_of(config), config, run, wanted, outside)])


def _rebuild(plan: object, config: RunConfig, run: "RunFolder") -> "list[Planned]":
    """The plan with this process's own stage functions."""
    from minitron.cli.search_stages import stages_of_search
    from minitron.cli.stages import stages_of
    from minitron.pipeline import Planned

    assert isinstance(plan, list)
    names = [name for name, *_ in plan]
    known = stages_of(config)
    if set(names) - {stage.name for stage in known}:
        known = stages_of_search(config, run, names)
    stages = {stage.name: stage for stage in known}
    return [Planned(stages[name], *rest) for name, *rest in plan]


def _quiet() -> None:
    """Keep other libraries' notes out of the progress lines."""
    warnings.filterwarnings("ignore", module=r"(torch|megatron|transformers)\b")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # Megatron's load
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension", "transformers", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    end_process(main)
