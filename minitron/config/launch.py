"""How the ranks of a job are started: on this machine, on several hosts, or as SLURM jobs. No result depends on it."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from minitron.config.gpus import Gpu
from minitron.config.parallel import ParallelConfig
from minitron.errors import ConfigError, LayoutError


class LaunchKind(StrEnum):
    """Who starts the ranks."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


@dataclass(kw_only=True)
class LaunchConfig:
    """How the ranks are started."""

    kind: LaunchKind = LaunchKind.local
    """``local``: all on this machine. ``torchrun``: torch's elastic launcher on `nodes` hosts, the same command on
    each. ``slurm``: the stages become jobs of the cluster, see the section `cluster`."""
    nodes: int | None = None
    """Hosts of the layout; null is 1 with torchrun, and with SLURM as many as the layout fills."""
    nproc_per_node: int | None = None
    """torchrun: ranks on each host; null divides the layout's evenly."""
    rendezvous: str = ""
    """torchrun on several hosts: ``host:port`` of the first, at which all of them meet."""
    is_host: bool | None = None
    """torchrun on several hosts: whether this is the first; null finds out by name, which fails where a host's own
    name leads to a loopback address."""
    local_address: str | None = None
    """torchrun on several hosts: this one's address, as the others reach it; null asks the name service."""
    max_restarts: int = 0
    """torchrun: times that the ranks are started again from the newest checkpoint after one was lost."""
    join_timeout_s: int = 600
    """torchrun on several hosts: how long to wait for a host that is not there, at the start or after it was lost."""
    dry_run: bool = False
    """slurm: print the scripts, submit nothing."""
    time_limit: str = "04:00:00"
    """slurm: time of one job of the whole allocation, ``[days-]hours:minutes:seconds``. A training stage that is not
    done by then saves, and the job requeues itself."""
    alone_time_limit: str = "04:00:00"
    """slurm: time of one job of a single process. One that tokenizes saves and requeues itself too; for the import, the
    pruning or the export of a model it must be enough."""
    signal_lead_s: int = 300
    """slurm: how long before the time limit the ranks are asked to save; SLURM may ask a minute earlier."""
    max_restarts_without_progress: int = 3
    """slurm: requeues in a row, whoever asked for them, in which a job may finish no stage and save nothing."""
    container_image: str | None = None
    """slurm: image for pyxis (a .sqsh file or registry#name:tag); null runs `python` on the node itself."""
    container_mounts: list[str] = field(default_factory=list)
    """slurm: ``from[:to[:flags]]`` of folders in the container, beside the working folder and `runs_dir`; models and
    text outside of those need one."""
    python: str | None = None
    """slurm: interpreter on the nodes; null is the one that submits, in a container ``python``."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, or that belong to another kind."""
        for name, least in (
            ("nodes", 1),
            ("nproc_per_node", 1),
            ("max_restarts", 0),
            ("join_timeout_s", 1),
            ("signal_lead_s", 1),
            ("max_restarts_without_progress", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"launch.{name}={value} must be at least {least}")
        self._check_kind()
        for name in ("time_limit", "alone_time_limit"):
            limit = getattr(self, name)
            if time_limit_s(limit, f"launch.{name}") <= self.signal_lead_s:
                raise ConfigError(
                    f"launch.{name}={limit} is not longer than launch.signal_lead_s={self.signal_lead_s}: the ranks "
                    "would be asked to save before they start"
                )

    def _check_kind(self) -> None:
        kinds: dict[str, tuple[LaunchKind, ...]] = {
            "nodes": (LaunchKind.torchrun, LaunchKind.slurm),
            "nproc_per_node": (LaunchKind.torchrun,),
            "rendezvous": (LaunchKind.torchrun,),
            "is_host": (LaunchKind.torchrun,),
            "local_address": (LaunchKind.torchrun,),
            "max_restarts": (LaunchKind.torchrun,),
            "dry_run": (LaunchKind.slurm,),
            "container_image": (LaunchKind.slurm,),
            "container_mounts": (LaunchKind.slurm,),
            "python": (LaunchKind.slurm,),
        }
        for name, allowed in kinds.items():
            value = getattr(self, name)
            if value and self.kind not in allowed:
                raise ConfigError(
                    f"launch.{name}={value} is read with launch={' or '.join(allowed)} only, but launch={self.kind}; "
                    "leave it out, or choose another launch="
                )
        if self.kind is LaunchKind.torchrun and (self.nodes or 1) > 1:
            if not re.fullmatch(r"\S+:\d+", self.rendezvous):
                raise ConfigError(
                    f"launch.nodes={self.nodes} needs launch.rendezvous=<first host>:<port>, the same on every host, "
                    f"but it is {self.rendezvous!r}"
                )
            if not 0 < int(self.rendezvous.rpartition(":")[2]) < 2**16:
                raise ConfigError(f"launch.rendezvous={self.rendezvous} must end in a port from 1 to 65535")
        elif self.rendezvous:
            raise ConfigError(f"launch.rendezvous={self.rendezvous} is where several hosts meet; set launch.nodes too")


@dataclass(kw_only=True)
class VariableConfig:
    """An environment variable of a cluster's ranks."""

    value: str = ""
    """What it is set to, unless the shell that submits has set it."""
    why: str = ""
    """The reason, shown beside it in the scripts."""

    def __post_init__(self) -> None:
        """Refuse what a script would read as something else."""
        if re.search(r'["$`\\\n]', self.value) or "\n" in self.why:
            raise ConfigError(
                f"cluster.variables: the value {self.value!r} ({self.why!r}) must be one line without quotes, $, ` and "
                "backslashes"
            )


@dataclass(kw_only=True)
class ClusterConfig:
    """The cluster that ``launch=slurm`` submits to: one file in ``conf/cluster/`` each."""

    partition: str | None = None
    """Queue of jobs on the whole allocation; null is the cluster's default."""
    alone_partition: str | None = None
    """Queue of jobs of one process without GPU; null is `partition`."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    gpus_per_node: int = 8
    """GPUs of a node, one rank each; 0: the ranks compute on CPUs."""
    gpu: Gpu | None = None
    """Kind of those GPUs: FP8 that it cannot do is refused before anything is submitted; null leaves that to the
    ranks."""
    ranks_per_node: int | None = None
    """Ranks of a node without GPUs; null with GPUs."""
    cpus_per_rank: int = 1
    """Cores of each rank, and its threads."""
    alone_cpus: int = 1
    """Cores of a job of one process."""
    alone_memory: str | None = None
    """Memory of a job of one process, such as 64G; null is the partition's default."""
    exclusive: bool = False
    """Whole nodes for jobs on the whole allocation."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --constraint=ib."""
    variables: dict[str, VariableConfig] = field(default_factory=dict)
    """Environment of the ranks, by name; what the submitting shell has set wins."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.gpus_per_node < 0:
            raise ConfigError(f"cluster.gpus_per_node={self.gpus_per_node} must be at least 0")
        for name in ("cpus_per_rank", "alone_cpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        if self.gpus_per_node and self.ranks_per_node is not None:
            raise ConfigError(
                f"cluster.ranks_per_node={self.ranks_per_node} is for nodes without GPUs; with cluster.gpus_per_node="
                f"{self.gpus_per_node} each GPU has one rank: set it to null"
            )
        if not self.gpus_per_node and (self.ranks_per_node or 0) < 1:
            raise ConfigError(
                f"cluster.gpus_per_node=0 needs cluster.ranks_per_node of at least 1, but it is {self.ranks_per_node}"
            )
        for name in self.variables:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigError(f"cluster.variables has {name!r}, which is no name of an environment variable")
        for option in self.options:
            if not option.startswith("-"):
                raise ConfigError(f"cluster.options has {option!r}; each is an option of sbatch, such as --nice=10")

    @property
    def most_ranks(self) -> int:
        """Ranks that a node holds."""
        return self.gpus_per_node or self.ranks_per_node or 1


def time_limit_s(text: str, key: str) -> int:
    """Seconds of a time such as ``1-12:00:00``.

    >>> time_limit_s("1-00:00:10", "")
    86410

    Raises:
        ConfigError: It is no such time, or none at all.
    """
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    seconds = 0
    if parts is not None:
        days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
        seconds = ((24 * days + hours) * 60 + minutes) * 60 + rest
    if not seconds:
        raise ConfigError(f"{key}={text} must be a time [days-]hours:minutes:seconds, such as 04:00:00 or 2-00:00:00")
    return seconds


def nodes_of(launch: LaunchConfig, cluster: ClusterConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Hosts of a job on the whole allocation, and ranks on each.

    Raises:
        LayoutError: The layout does not fill them; with the arithmetic.
    """
    ranks = parallel.num_ranks
    if launch.kind is LaunchKind.local:
        return 1, ranks
    if launch.kind is LaunchKind.torchrun:
        nodes = launch.nodes or 1
        each = launch.nproc_per_node or max(1, ranks // nodes)
        said = f"launch.nodes={nodes} x launch.nproc_per_node={each}"
    else:
        most = cluster.most_ranks
        nodes = launch.nodes or max(1, -(-ranks // most))
        each = most if nodes > 1 else min(ranks, most)
        said = f"{nodes} nodes x {each} ranks (cluster.{'gpus' if cluster.gpus_per_node else 'ranks'}_per_node={most})"
    if nodes * each != ranks:
        raise LayoutError(
            f"{said} = {nodes * each} processes, but the layout needs {parallel.arithmetic()}; change "
            "parallel.data_parallel_size or the number of nodes"
        )
    return nodes, each
