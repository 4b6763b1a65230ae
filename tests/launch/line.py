"""The tiny experiment as these tests run it: two pipeline stages, enough steps to be interrupted in the middle."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "tiny"
NUM_STEPS = 160
TOKENS_PER_STEP = 8 * 32
_FOLDER = tempfile.TemporaryDirectory(prefix="minitron-launch-")


def command(verb: str, runs_dir: Path, *overrides: str) -> list[str]:
    """A command line of the experiment."""
    text = [
        "data=files",
        f"data.paths=[{_text()}]",
        "data.seq_length=32",
        "data.num_workers=1",
        "data.heldout_fraction=0.1",
    ]
    layout = ["parallel.pipeline_model_parallel_size=2", "device=cpu", "baseline.enabled=false"]
    train = [f"distill.train.num_tokens={NUM_STEPS * TOKENS_PER_STEP}", "distill.train.eval_interval_steps=0"]
    saves = ["distill.train.save_interval_steps=20"]
    start = [sys.executable, "-m", "minitron.cli.main", verb, "experiment=tiny", f"runs_dir={runs_dir}"]
    return [*start, *text, *layout, *train, *saves, *overrides]


@functools.cache
def _text() -> Path:
    """Folder of what the experiment reads: the repository's own sources, a document each."""
    folder = Path(_FOLDER.name)
    for number, source in enumerate(sorted((REPOSITORY / "minitron").rglob("*.py"))):
        (folder / f"{number}.txt").write_text(source.read_text(encoding="utf-8"))
    return folder


def environment() -> dict[str, str]:
    """This process's, without a place among ranks."""
    unset = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def minitron(verb: str, runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a verb on this machine."""
    return subprocess.run(
        command(verb, runs_dir, *overrides),
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
