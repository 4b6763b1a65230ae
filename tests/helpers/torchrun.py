"""A user's own torchrun, on this machine."""

import sys


def torchrun(num_ranks: int) -> list[str]:
    """The start of its command line; a module and its arguments follow.

    The address is given: torchrun's own choice, this machine's name, leads nowhere in many a container.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=localhost"]
    return [*launcher, f"--nproc_per_node={num_ranks}"]
