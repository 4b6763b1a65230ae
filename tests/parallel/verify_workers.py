"""What the ranks of the tests of the verify stage run. Imports no transformers: workers import this file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron.cli.verifying import verify
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device, RunConfig
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from tests.parallel.workers import in_layout


def verified(config: RunConfig, run: Path, parallel: ParallelConfig) -> dict[str, Any]:
    """The summary of the stage at a layout, in a run whose source is its ``import``."""
    with in_layout(parallel) as groups:
        session = Session(
            config=replace(config, parallel=parallel),
            run=RunFolder(run, lambda stage: "import" if stage == "source" else stage),
            groups=groups,
            device=Device.cpu,
            console=Console(quiet=True),
        )
        return verify(session, run / "verify")
