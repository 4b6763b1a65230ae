"""A run that is only planned."""

from pathlib import Path

import pytest


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("Some text.\n" * 50)
    return ["experiment=tiny", f"runs_dir={tmp_path}", "data=files", f"data.paths=[{tmp_path / 'text.txt'}]"]
