"""One report of the synthetic run, written once for all tests that only read it."""

from pathlib import Path

import pytest

from minitron.report.write import write_report
from tests.unit.report import synthetic

RESOLVED = "name: demo\nnote: <b>&</b>\n"


@pytest.fixture(scope="session")
def report_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = synthetic.make_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(synthetic.as_run(run), run / "report", synthetic.importance(), RESOLVED)
    return run / "report"
