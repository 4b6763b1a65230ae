"""A SLURM cluster on this machine: a head and nodes, each a host of its own, run by SLURM's own daemons."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launch.hosts import Network, wait_until

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
"""Debian's packages, by a program of each."""

_CONF = """\
ClusterName=tests
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# Neither cgroups nor core binding: the machine may have neither, and fewer cores than are declared.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
{more}
ReturnToService=2
KillWait=5
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
NodeName=DEFAULT CPUs=8 RealMemory=65536 State=UNKNOWN
{nodes}
# A job of the second queue takes the nodes of one in the first.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=2
"""


def install_slurm() -> None:
    """Install what is missing, with apt."""
    missing = sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})
    if not missing:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Shown:
    """What ``scontrol show job`` says."""

    state: str
    exit_code: str
    restarts: int
    reason: str


class SlurmCluster:
    """A running cluster.

    Args:
        folder: For its configuration, state and logs.
        num_nodes: Nodes beside the head.
    """

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self._folder = folder
        self._nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.network = Network(["head", *self._nodes], folder, prefix=f"slurm{os.getpid()}", subnet="10.83.7")
        self.head = self.network.hosts["head"]
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        self._write_conf()
        (self._folder / "state").mkdir()
        (self._folder / "munge.key").write_bytes(os.urandom(128))
        (self._folder / "munge.key").chmod(0o600)
        self.network.up()
        files = ("key-file=munge.key", "socket=munge.socket", "pid-file=munge.pid", "seed-file=munge.seed")
        options = [f"--{key}={self._folder / name}" for key, name in (file.split("=") for file in files)]
        self._daemon("head", "munged", "--foreground", "--force", *options)
        wait_until("munge", (self._folder / "munge.socket").exists, timeout_s=20)
        self._daemon("head", "slurmctld", "-D")
        for name in self._nodes:
            self._daemon(name, "slurmd", "-D", "-N", name)
        wait_until("idle nodes", lambda: self._num_idle() == len(self._nodes), timeout_s=60)

    def _write_conf(self, more: str = "") -> None:
        hosts = self.network.hosts
        nodes = "\n".join(f"NodeName={name} NodeAddr={hosts[name].address}" for name in self._nodes)
        names = ",".join(self._nodes)
        conf = _CONF.format(head=self.head.address, folder=self._folder, nodes=nodes, names=names, more=more)
        (self._folder / "slurm.conf").write_text(conf)

    @contextlib.contextmanager
    def configured(self, line: str) -> Iterator[None]:
        """For a while with another line in slurm.conf."""
        for more in (line, ""):
            self._write_conf(more)
            self.client("scontrol", "reconfigure")
            if more:
                yield

    def _num_idle(self) -> int:
        return len(set(self.client("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()))

    def stop(self) -> None:
        """Cancel every job and end the cluster."""
        self.client("scancel", "--user=root", check=False)
        self.network.down()

    def _daemon(self, host: str, *command: str) -> None:
        with (self._folder / f"{host}-{command[0]}.out").open("w") as log:
            self.network.hosts[host].start(command, log, env=self.env)

    def client(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM's on the head and return what it prints."""
        done = self.head.run(command, env=self.env, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return str(done.stdout)

    def show(self, job: int) -> Shown:
        """What has become of a job."""
        text = self.client("scontrol", "--oneliner", "show", "job", str(job))
        values = dict(word.partition("=")[::2] for word in text.split() if "=" in word)
        return Shown(values["JobState"], values["ExitCode"], int(values["Restarts"]), values["Reason"])

    def wait(self, jobs: Sequence[int], *, timeout_s: float) -> dict[int, Shown]:
        """Wait until none of the jobs will run again."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
        wait_until(
            f"jobs {jobs}",
            lambda: all(self.show(job).state in ended for job in jobs),
            timeout_s=timeout_s,
            interval_s=0.5,
        )
        return {job: self.show(job) for job in jobs}
