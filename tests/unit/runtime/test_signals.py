"""The signal to stop is kept, for this process, its threads and the programs it starts."""

import subprocess
import sys
import textwrap

SCRIPT = """
import os, signal, subprocess, sys, threading
from minitron.runtime.signals import hold_stop_signal, stop_was_asked
assert "torch" not in sys.modules
hold_stop_signal()
print(stop_was_asked())
started = threading.Event()
threading.Thread(target=started.wait).start()
child = subprocess.Popen([sys.executable, "-c", "import os; print('child', os.getpid() > 0, flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
for pid in (os.getpid(), child.pid):
    os.kill(pid, signal.SIGUSR1)
print(stop_was_asked(), stop_was_asked())
child.communicate("\\n")
print(child.returncode)
started.set()
"""


def test_the_signal_waits_and_kills_no_child() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True", "True", "0"]), done.stderr


def test_a_rank_holds_it_back_before_anything_heavy_is_imported() -> None:
    code = "import sys, minitron.cli.worker, minitron.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "megatron", "transformers", "numpy", "hydra"} & set(done.stdout.split())
