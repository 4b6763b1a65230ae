"""What minitron says outside its progress lines: one line on standard error."""

import sys
import time

_OTHER_RANKS_WAIT_S = 5.0
"""Rank 0 speaks first: an error that all ranks meet is printed once."""


def complain(text: str) -> None:
    """Write a line to standard error at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report_error(error: Exception, *, rank: int) -> None:
    """Write a user's error in one line; other ranks than 0 wait, and are stopped if rank 0 has one too."""
    if rank != 0:
        time.sleep(_OTHER_RANKS_WAIT_S)
    where = "" if rank == 0 else f" (rank {rank})"
    complain(f"error{where}: {error}")
