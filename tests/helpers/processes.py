"""Ending a job the hard way."""

import contextlib
import os
import signal
from pathlib import Path


def kill_tree(launcher: int) -> None:
    """SIGKILL the launcher and its ranks (which the launcher puts into sessions of their own)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [launcher]
    for pid in tree:
        tree += children.get(pid, [])
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):  # a rank may end when it loses its peer
            os.kill(pid, signal.SIGKILL)
