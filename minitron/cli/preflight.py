"""`minitron preflight`: start the ranks of a run, and check their machines; a SLURM job does so before its stages."""

import datetime
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minitron.cli.turn import in_turn
from minitron.config.launch import LaunchKind
from minitron.config.run import Device, RunConfig
from minitron.errors import PlatformError
from minitron.runtime.device import check_num_ranks, process_group, resolve_device
from minitron.runtime.env import DistEnv
from minitron.runtime.preflight import Asked, Check, preflight

_PORTS_APART = 10000
"""From the port of a job's ranks to that of its preflight: a rank that is early must not meet the other group."""

_START_OF_JOB_S = 1800
"""How long the ranks of a SLURM job wait for each other at least: each node unpacks an image, or reads all libraries
from a network file system, at its own pace."""


def check_rank(config: RunConfig, env: DistEnv, *, in_fp8: bool = True) -> None:
    """Check the machines as one of the ranks; rank 0 prints the table.

    Args:
        config: The run.
        env: This process's rank.
        in_fp8: Whether the ranks do what the run does in FP8, if it does anything in it.

    Raises:
        PlatformError: A check failed, or the ranks do not reach each other.
    """
    with in_turn(env):
        check_num_ranks(env, config.parallel)
        device = resolve_device(config.device)
    wait_s = max(config.preflight.timeout_s, _START_OF_JOB_S if config.launch.kind is LaunchKind.slurm else 0)
    try:
        with process_group(env, device, timeout=datetime.timedelta(seconds=wait_s)), in_turn(env):
            here = torch.device("cpu") if device is Device.cpu else torch.device("cuda", env.local_rank)
            asked = Asked(config.fp8_recipes if in_fp8 else {}, prefers_gpu=config.device is Device.auto)
            checks = preflight(Path(config.runs_dir) / config.name, here, config.preflight, asked)
            if env.rank == 0:
                _print(checks, Console(soft_wrap=True))
            _agree([check.name for check in checks if check.reason is not None], len(checks))
    except RuntimeError as error:  # torch's, of the connection or of a collective
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        waited = f"preflight.timeout_s={wait_s}" if wait_s == config.preflight.timeout_s else f"{wait_s} s"
        raise PlatformError(
            f"the {env.world_size} ranks do not reach each other (within {waited}): {reason}"
        ) from error


def check_job(config: RunConfig, env: DistEnv, *, in_fp8: bool) -> None:
    """Check a SLURM job's machines at its start, briefly: too briefly to judge speeds, which are shown only.

    Args:
        config: The run, as this job was started.
        env: This process's rank.
        in_fp8: Whether the job's stages are among those that FP8 is for.

    Raises:
        PlatformError: As `check_rank`; the job ends with it, and is not requeued.
    """
    brief = replace(config.preflight, message_mb=1, outlier_share=0.0)
    apart = replace(env, master_port=env.master_port - _PORTS_APART)
    check_rank(replace(config, preflight=brief), apart, in_fp8=in_fp8)


def _agree(failed: list[str], number: int) -> None:
    """Every rank ends with the error that rank 0 found."""
    told = [f"{len(failed)} of {number} checks failed: {', '.join(failed)}" if failed else ""]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0]:
        raise PlatformError(f"preflight: {told[0]}; the table says why")


def _print(checks: list[Check], console: Console) -> None:
    table = Table(title="preflight", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        bad = check.reason is not None
        found = f"{check.found} - {check.reason}" if bad else check.found
        table.add_row(check.name, "FAILED" if bad else "ok", escape(found), style="bold red" if bad else None)
    console.print(table)
