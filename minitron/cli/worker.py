"""One rank of a job: loads the composed configuration, joins the group, runs the stages that are not done."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from minitron.cli.search_stages import SEARCH, is_search, plan_search, search_plans, stages_of_search
from minitron.cli.stages import stages_of
from minitron.cli.turn import in_turn, report_error
from minitron.config.compose import load_resolved
from minitron.config.run import RunConfig
from minitron.errors import MinitronError, PlatformError
from minitron.pipeline import OutsideHashes, Planned, plan_stages, run_stages
from minitron.runtime.artefact import RunFolder
from minitron.runtime.env import DistEnv, dist_env

PREFLIGHT = "preflight"
"""In the place of stages: check the machines, run nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run stages on this rank.

    Args:
        argv: Path of the resolved configuration, the stages' names joined by commas, and, in JSON, the hashes of
            outside content that the starting process made (`pipeline.outside_hashes`).

    Returns:
        Exit code.
    """
    resolved, stages, outside = sys.argv[1:] if argv is None else argv
    env = dist_env()
    try:
        if env is None:
            raise PlatformError(f"{__name__} is started by minitron or torchrun, not by hand")
        run_rank(load_resolved(Path(resolved)), stages.split(","), env, outside=json.loads(outside))
    except MinitronError as error:
        report_error(error, env)
        return error.exit_code
    return 0


def run_rank(config: RunConfig, wanted: Sequence[str], env: DistEnv, *, outside: OutsideHashes | None = None) -> None:
    """Join the job as one rank and run the wanted stages that are not done.

    Args:
        config: The resolved configuration.
        wanted: Names of the stages.
        env: This process's rank.
        outside: See `plan_stages`.
    """
    _quiet()
    if list(wanted) == [PREFLIGHT]:
        from minitron.cli.preflight import check_rank

        check_rank(config, env)
        return
    import torch

    from minitron.parallel.groups import model_parallel
    from minitron.runtime.device import check_num_ranks, check_transformer_engine, process_group, resolve_device
    from minitron.runtime.session import Session

    with in_turn(env):
        check_num_ranks(env, config.parallel)
        device = resolve_device(config.device)
    run = RunFolder(Path(config.runs_dir) / config.name)
    with process_group(env, device), model_parallel(config.parallel, seed=config.seed) as groups, in_turn(env):
        check_transformer_engine(config, device)
        session = Session(config=config, run=run, groups=groups, device=device, console=Console(soft_wrap=True))
        # Rank 0 plans: the others must not look while it moves folders.
        plans = _plans(config, run, wanted, outside) if session.is_main else iter(())
        while True:
            plan: list[object] = [None]
            if (planned := next(plans, None)) is not None:
                plan = [[(item.stage.name, item.identity, item.done, item.changed, item.digests) for item in planned]]
            torch.distributed.broadcast_object_list(plan, src=0)
            if plan[0] is None:
                break
            run_stages(_rebuild(plan[0], config, run), session)


def _plans(
    config: RunConfig, run: RunFolder, wanted: Sequence[str], outside: OutsideHashes | None
) -> Iterator[list[Planned]]:
    """What to run, one plan after the other: only a search has several, for its rounds depend on each other."""
    if list(wanted) == [SEARCH]:
        return search_plans(config, run, outside or {})
    if is_search(wanted):
        return iter([plan_search(config, run, wanted, outside or {})])
    return iter([plan_stages(stages_of(config), config, run, wanted, outside)])


def _rebuild(plan: object, config: RunConfig, run: RunFolder) -> list[Planned]:
    """The plan with this process's own stage functions."""
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
    sys.exit(main())
