"""Every environment variable that minitron reads or sets, with its reason. No other file touches os.environ."""

import contextlib
import os
import re
import resource
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minitron.errors import PlatformError
from minitron.log import complain


@dataclass(frozen=True)
class DistEnv:
    """This process's place among the ranks, as its launcher states it.

    Attributes:
        rank, world_size, local_rank: Place among all ranks, their number, and place on this host.
        master_addr, master_port: Where rank 0 listens.
        launcher: Who started the ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    master_addr: str = "localhost"
    master_port: int = 29500
    launcher: Literal["torchrun", "slurm"] = "torchrun"

    @property
    def init_method(self) -> str:
        """Where the ranks meet, in the form that torch takes."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"tcp://{host}:{self.master_port}"


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")

_OPEN_FILES = 65536  # no more: some programs make a table of all that they could open

ROUTES = "/proc/net/route"
"""Linux's table of IPv4 routes."""


def dist_env(environ: Mapping[str, str] | None = None) -> DistEnv | None:
    """Find out which rank this process is from what torchrun, or srun with one task per rank, has set.

    torchrun inside an srun step of one task per node is torchrun's; a step of a single task is an interactive shell
    rather than a rank, unless `slurm_env` is asked. A batch script's own process is no rank: it is in no step.

    Returns:
        None when the process was not started as a rank.

    Raises:
        PlatformError: Variables are missing or no numbers, or torchrun's and SLURM's contradict each other.
    """
    environ = os.environ if environ is None else environ
    by_torchrun, by_slurm = _torchrun_env(environ), slurm_env(environ)
    if by_slurm is None or by_slurm.world_size == 1:
        return by_torchrun
    if by_torchrun is None:
        return by_slurm
    if "TORCHELASTIC_RUN_ID" in environ:
        tasks, nodes = by_slurm.world_size, environ.get("SLURM_STEP_NUM_NODES", "1")
        if str(tasks) != nodes:
            raise PlatformError(
                f"torchrun was started by each of {tasks} SLURM tasks on {nodes} nodes; start it once per node "
                "(srun --ntasks-per-node=1), or start minitron itself with one task per rank"
            )
        return by_torchrun
    ours, theirs = ((env.rank, env.world_size, env.local_rank) for env in (by_torchrun, by_slurm))
    raise PlatformError(
        f"RANK, WORLD_SIZE, LOCAL_RANK = {ours} but SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID = {theirs}; "
        "unset the former, or start with torchrun"
    )


def _repeats_srun(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's names hold srun's numbers: pyxis sets RANK and LOCAL_RANK in an image of PyTorch's.

    So its pytorch_setup, for images that set PYTORCH_VERSION; a hook of enroot's, off by default, adds the others
    (https://github.com/NVIDIA/pyxis, https://github.com/NVIDIA/enroot).
    """
    same = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    if "TORCHELASTIC_RUN_ID" in environ or not same.keys() & environ.keys():
        return False
    return all(environ[name] == environ.get(of_srun) for name, of_srun in same.items() if name in environ)


def _torchrun_env(environ: Mapping[str, str]) -> DistEnv | None:
    if _repeats_srun(environ):
        return None
    found = {name: environ[name] for name in _TORCHRUN if name in environ}
    if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
        return None  # an address alone is often set for all processes of a machine
    missing = [name for name in _TORCHRUN if name not in found]
    if missing:
        raise PlatformError(f"{', '.join(found)} set but {', '.join(missing)} not; start with torchrun, or unset them")
    rank, world_size, local_rank, port = _numbers(found, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    return DistEnv(rank, world_size, local_rank, found["MASTER_ADDR"], port, "torchrun")


def slurm_env(environ: Mapping[str, str] | None = None) -> DistEnv | None:
    """This process's place in its srun step, also where that has one task only; None outside of a step.

    Raises:
        PlatformError: Variables are missing, or no numbers.
    """
    environ = os.environ if environ is None else environ
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    missing = [name for name in _SRUN if name not in environ]
    if missing:
        raise PlatformError(f"SLURM_STEP_NUM_TASKS set but {', '.join(missing)} not; start with srun, or unset it")
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    rank, world_size, local_rank, job_id = _numbers(environ, names)
    master = first_host(environ["SLURM_STEP_NODELIST"])
    # Jobs that share a node need ports of their own: at one port a rank may join the other job.
    return DistEnv(rank, world_size, local_rank, master, 20000 + job_id % 10000, "slurm")


def _numbers(environ: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    try:
        return [int(environ[name]) for name in names]
    except ValueError as error:
        shown = ", ".join(f"{name}={environ[name]}" for name in names)
        raise PlatformError(f"these must be numbers: {shown}") from error


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("dgx[07-08,12],login1"), first_host("a,b"), first_host("r[1-2]n[03-04]")
    ('dgx07', 'a', 'r1n03')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise PlatformError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; start with srun")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that this process is part of.

    Attributes:
        job_id: Number of the job.
        num_restarts: Times it was requeued.
    """

    job_id: int
    num_restarts: int


def slurm_job(environ: Mapping[str, str] | None = None) -> SlurmJob | None:
    """The job this process is part of, None outside of one."""
    environ = os.environ if environ is None else environ
    if "SLURM_JOB_ID" not in environ:
        return None
    given = {"SLURM_RESTART_COUNT": "0", **environ}  # it is not set the first time
    job_id, num_restarts = _numbers(given, ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return SlurmJob(job_id, num_restarts)


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


def set_rank_environment(num_ranks: int, *, num_hosts: int = 1) -> None:
    """Set what the ranks started from here inherit; values set by the user win.

    Args:
        num_ranks: Ranks that share this machine's cores.
        num_hosts: Machines with ranks of the job.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_ranks)),  # the launcher's own default is 1
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # orders TP communication before compute up to Hopper
        "TOKENIZERS_PARALLELISM": "false",  # forked tokenizers warn and may hang
        "HF_HUB_OFFLINE": "1",  # every model is a local path; never look on the network
        "PYTHONFAULTHANDLER": "1",  # a stack for a rank that dies in native code
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # no c10d notes between the progress lines
        # glibc gives freed activations back to the system at once, and every layer then waits for fresh pages again:
        # a forward pass in bf16 on a CPU takes half as long again. Keep up to 256 MiB, and blocks below 32 MiB.
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    }
    if num_hosts > 1:
        # Without it a host that was lost and comes back is not told where rank 0 listens, and all end (torch 2.13).
        defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_rank() -> None:
    """Set what this rank's libraries look for, before they are imported; values set by the user win."""
    set_rank_environment(1)  # torchrun has set the threads of ranks that share a host, a job's script those of SLURM's
    _use_writable_cache()
    _use_reachable_interface()
    _raise_open_files()


def _raise_open_files() -> None:
    """Let this process open more files than the usual 1024, as far as it may.

    Each of a rank's groups connects it to all their members over gloo; at 256 ranks that is 1300 sockets.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _use_writable_cache() -> None:
    """Give Triton a folder for compiled kernels where its own cannot be written: it would end a distillation with that.

    A container is read-only by enroot's default, one that runs as another user has no home folder, and a job inherits a
    folder that its container lacks.
    """
    given = os.environ.get("TRITON_CACHE_DIR")
    if _can_write(given or os.path.expanduser(f"{os.environ.get('TRITON_HOME', '~')}/.triton/cache")):
        return
    folder = f"{tempfile.gettempdir()}/minitron-triton-{os.getuid()}"  # for all ranks of this host, and the next run
    if not _can_write(folder) or os.stat(folder).st_uid != os.getuid():
        folder = tempfile.mkdtemp(prefix="minitron-triton-")
    os.environ["TRITON_CACHE_DIR"] = folder
    if given and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        complain(f"TRITON_CACHE_DIR={given} cannot be written on {socket.gethostname()}: {folder} in its place")


def _can_write(folder: str) -> bool:
    if not os.path.isabs(folder):  # ~ without a home
        return False
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _use_reachable_interface() -> None:
    """Let gloo listen where the other hosts of a SLURM step find it; what the user has set wins.

    It takes the address that the host's own name leads to. Where that is a loopback address (Debian and Ubuntu write
    127.0.1.1 into /etc/hosts) or none, take the interface of the default route.
    """
    if os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return
    try:
        leads_out = not socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        leads_out = False
    interface = None if leads_out else _default_interface()
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _default_interface() -> str | None:
    """Interface of the default route with the smallest metric; None where there is none."""
    try:
        with open(ROUTES, encoding="utf-8") as file:
            rows = [line.split() for line in file][1:]
    except OSError:
        return None
    everywhere, unreachable = ("00000000", "00000000"), 0x200
    defaults = (row for row in rows if (row[1], row[7]) == everywhere and not int(row[3], 16) & unreachable)
    found = [(int(row[6]), row[0]) for row in defaults]
    return min(found)[1] if found else None


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again, by the XDG base directory specification.

    Raises:
        OSError: The user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"))
    if not folder.is_absolute():
        raise FileNotFoundError("no home folder")
    return folder / "minitron"


def hide_gpus() -> None:
    """Let this process and those it starts see no GPU; before anything asks CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def trusted_history() -> Iterator[None]:
    """Inside, Transformer Engine loads the history of delayed scaling, which it pickles and otherwise refuses.

    For the states of a training that this program wrote, whose other parts torch pickles as well.
    """
    key = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


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
