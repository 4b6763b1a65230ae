"""What the launcher's environment variables say, and layouts they do not fit."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device
from minitron.errors import LayoutError, PlatformError
from minitron.runtime import env
from minitron.runtime.device import check_num_ranks, resolve_device
from minitron.runtime.env import DistEnv, SlurmJob, dist_env, first_host, num_cores, slurm_env, slurm_job

# As recorded: the variables that concern ranks, of SLURM 22.05 (two nodes, two tasks each) and torchrun of torch 2.13.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
}
TASK_3 = {
    **BATCH_SCRIPT,
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ONE_TASK = {
    **BATCH_SCRIPT,
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
}
ONE_AGENT_PER_NODE = {**TASK_3, "SLURM_LOCALID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
TORCHRUN = {
    "GROUP_RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "9",
    "TORCHELASTIC_RUN_ID": "run",
    "WORLD_SIZE": "16",
}
TORCHRUN_RANK = DistEnv(9, 16, 1, "10.0.0.1", 29500, "torchrun")
SLURM_RANK = DistEnv(3, 4, 1, "node1", 23456, "slurm")
# What a container may add to every task of SLURM's, without any torchrun.
# pyxis' pytorch_setup does RANK and LOCAL_RANK, a hook of enroot's the others.
REPEATED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HOME": "/root", "MASTER_ADDR": "10.0.0.1"}, None),
        (TORCHRUN, TORCHRUN_RANK),
        (BATCH_SCRIPT, None),
        (TASK_3, SLURM_RANK),
        ({**TASK_3, **REPEATED}, SLURM_RANK),
        ({**TASK_3, "RANK": "3", "LOCAL_RANK": "1"}, SLURM_RANK),
        ({**ONE_TASK, "RANK": "0", "LOCAL_RANK": "0"}, None),
        ({**BATCH_SCRIPT, "RANK": "0", "LOCAL_RANK": "0"}, None),
        (ONE_TASK, None),
        ({**ONE_TASK, **TORCHRUN}, TORCHRUN_RANK),
        ({**BATCH_SCRIPT, **TORCHRUN}, TORCHRUN_RANK),
        ({**ONE_AGENT_PER_NODE, **TORCHRUN}, TORCHRUN_RANK),
    ],
    ids=[
        "none",
        "address",
        "torchrun",
        "batch",
        "srun",
        "repeated",
        "pyxis",
        "pyxis-shell",
        "pyxis-batch",
        "shell",
        "in-shell",
        "in-batch",
        "in-srun",
    ],
)
def test_dist_env(environ: dict[str, str], expected: DistEnv | None) -> None:
    assert dist_env(environ) == expected


def test_a_single_task_is_a_rank_for_a_worker() -> None:
    assert slurm_env(ONE_TASK) == DistEnv(0, 1, 0, "node1", 23456, "slurm")
    assert slurm_env(BATCH_SCRIPT) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; start with torchrun, or"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK set but RANK, WORLD_SIZE"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "these must be numbers: RANK=9, WORLD_SIZE=two, LOCAL_RANK=1"),
        ({**TASK_3, "SLURM_PROCID": ""}, "these must be numbers: SLURM_PROCID=, SLURM_STEP_NUM_TASKS=4"),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS set but SLURM_PROCID, SLURM_LOCALID, SLURM_STEP",
        ),
        (
            {**TASK_3, **TORCHRUN},
            "torchrun was started by each of 4 SLURM tasks on 2 nodes; start it once per node (srun --ntasks",
        ),
        (
            {**TASK_3, "RANK": "0", "LOCAL_RANK": "1"},
            "RANK, LOCAL_RANK set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not",
        ),
        (
            {**TASK_3, **REPEATED, "RANK": "0"},
            "RANK, WORLD_SIZE, LOCAL_RANK = (0, 4, 1) but SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID = (3, 4,",
        ),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(PlatformError) as caught:
        dist_env(environ)
    assert message in str(caught.value)


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test sets in the environment is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_STEP_NUM_NODES", "GLOO_SOCKET_IFNAME", "TRITON_CACHE_DIR", "TRITON_HOME"):
            patch.delenv(name, raising=False)
        before = dict(os.environ)
        yield
        os.environ.clear()
        os.environ.update(before)


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask
tun0\t00000000\t010011AC\t0003\t0\t0\t0\t00000080
*\t00000000\t00000000\t0200\t0\t0\t0\t00000000
bmc0\t00000000\t010011AC\t0003\t0\t0\t200\t00000000
eth1\t00000000\t010011AC\t0003\t0\t0\t100\t00000000
ib0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF
"""


@pytest.mark.parametrize(
    ("address", "nodes", "given", "expected"),
    [
        ("127.0.1.1", "2", None, "eth1"),  # Debian's habit
        (None, "2", None, "eth1"),  # a name that leads nowhere
        ("10.0.0.7", "2", None, None),
        ("127.0.1.1", "1", None, None),
        ("127.0.1.1", "2", "ib0", "ib0"),
    ],
)
def test_gloo_listens_where_other_hosts_find_it(
    environ: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    address: str | None,
    nodes: str,
    given: str | None,
    expected: str | None,
) -> None:
    def lookup(_name: str) -> str:
        if address is None:
            raise socket.gaierror
        return address

    (tmp_path / "route").write_text(ROUTES)
    monkeypatch.setattr(env, "ROUTES", str(tmp_path / "route"))
    monkeypatch.setattr(socket, "gethostbyname", lookup)
    os.environ["SLURM_STEP_NUM_NODES"] = nodes
    if given:
        os.environ["GLOO_SOCKET_IFNAME"] = given
    env.prepare_rank()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


@pytest.mark.parametrize("given", [None, "file/kernels"])
def test_a_cache_that_cannot_be_written_goes_elsewhere(
    environ: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: str | None,
) -> None:
    """As in a read-only container, without a home folder, or where the submitting shell named a folder of its own."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    os.environ["HOME"] = str(tmp_path / "file")
    if given:
        os.environ["TRITON_CACHE_DIR"] = str(tmp_path / given)
    env.prepare_rank()
    folder = tmp_path / f"minitron-triton-{os.getuid()}"
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    said = capsys.readouterr().err
    assert said.startswith(f"TRITON_CACHE_DIR={tmp_path / given} cannot be written on ") if given else said == ""


def test_a_cache_that_can_be_written_stays(environ: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    env.prepare_rank()
    assert "TRITON_CACHE_DIR" not in os.environ
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path / "kernels")
    env.prepare_rank()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "kernels")
    monkeypatch.chdir(tmp_path)
    del os.environ["TRITON_CACHE_DIR"]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home, and no entry in passwd
    env.prepare_rank()
    assert os.environ["TRITON_CACHE_DIR"].endswith(f"/minitron-triton-{os.getuid()}")
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(("now", "most", "then"), [(256, 400, 400), (256, 1000, 500), (600, 1000, 600)])
def test_a_rank_may_open_many_files(now: int, most: int, then: int) -> None:
    script = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({now}, {most}))\n"
        "from minitron.runtime import env; env._OPEN_FILES = 500; env.prepare_rank()\n"
        "print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(then), str(most)]


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[1-2]", "node1"),
        ("dgx[07-08,12],login1", "dgx07"),
        ("dgx[12,07]", "dgx12"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("gpu-[0001-0100].site.org", "gpu-0001.site.org"),
    ],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_slurm_job() -> None:
    assert slurm_job({}) is None
    assert slurm_job(BATCH_SCRIPT) == SlurmJob(123456, 0)
    assert slurm_job({**TASK_3, "SLURM_RESTART_COUNT": "2"}) == SlurmJob(123456, 2)


def test_where_the_ranks_meet() -> None:
    assert SLURM_RANK.init_method == "tcp://node1:23456"
    assert DistEnv(0, 1, 0, "fd00::1", 5).init_method == "tcp://[fd00::1]:5"


def test_num_ranks_must_be_the_product() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    check_num_ranks(DistEnv(0, 4, 0), layout)
    for started in (2, 8):
        with pytest.raises(LayoutError) as caught:
            check_num_ranks(DistEnv(0, started, 0), layout)
        assert str(caught.value) == (
            f"{started} processes were started, but the layout needs tensor 2 x pipeline 2 x data 1 = 4; "
            "start as many, or change parallel.data_parallel_size"
        )


def test_cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Device.cuda if torch.cuda.is_available() else Device.cpu
    assert resolve_device(Device.auto) is expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert resolve_device(Device.cpu) is Device.cpu
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "this process and its children still see the GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(PlatformError, match=r"device=cuda, but torch .* sees no CUDA device; set device=cpu or auto"):
        resolve_device(Device.cuda)


def test_num_cores_is_positive() -> None:
    assert num_cores() >= 1
