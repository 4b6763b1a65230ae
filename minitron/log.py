"""What minitron says outside its progress lines: one line on standard error."""

import sys


def complain(text: str) -> None:
    """Write a line to standard error at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
