"""metrics.jsonl through kills and resumes, and TensorBoard's event file."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minitron.config.run import TrackingConfig
from minitron.runtime.tracking import METRICS_FILE, MetricsWriter, read_metrics


def _writer(
    folder: Path, *, first_step: int = 1, enabled: bool = True, tracking: TrackingConfig | None = None
) -> MetricsWriter:
    tracking = tracking or TrackingConfig()
    return MetricsWriter(folder, tracking, run_name="t", config={}, first_step=first_step, enabled=enabled)


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
    writer.write(1, {"loss": 1.5})
    writer.write(2, {"loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.5), (2, 0.5)]
