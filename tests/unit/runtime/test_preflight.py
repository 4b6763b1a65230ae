"""The preflight: really run on two processes, and its judgement of made-up machines."""

from dataclasses import replace
from pathlib import Path

import pytest

from minitron.config.precision import Fp8Recipe
from minitron.config.preflight import PreflightConfig
from minitron.runtime.bandwidth import Figures, Reduction, neighbour_of, outliers
from minitron.runtime.preflight import Asked, Check, Facts, judge
from tests.helpers.pool import WorkerPool
from tests.unit.runtime import preflight_workers

# A machine that runs other tests may be slow on one of its cores: no outlier fails here.
SETTINGS = PreflightConfig(message_mb=1, outlier_share=0.0)


def _by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    assert not any("\n" in f"{check.found}{check.reason}" for check in checks)
    return {check.name: check for check in checks}


def test_two_processes(pool: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    checks, others = pool.run(preflight_workers.run, 2, [folder, folder], SETTINGS)
    assert others == []
    found = _by_name(checks)
    assert [check.name for check in checks if check.reason] == []
    assert found["ranks"].found.startswith("2 on ")
    assert found["run folder"].found == "seen by all ranks"
    assert found["fused kernels"].found.startswith("Adam: torch")
    for name in ("all-reduce by gloo, GB/s", "links inside hosts, GB/s", "matrix products, TFLOPs"):
        assert float(found[name].found.split()[0]) > 0
    # Both processes read one clock; the way there and back is not equally long on a busy machine.
    assert float(found["clocks"].found.split()[1]) < 0.5
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_shared(pool: WorkerPool, tmp_path: Path) -> None:
    checks, _ = pool.run(preflight_workers.run, 2, [tmp_path / "mine", tmp_path / "other"], SETTINGS, wait_s=0.5)
    [failed] = [check for check in checks if check.reason]
    assert failed.name == "run folder"
    assert failed.reason is not None
    assert failed.reason.startswith("what rank 0 writes is not seen by rank 1 (")


def test_a_folder_that_cannot_be_written(pool: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    checks, _ = pool.run(preflight_workers.run, 2, [folder, folder], SETTINGS)
    failed = _by_name([check for check in checks if check.reason])
    assert set(failed) == {"run folder", "disk space"}
    assert failed["run folder"].reason == "rank 0 cannot write there; choose another runs_dir"


@pytest.mark.parametrize("size", range(1, 9))
def test_every_rank_meets_its_neighbours_in_pairs(size: int) -> None:
    met = set()
    for turn in (0, 1):
        for rank in range(size):
            other = neighbour_of(rank, size, turn)
            if other is not None:
                assert neighbour_of(other, size, turn) == rank
                met.add(frozenset((rank, other)))
    around = {frozenset((rank, (rank + 1) % size)) for rank in range(size if size % 2 == 0 else size - 1)}
    assert met == {pair for pair in around if len(pair) == 2}


def test_outliers() -> None:
    figures = {"a": 10.0, "b": 11.0, "c": 4.0, "d": 9.0, "e": 1.0}
    assert outliers(figures, 0.5) == ["e: 1", "c: 4"]  # the median is 9
    assert outliers(figures, 0.1) == []
    assert outliers({"alone": 1.0}, 0.9) == []


def _machine(num_ranks: int = 8) -> list[Facts]:
    """Ranks on hosts of four, each with the same GPU, ring neighbours at 200 (inside) and 40 GB/s."""
    hosts = [f"node{rank // 4}" for rank in range(num_ranks)]
    return [
        Facts(
            rank=rank,
            host=host,
            gpu="H100, 80 GB",
            gpu_id=str(rank % 4),
            capability=(9, 0),
            driver="570.1",
            versions="torch 2",
            kernels={"Adam": "transformer_engine"},
            transformer_engine="2.9",
            sees_run=True,
            free_bytes=10**12,
            figures=Figures(
                rank,
                host,
                {"nccl": Reduction(180.0, is_right=True), "gloo": Reduction(2.0 + rank, is_right=True)},
                {
                    other: 200.0 if hosts[other] == host else 40.0
                    for other in ((rank - 1) % num_ranks, (rank + 1) % num_ranks)
                },
                700.0 + rank,
            ),
        )
        for rank, host in enumerate(hosts)
    ]


def _failed(machine: list[Facts], offsets: list[float] | None = None, asked: Asked | None = None) -> dict[str, str]:
    checks = judge(machine, offsets or [0.0] * len(machine), PreflightConfig(), asked or Asked())
    return {name: check.reason for name, check in _by_name(checks).items() if check.reason is not None}


def test_a_sound_machine_passes() -> None:
    checks = _by_name(judge(_machine(), [0.0] * 8, PreflightConfig(), Asked()))
    assert not any(check.reason for check in checks.values())
    assert checks["ranks"].found == "8 on 2 hosts"
    assert checks["all-reduce by nccl, GB/s"].found == "180"
    assert checks["all-reduce by gloo, GB/s"].found == "2"  # the slowest rank's
    assert checks["links inside hosts, GB/s"].found == "200"
    assert checks["links between hosts, GB/s"].found == "40"  # slower by nature, no outlier
    assert checks["matrix products, TFLOPs"].found == "700 to 707"
    assert checks["FP8"].found == "available: compute capability 9.0"


def test_what_is_wrong_is_named() -> None:
    machine = _machine()

    def changed(rank: int, **values: object) -> list[Facts]:
        return [replace(f, **values) if f.rank == rank else f for f in machine]  # type: ignore[arg-type]

    figures = machine[5].figures
    slow_link = replace(figures, links_gbs={**figures.links_gbs, 6: 12.0})
    assert _failed(changed(5, figures=slow_link)) == {
        "links inside hosts, GB/s": "slow: rank 5 (node1) to rank 6 (node1): 12"
    }
    assert _failed(changed(5, figures=replace(figures, tflops=100.0))) == {
        "matrix products, TFLOPs": "slow: rank 5 (node1): 100"
    }
    wrong = {**figures.reductions, "gloo": Reduction(2.0, is_right=False)}
    assert _failed(changed(5, figures=replace(figures, reductions=wrong))) == {
        "all-reduce by gloo, GB/s": "the sum is wrong on rank 5 (node1)"
    }
    assert _failed(changed(5, gpu="A100, 40 GB")) == {
        "devices": "the others have H100, 80 GB, but rank 5 (node1): A100, 40 GB"
    }
    assert _failed(changed(5, gpu_id="0")) == {
        "one GPU a rank": "one GPU for rank 4 (node1) and rank 5 (node1); start one rank for each GPU"
    }
    assert _failed(changed(5, driver="535.1")).keys() == {"driver"}
    assert _failed(changed(5, transformer_engine=None)) == {
        "Transformer Engine": "it cannot be imported on rank 5 (node1); install minitron's extra `gpu`"
    }
    assert _failed(changed(5, free_bytes=10**8)).keys() == {"disk space"}
    assert _failed(machine, [0, 0, 0, 0, 0, -3.5, 0, 0]) == {
        "clocks": "more than preflight.max_clock_skew_s=1 from rank 0: rank 5 (node1): -3.500 s"
    }
    blind = [replace(facts, sees_run=False) if facts.rank >= 2 else facts for facts in machine]
    assert _failed(blind)["run folder"] == (
        "what rank 0 writes is not seen by rank 2 (node0); rank 3 (node0); rank 4 (node1); rank 5 (node1) and 2 more; "
        "runs_dir must be a folder all hosts share"
    )


def test_fp8_that_is_asked_for() -> None:
    key = "precision.fp8_recipe"
    asked = Asked({key: Fp8Recipe.mxfp8})
    assert _failed(_machine(), asked=asked) == {}  # no rank has refused it
    why = "mxfp8 needs compute capability 10.0"
    machine = [replace(facts, refused_fp8={key: why} if facts.rank in (3, 5) else {}) for facts in _machine()]
    assert _failed(machine, asked=asked) == {
        "FP8": f"{why} (rank 3 (node0); rank 5 (node1)); choose another recipe, or precision=bf16"
    }
    found = _by_name(judge(machine, [0.0] * 8, PreflightConfig(), asked))["FP8"].found
    assert found == "available: compute capability 9.0, precision.fp8_recipe=mxfp8 asked for"


def test_a_driver_without_a_gpu_in_torch() -> None:
    machine = [replace(facts, gpu=None, capability=None) for facts in _machine(2)]
    failed = _failed(machine, asked=Asked(prefers_gpu=True))
    assert failed.keys() == {"devices"}
    assert failed["devices"].startswith(
        "NVIDIA's driver is loaded, but torch sees no CUDA device on rank 0 (node0); rank 1 (node0); install a torch"
    )
    assert _failed(machine) == {}  # device=cpu
    assert _failed([replace(facts, driver="none") for facts in machine], asked=Asked(prefers_gpu=True)) == {}
