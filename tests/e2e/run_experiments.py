"""One rank that runs several experiments one after another: its imports are paid for once."""

import os
import sys

from minitron.cli.main import main


def run(runs_dir: str, experiments_and_ports: list[str]) -> int:
    """Run each experiment, on a port of its own, up to the first that fails."""
    for pair in experiments_and_ports:
        experiment, port = pair.split(":")
        os.environ["MASTER_PORT"] = port
        code = main(["compress", f"experiment={experiment}", "scale=tiny", f"runs_dir={runs_dir}"])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
