"""The end of a child whose parent is gone.

A parent keeps the writing end of a pipe that it never writes to; the child waits on the reading end. When the parent
ends, by whatever cause, the kernel closes the pipe and the child ends its own process group at once. Works on every
system and for every kind of death; ``launch.py`` adds the kernel's own death signal on Linux for programs that are
not ours. Invariant: an engine that holds its line never outlives the server.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping

from fleetmind.node.launch import PR_SET_PDEATHSIG

LIFELINE_VARIABLE = "FLEETMIND_LIFELINE"
"""The environment variable with the number of the descriptor to wait on."""


def hold(environ: Mapping[str, str] = os.environ) -> None:
    """End this process group once the parent is gone; does nothing when started by hand, without a life line."""
    number = environ.get(LIFELINE_VARIABLE)
    if number is not None:
        threading.Thread(target=_wait, args=(int(number),), name="lifeline", daemon=True).start()


def shed() -> None:
    """Live on when the parent dies, as an engine may that is not ours: the one exception, made by the fake engine so
    that what ends such a process can be tested."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
