"""Metrics: always a JSONL file, and Weights & Biases or TensorBoard when asked for."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from minitron.config.run import TrackingConfig
from minitron.errors import StoppedError
from minitron.runtime.artefact import write_whole
from minitron.runtime.env import wandb_mode

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes one record per logged step. Every rank but one is silent.

    Args:
        folder: Where ``metrics.jsonl`` goes.
        tracking: Which trackers to feed besides.
        run_name: Name of the run in the trackers.
        config: Resolved configuration, shown in the trackers.
        first_step: Records of this step and later ones are dropped from an earlier attempt's file, so that a
            resumed run leaves one record per step.
        enabled: False on every rank but one.
    """

    def __init__(
        self,
        folder: Path,
        tracking: TrackingConfig,
        *,
        run_name: str,
        config: dict[str, Any],
        first_step: int,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        self._wandb: Any = None
        self._tensorboard: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        kept = [r for r in read_metrics(folder) if r["step"] < first_step]
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        if tracking.wandb:
            import wandb

            mode = wandb_mode()
            self._wandb = wandb.init(
                project=tracking.wandb_project,
                name=run_name,
                config=config,
                dir=str(folder),
                mode=mode,
                # Its capture of the console would tear the progress bar. Offline it has nothing to say but the path
                # of its folder, and that moves when the stage is done.
                settings=wandb.Settings(console="off", silent=mode != "online"),
            )
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one record.

        Args:
            step: Optimizer steps done (1 after the first).
            values: Metrics by name.
        """
        if not self._enabled:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Close, with what ended the training: what was written last tells most of an error."""
        self.close(failed=error is not None and not isinstance(error, StoppedError))

    def close(self, *, failed: bool = False) -> None:
        """Flush the trackers.

        Args:
            failed: Weights & Biases shows the run as failed.
        """
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, without a last line that was cut off by a kill."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
