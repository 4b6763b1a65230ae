"""Tests on hosts made of namespaces: they need root, and those with SLURM install it. `make test-slurm` runs them."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from minitron.runtime.tracking import read_metrics
from tests.launch.cluster import SlurmCluster, install_slurm
from tests.launch.line import NAME, minitron

MARKS = {
    "slurm": "needs root and apt: it makes network namespaces, installs SLURM and starts a cluster",
    "twonode": "needs root: it makes network namespaces",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = str(config.option.markexpr)
    for item in items:
        for mark, why in MARKS.items():
            if item.get_closest_marker(mark) is None:
                continue
            if mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"{why}; make test-slurm runs it"))
            elif os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason=f"{why}; this user is not root"))


@dataclass(frozen=True)
class Unbroken:
    """A run in one piece on this machine, two ranks: what runs that are broken must equal.

    Attributes:
        run: Its folder, everything up to the distilled model done.
        losses: Loss and gradient norm of every step of distill.
    """

    run: Path
    losses: list[tuple[float, float]]

    def copy_undistilled(self, runs_dir: Path) -> Path:
        """The run as it was before distill."""
        folder = runs_dir / NAME
        left_out = shutil.ignore_patterns("distill", "eval_distilled", "export", "report", "jobs", "resolved.yaml")
        shutil.copytree(self.run, folder, ignore=left_out)
        return folder


def losses_of(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of distill, finished or not."""
    folder = run / "distill"
    records = read_metrics(folder if folder.exists() else run / ".partial" / "distill")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    runs_dir = tmp_path_factory.mktemp("unbroken")
    done = minitron("compress", runs_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return Unbroken(runs_dir / NAME, losses_of(runs_dir / NAME))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    install_slurm()
    slurm = SlurmCluster(tmp_path_factory.mktemp("cluster"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
