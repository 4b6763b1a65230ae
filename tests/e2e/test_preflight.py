"""`minitron preflight` as a user runs it, on two processes."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_fails_is_one_row_and_the_exit_code(tmp_path: Path) -> None:
    settings = ["preflight.message_mb=1", "preflight.outlier_share=0", "preflight.min_free_gb=1e9"]
    overrides = [
        "experiment=tiny",
        "device=cpu",
        "parallel.data_parallel_size=2",
        "precision=fp8_current",
        f"runs_dir={tmp_path}",
        *settings,
    ]
    result = subprocess.run(
        [sys.executable, "-m", "minitron.cli.main", "preflight", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 10, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if " ok " in line or "FAILED" in line]
    rows = {line.split("  ")[0].strip(): line for line in lines}
    assert [name for name, line in rows.items() if "FAILED" in line] == ["FP8", "disk space"]
    assert {"ranks", "devices", "all-reduce by gloo, GB/s", "run folder", "clocks"} <= set(rows)
    assert "preflight.min_free_gb=1e+09" in result.stdout
    assert "not available: no GPU" in rows["FP8"]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: preflight: 2 of 11 checks failed: FP8, disk space; the table says why"]
    assert not list((tmp_path / "tiny").iterdir())  # it leaves a run's own files alone
