"""The wheel holds what a user without the checkout needs: the package, conf/ and the command."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_config_and_module(wheel: zipfile.ZipFile) -> None:
    conf = [p for p in (ROOT / "conf").rglob("*.yaml") if "local" not in p.relative_to(ROOT).parts]
    assert conf, "conf/ has no YAML file"
    modules = list((ROOT / "minitron").rglob("*.py"))
    expected = {f"minitron/{p.relative_to(ROOT)}" for p in conf}
    expected |= {str(p.relative_to(ROOT)) for p in modules}
    expected |= {f"minitron/{p.relative_to(ROOT)}" for p in (ROOT / "launch" / "slurm").iterdir()}
    assert expected <= set(wheel.namelist())


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"minitron", "minitron-0.1.0.dist-info"}


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("minitron-0.1.0.dist-info/entry_points.txt").decode()
    assert "minitron = minitron.cli.main:console" in text
