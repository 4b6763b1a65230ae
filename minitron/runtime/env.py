"""Every environment variable that minitron reads or sets, with its reason. No other file touches os.environ."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from minitron.errors import PlatformError


@dataclass(frozen=True)
class DistEnv:
    """This process's place among the ranks, as torchrun states it."""

    rank: int
    world_size: int
    local_rank: int


def dist_env(environ: Mapping[str, str] | None = None) -> DistEnv | None:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; None when the process was not started by a launcher.

    Raises:
        PlatformError: Only some of the three are set, or one is not a number.
    """
    environ = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: environ[name] for name in names if name in environ}
    if not found:
        return None
    missing = [name for name in names if name not in found]
    if missing:
        raise PlatformError(
            f"{', '.join(found)} set but {', '.join(missing)} not; start with torchrun, or unset them"
        )
    try:
        rank, world_size, local_rank = (int(found[name]) for name in names)
    except ValueError as error:
        raise PlatformError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {found}") from error
    return DistEnv(rank=rank, world_size=world_size, local_rank=local_rank)


def is_ci() -> bool:
    """CI is set: progress is printed as plain lines."""
    return bool(os.environ.get("CI"))


def wandb_has_account() -> bool:
    """An API key in the environment or the netrc file; without one wandb runs offline and asks nothing."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = os.path.expanduser("~/.netrc")
    try:
        with open(netrc, encoding="utf-8") as file:
            return "wandb" in file.read()
    except OSError:
        return False


def rank_environment(num_threads: int) -> dict[str, str]:
    """Environment of the ranks that `minitron.runtime.launch` starts; values set by the user win.

    Args:
        num_threads: OMP_NUM_THREADS of each rank, so that ranks on one machine share its cores.
    """
    defaults = {
        "OMP_NUM_THREADS": str(num_threads),  # torchrun's own default of 1 wastes cores
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # orders TP communication before compute up to Hopper
        "TOKENIZERS_PARALLELISM": "false",  # forked tokenizers warn and may hang
        "HF_HUB_OFFLINE": "1",  # every model is a local path; never look on the network
        "PYTHONFAULTHANDLER": "1",  # a stack for a rank that dies in native code
    }
    return {**defaults, **os.environ}
