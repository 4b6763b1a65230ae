"""A run that is only planned, and stand-ins for SLURM's programs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron.cli.main import main


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("Some text.\n" * 50)
    return ["experiment=tiny", f"runs_dir={tmp_path}", "data=files", f"data.paths=[{tmp_path / 'text.txt'}]"]


SLURM = ["prune.reconstruct.enabled=false", "launch=slurm", "cluster=generic"]

FAKE = """#!/bin/bash
# Numbers jobs from 101; refuses the one that $REFUSED names; squeue shows what is in the file "queue".
cd "$(dirname "$0")" || exit 1
echo "$(basename "$0") $*" >>calls
case $(basename "$0") in
    sbatch)
        case $* in *"${REFUSED:-nothing}.sbatch") echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac
        echo x >>count
        echo "$((100 + $(wc -l <count)));cluster" ;;
    squeue) cat queue ;;
esac
"""

Compress = Callable[..., int]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the stand-ins; ``calls`` in it has a line for each call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scancel", "squeue"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def compress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compress:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "text.txt").write_text("A text of some words.\n" * 100)
    text = ["data=files", f"data.paths=[{tmp_path / 'text.txt'}]", "data.seq_length=32", "data.num_workers=1"]

    def run(*overrides: str, verb: str = "compress") -> int:
        return main([verb, "experiment=tiny", f"runs_dir={tmp_path / 'runs'}", *text, *SLURM, *overrides])

    return run
