"""Stands for the main job under the launcher: does what its first argument says.

`exit:S`: process 1 ends with status S, the others wait. `die:N`: process 1 kills itself with signal
N, the others wait. `once:FILE`: as `exit:3`, but ends well when FILE is there. `wait`: until a
signal, and ends with 128 plus its number.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def wait():
    received = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, frame: received.append(number))
    sys.stderr.write("waiting\n")  # In one piece, also where nothing is buffered.
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # For a second one that should not come.
    sys.stderr.write(f"received {received}\n")
    sys.exit(128 + received[0])


if __name__ == "__main__":
    kind, _, value = sys.argv[1].partition(":")
    is_second = "--process_id=1" in sys.argv
    if kind == "once" and Path(value).exists():
        sys.exit(0)
    if is_second and kind == "exit":
        sys.exit(int(value))
    if is_second and kind == "die":
        os.kill(os.getpid(), int(value))
    if is_second and kind == "once":
        Path(value).touch()
        sys.exit(3)
    wait()
