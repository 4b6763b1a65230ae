"""What a result was made with: versions, commit, machine."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import minitron

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "hydra-core", "numpy")


@functools.cache
def environment() -> dict[str, str]:
    """Versions of what decides a result, the commit of a checkout, and the machine."""
    found = {"minitron": minitron.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["commit"] = _commit()
    found["machine"] = f"{platform.system()} {platform.machine()}, {_processor()}"
    return found


def _commit() -> str:
    folder = Path(minitron.__file__).parent.parent
    if not (folder / ".git").exists():
        return "not a checkout"
    try:
        head = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if dirty else "")


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
