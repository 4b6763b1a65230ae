"""The verify stage: every axis pruned, at any layout, agrees with the masked teacher; what is wrong does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron.checkpoint.folder import read_model_config
from minitron.config.data import DataConfig, DataSource
from minitron.config.parallel import ParallelConfig
from minitron.config.precision import Dtype, PrecisionConfig
from minitron.config.prune import HeadResidual, PruneConfig, Ranking
from minitron.config.reconstruct import ReconstructConfig
from minitron.config.run import RunConfig
from minitron.data.build import build_dataset
from minitron.prune import slicer
from minitron.prune.ranking import choose
from minitron.prune.run import SPEC_FILE
from minitron.prune.scores import random_scores
from minitron.prune.slicer import apply_spec
from minitron.prune.spec import PruneSpec
from tests.helpers.pool import PoolError, WorkerPool
from tests.parallel.reference import VOCAB_SIZE, layout
from tests.parallel.verify_workers import verified

ALL_AXES = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[RunConfig, Path]:
    """A run with source and data."""
    root = tmp_path_factory.mktemp("verify")
    (root / "import").symlink_to(teacher / "checkpoint")
    for number in range(12):
        (root / f"{number}.txt").write_text(" ".join(f"line {n} of {number}\n" for n in range(20)))
    data = DataConfig(source=DataSource.files, paths=[str(root)], seq_length=16, num_workers=1, heldout_fraction=0.3)
    build_dataset(data, tokenizer_dir=teacher / "hf", vocab_size=VOCAB_SIZE, out_dir=root / "data")
    return RunConfig(data=data, prune=PruneConfig(reconstruct=ReconstructConfig(enabled=False))), root


def spec_of(run: Path, *, seed: int = 0, **sizes: object) -> PruneSpec:
    source = read_model_config(run / "import")
    config = PruneConfig(**sizes)  # type: ignore[arg-type]
    scores = random_scores(source, config.aggregation, seed)
    return choose(source, config, scores=scores, source_id=scores.source_id)


def pruned(base: Path, folder: Path, applied: PruneSpec, written: PruneSpec | None = None) -> Path:
    """A run beside the base's with a prune stage: what was applied, and what it says was."""
    folder.mkdir(exist_ok=True)
    for stage in ("import", "data"):
        (folder / stage).symlink_to(base / stage)
    apply_spec(applied, source=base / "import", out=folder / "prune")
    (written or applied).save(folder / "prune" / SPEC_FILE)
    return folder


@pytest.mark.parametrize(
    "parallel",
    [layout(), layout(tp=2), layout(pp=2), layout(tp=2, sp=True), layout(cp=2), layout(pp=3, vp=None)],
    ids=["1", "tp2", "pp2", "tp2 sp", "cp2", "pp3"],
)
def test_all_axes_at_once(
    pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path, parallel: ParallelConfig
) -> None:
    config, base = run
    folder = pruned(base, tmp_path / "run", spec_of(base, **ALL_AXES))
    for summary in pool.run(verified, parallel.num_ranks, config, folder, parallel):
        assert summary["tokens"] == 2 * 16
        assert summary["masked_teacher_error"] < 1e-5


@pytest.mark.parametrize("axis", ALL_AXES)
def test_a_wrong_unit_is_found(pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path, axis: str) -> None:
    """The spec in the folder is not the one that was applied, along one axis."""
    config, base = run
    sizes = {axis: ALL_AXES[axis]}
    if axis == "num_query_groups":
        sizes["num_attention_heads"] = 4
    folder = pruned(base, tmp_path / "run", spec_of(base, **sizes), spec_of(base, seed=1, **sizes))
    with pytest.raises(
        PoolError, match=r"NumericsError: verify: .* differ from the masked teacher's by .*; prune again"
    ):
        pool.run(verified, 1, config, folder, layout())


def test_rounding_is_no_wrong_unit(pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, base = run
    bf16 = replace(config, precision=PrecisionConfig(dtype=Dtype.bf16))
    folder = pruned(base, tmp_path / "run", spec_of(base, **ALL_AXES))
    (summary,) = pool.run(verified, 1, bf16, folder, layout())
    assert summary["masked_teacher_error"] < 2e-2


def test_merged_heads_are_not_compared(pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, base = run
    spec = spec_of(base, num_attention_heads=4, head_residual=HeadResidual.paper, ranking=Ranking.importance)
    (summary,) = pool.run(verified, 1, config, pruned(base, tmp_path / "run", spec), layout())
    assert summary["masked_teacher"] == "not compared (prune.head_residual=paper)"


def test_fitted_weights_are_not_compared(pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, base = run
    fitted = replace(config, prune=PruneConfig())
    (summary,) = pool.run(verified, 1, fitted, pruned(base, tmp_path / "run", spec_of(base, num_layers=3)), layout())
    assert summary["masked_teacher"] == "not compared (prune.reconstruct.enabled=true)"
    whole = pruned(base, tmp_path / "whole", spec_of(base))  # nothing is cut, so nothing is fitted
    (summary,) = pool.run(verified, 1, fitted, whole, layout())
    assert summary["masked_teacher_error"] == 0


def test_logits_that_are_not_finite(
    pool: WorkerPool, run: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base = run
    whole = slicer.slice_param
    monkeypatch.setattr(slicer, "slice_param", lambda *args: torch.full_like(whole(*args), torch.inf))
    folder = pruned(base, tmp_path / "run", spec_of(base, num_layers=3))
    with pytest.raises(PoolError, match=r"NumericsError: verify: \d+ of \d+ logits of the pruned model are not finite"):
        pool.run(verified, 1, config, folder, layout())
