"""How a rank ends after an error: with its message and code, and at once where groups are left standing."""

import subprocess
import sys
from pathlib import Path

import pytest

from minitron.cli import worker
from minitron.runtime.env import DistEnv

GROUP = """
import torch
torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
"""
SCRIPT = """
import atexit, sys
from minitron.cli.turn import end_process
atexit.register(print, "Python's own way out")
def main():
    print("said", flush=False)
    {body}
{group}
end_process(main)
"""


def _run(body: str, group: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(body=body, group=group)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("group", ["", GROUP], ids=["none", "standing"])
def test_exit_code(group: str) -> None:
    done = _run("return 7", group)
    assert done.returncode == 7
    assert done.stdout == ("said\n" if group else "said\nPython's own way out\n")


def test_ctrl_c_ends_a_rank_without_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's launcher hands SIGINT on; the group may be standing."""

    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "outside.json").write_text("{}")
    monkeypatch.setattr(worker, "dist_env", lambda: DistEnv(0, 2, 0))
    monkeypatch.setattr(worker, "prepare_rank", lambda: None)
    monkeypatch.setattr("minitron.config.compose.load_resolved", lambda _path: None)
    monkeypatch.setattr(worker, "run_rank", interrupted)
    assert worker.main(["resolved.yaml", "distill", str(tmp_path / "outside.json")]) == 130


@pytest.mark.parametrize("group", ["", GROUP], ids=["none", "standing"])
def test_a_bug_keeps_its_traceback(group: str) -> None:
    done = _run("raise KeyError('of ours')", group)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'of ours'")
    assert "Traceback" in done.stderr
    assert ("Python's own way out" in done.stdout) == (not group)
