"""Sizes and times of a launch, and what is refused when a run is composed."""

import pytest

from minitron.config.compose import compose_run
from minitron.config.launch import LaunchKind, nodes_of, time_limit_s
from minitron.errors import ConfigError, LayoutError

TINY = ["experiment=tiny"]
TP2_PP2_DP4 = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.data_parallel_size=4",
    "distill.train.global_batch_size=16",
]


def _nodes(*overrides: str) -> tuple[int, int]:
    run = compose_run([*TINY, *overrides])
    return nodes_of(run.launch, run.cluster, run.parallel)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (1, 1)),
        (TP2_PP2_DP4, (1, 16)),
        ([*TP2_PP2_DP4, "launch=torchrun"], (1, 16)),
        ([*TP2_PP2_DP4, "launch=torchrun", "launch.nodes=2", "launch.rendezvous=a:1"], (2, 8)),
        ([*TP2_PP2_DP4, "launch=slurm", "cluster=dgx_h100"], (2, 8)),
        ([*TP2_PP2_DP4, "launch=slurm", "cluster=dgx_h100", "cluster.gpus_per_node=4"], (4, 4)),
        (["launch=slurm", "cluster=dgx_a100"], (1, 1)),
        (["launch=slurm", "parallel.pipeline_model_parallel_size=2"], (2, 1)),
        (["launch=slurm", "parallel.pipeline_model_parallel_size=2", "cluster.ranks_per_node=4"], (1, 2)),
    ],
)
def test_nodes(overrides: list[str], expected: tuple[int, int]) -> None:
    assert _nodes(*overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["launch=slurm", "cluster=dgx_h100", "launch.nodes=2"],
            "2 nodes x 8 ranks (cluster.gpus_per_node=8) = 16 processes, but the layout needs tensor 1 x pipeline 1 x",
        ),
        (
            ["launch=torchrun", "launch.nproc_per_node=8"],
            "launch.nodes=1 x launch.nproc_per_node=8 = 8 processes, but the layout needs tensor 1 x",
        ),
        (
            ["launch=slurm", "cluster.ranks_per_node=2", "parallel.pipeline_model_parallel_size=3"],
            "2 nodes x 2 ranks (cluster.ranks_per_node=2) = 4 processes, but the layout needs tensor 1 x pipeline 3",
        ),
    ],
)
def test_layouts_that_do_not_fill_the_nodes(overrides: list[str], message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        compose_run([*TINY, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch=sbatch"], "there are: local, slurm, torchrun"),
        (["launch.nodes=2"], "launch.nodes=2 is read with launch=torchrun or slurm only, but launch=local"),
        (["launch.dry_run=true"], "launch.dry_run=True is read with launch=slurm only, but launch=local"),
        (["launch=torchrun", "launch.nodes=2"], "launch.nodes=2 needs launch.rendezvous=<first host>:<port>"),
        (["launch=torchrun", "launch.nodes=2", "launch.rendezvous=host1"], "but it is 'host1'"),
        (["launch=torchrun", "launch.nodes=2", "launch.rendezvous=a:0"], "=a:0 must end in a port from 1 to 65535"),
        (["launch=torchrun", "launch.nodes=2", "launch.rendezvous=a:65536"], "=a:65536 must end in a port from 1 to"),
        (["launch=torchrun", "launch.rendezvous=host1:1"], "is where several hosts meet; set launch.nodes too"),
        (["launch=slurm", "launch.time_limit=90"], "launch.time_limit=90 must be a time [days-]hours:minutes:seconds"),
        (["launch=slurm", "launch.time_limit=00:00:00"], "launch.time_limit=00:00:00 must be a time"),
        (["launch=slurm", "launch.time_limit=00:05:00"], "launch.time_limit=00:05:00 is not longer than launch.signal"),
        (["launch=slurm", "cluster.gpus_per_node=0", "cluster.ranks_per_node=null"], "needs cluster.ranks_per_node of"),
        (
            ["launch=slurm", "cluster=dgx_h100", "cluster.ranks_per_node=4"],
            "cluster.ranks_per_node=4 is for nodes with",
        ),
        (["cluster.options=[ib]"], "cluster.options has 'ib'; each is an option of sbatch"),
        (["cluster.alone_cpus=0"], "cluster.alone_cpus=0 must be at least 1"),
        (["launch.max_restarts=-1"], "launch.max_restarts=-1 must be at least 0"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([*TINY, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["generic", "dgx_h100", "dgx_a100"])
def test_every_cluster_says_why_a_variable_is_set(name: str) -> None:
    run = compose_run([*TINY, "launch=slurm", f"cluster={name}"])
    assert run.launch.kind is LaunchKind.slurm
    assert all(variable.value and variable.why for variable in run.cluster.variables.values())
    assert run.cluster.most_ranks == (1 if name == "generic" else 8)


def test_time_limit() -> None:
    assert time_limit_s("04:00:00", "k") == 14_400
    assert time_limit_s("2-12:30:05", "k") == 2 * 86_400 + 12 * 3600 + 30 * 60 + 5
