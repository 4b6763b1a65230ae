"""A job whose ranks torchrun starts."""

import os
import subprocess
from pathlib import Path

from tests.helpers.torchrun import torchrun

REPOSITORY = Path(__file__).resolve().parents[2]


def _torchrun(folder: Path, num_ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    job = ["-m", "minitron.cli.main", "compress", "experiment=tiny", "device=cpu", f"runs_dir={folder}", *overrides]
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return subprocess.run(
        [*torchrun(num_ranks), *job],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_under_torchrun_one_rank_speaks(tmp_path: Path) -> None:
    """Rank 0 plans and refuses; the other's broken connection to it is not shown."""
    done = tmp_path / "tiny" / "distill"
    done.mkdir(parents=True)
    (done / "meta.json").write_text('{"digest": "x"}')
    result = _torchrun(tmp_path, 2, "parallel.data_parallel_size=2")
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if line.startswith(("error", "[rank"))]
    assert len(ours) == 1, result.stderr
    assert ours[0].startswith(f"error: {done} was made with other inputs")
