"""metrics.jsonl through kills and resumes, TensorBoard's event file, and an offline run of Weights & Biases."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from minitron.config.run import TrackingConfig
from minitron.errors import PlatformError
from minitron.runtime.env import wandb_mode
from minitron.runtime.tracking import METRICS_FILE, MetricsWriter, read_metrics


def _writer(
    folder: Path, *, first_step: int = 1, enabled: bool = True, tracking: TrackingConfig | None = None
) -> MetricsWriter:
    tracking = tracking or TrackingConfig()
    return MetricsWriter(folder, tracking, run_name="t", config={"run.seed": 7}, first_step=first_step, enabled=enabled)


def test_records_are_read_back(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    writer.write(1, {"loss": 0.1 + 0.2})
    writer.write(2, {"loss": 1e-300, "lr": 3.0})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300, "lr": 3.0}]
    assert read_metrics(tmp_path / "none") == []


def test_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    for step in range(1, 8):
        writer.write(step, {"loss": float(step)})
    resumed = _writer(tmp_path, first_step=6)  # saved after step 5
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    resumed.write(6, {"loss": 60.0})
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]
    _writer(tmp_path, first_step=1)
    assert read_metrics(tmp_path) == []


def test_last_line_cut_off_by_a_kill_is_ignored_and_then_gone(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "loss": 2.0})
    (tmp_path / METRICS_FILE).write_text(f'{whole}\n{{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    _writer(tmp_path, first_step=2).write(2, {"loss": 3.0})
    assert (tmp_path / METRICS_FILE).read_text().splitlines() == [whole, json.dumps({"step": 2, "loss": 3.0})]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "out", enabled=False, tracking=TrackingConfig(tensorboard=True, wandb=True))
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "out").exists()


def test_tensorboard_event_file(tmp_path: Path) -> None:
    writer = _writer(tmp_path, tracking=TrackingConfig(tensorboard=True))
    writer.write(1, {"loss": 1.5, "block_output.29:13": 0.75})
    writer.write(2, {"loss": 0.5, "block_output.29:13": 0.25})
    writer.close()
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(1, 1.5), (2, 0.5)]
    assert [(event.step, event.value) for event in written.Scalars("block_output.29:13")] == [(1, 0.75), (2, 0.25)]


def test_what_was_written_before_an_error_is_kept(tmp_path: Path) -> None:
    """Ranks on several GPUs end without Python's own way out, which would have flushed it."""
    script = (
        "import os, sys; from pathlib import Path; from minitron.config.run import TrackingConfig\n"
        "from minitron.runtime.tracking import MetricsWriter\n"
        "tracking = TrackingConfig(tensorboard=True)\n"
        "try:\n"
        "    with MetricsWriter(Path(sys.argv[1]), tracking, run_name=0, config=0, first_step=1, enabled=1) as w:\n"
        "        w.write(1, {'loss': 2.0}); raise ValueError\n"
        "except ValueError: os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=200)
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


def test_tensorboard_after_a_resume_has_each_step_once(tmp_path: Path) -> None:
    tracking = TrackingConfig(tensorboard=True)
    writer = _writer(tmp_path, tracking=tracking)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    resumed = _writer(tmp_path, tracking=tracking, first_step=2)  # saved after step 1
    resumed.write(2, {"loss": 20.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, and nothing of wandb's outside the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))


def _wandb_records(file: Path) -> Iterator[Record]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format."""
    data, block, place, payload = file.read_bytes(), 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # no room for a record's header: the rest of the block is empty
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(payload)
            payload = b""


@pytest.mark.usefixtures("no_account")
def test_wandb_without_an_account_is_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = _writer(tmp_path / "out", tracking=TrackingConfig(wandb=True, wandb_project="p"))
    for step in (1, 2):
        writer.write(step, {"loss": 0.5**step, "lr": 3.0})
    writer.close()
    wandb.teardown()  # its service process
    assert capfd.readouterr() == ("", "")  # nothing asked, nothing said
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    records = list(_wandb_records(next(folder.glob("run-*.wandb"))))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.project) == ("t", "p")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["run.seed"] == 7
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"], row["lr"]) for row in history] == [(1, 0.5, 3.0), (2, 0.25, 3.0)]


@pytest.mark.usefixtures("no_account")
def test_wandb_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the user's word
    assert wandb_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(PlatformError, match="WANDB_MODE=of is not known to wandb"):
        wandb_mode()
