"""Every environment variable that minitron reads or sets, with its reason. No other file touches os.environ."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
        raise PlatformError(f"{', '.join(found)} set but {', '.join(missing)} not; start with torchrun, or unset them")
    try:
        rank, world_size, local_rank = (int(found[name]) for name in names)
    except ValueError as error:
        raise PlatformError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {found}") from error
    return DistEnv(rank=rank, world_size=world_size, local_rank=local_rank)


def wandb_mode() -> Literal["online", "offline", "disabled", "shared"]:
    """The user's WANDB_MODE; else online with an API key in the environment or the netrc file, and offline without.

    Without a key wandb would ask for one.

    Raises:
        PlatformError: WANDB_MODE has a value that wandb does not know.
    """
    match os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"):
        case ("online" | "offline" | "disabled" | "shared") as mode:
            return mode
        case other:
            raise PlatformError(f"WANDB_MODE={other} is not known to wandb; set it to online, offline or disabled")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        with open(netrc, encoding="utf-8") as file:
            return "wandb" in file.read()
    except OSError:
        return False


def set_rank_environment(num_ranks: int) -> None:
    """Set what the ranks started from here inherit; values set by the user win.

    Args:
        num_ranks: Ranks that share this machine's cores.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_ranks)),  # the launcher's own default is 1
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # orders TP communication before compute up to Hopper
        "TOKENIZERS_PARALLELISM": "false",  # forked tokenizers warn and may hang
        "HF_HUB_OFFLINE": "1",  # every model is a local path; never look on the network
        "PYTHONFAULTHANDLER": "1",  # a stack for a rank that dies in native code
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # no c10d notes between the progress lines
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def place_environment(place: int, num_places: int, num_ranks: int, *, uses_cuda: bool) -> dict[str, str]:
    """The environment of one of several jobs that share this machine: devices and threads of its own.

    Args:
        place: Number of the job.
        num_places: Jobs at once.
        num_ranks: Processes of each.
        uses_cuda: Give each job its own GPUs, of those that are visible.
    """
    environ = dict(os.environ)
    environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // (num_places * num_ranks))))
    if uses_cuda:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(device) for device in range(num_places * num_ranks)]
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place * num_ranks : (place + 1) * num_ranks])
    return environ


def num_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
