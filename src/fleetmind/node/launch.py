"""Turns a fresh process into an engine: bounds first, then exec.

Run as a script (``python -I -S launch.py '{"parent": …}' -- argv…``) in the child, because ``preexec_fn`` is not safe
in a process with threads and because bounds set from outside leave a moment without them. Standard library only,
and as little of it as possible: it is in the way of every start. The process keeps its pid.

It sets: no core dumps (they would hold prompts and keys), the number of open files, a raised OOM score so that the
kernel ends an engine and not the server, niceness, and, on Linux, death when the parent dies. Invariant: no engine
runs without these; what the system refuses is said on stderr and only the death signal and core limit are required.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_NOT_STARTED = 127  # what a shell says of a command that cannot be found


def prepare(bounds: dict[str, int]) -> None:
    """Apply ``bounds`` (parent, files_max, oom_score, nice) to this process; ends it when the parent is gone."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = bounds["files_max"] if hard == resource.RLIM_INFINITY else min(bounds["files_max"], hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with suppress(OSError):  # not Linux, or a container that forbids it: then the kernel chooses as it likes
        Path("/proc/self/oom_score_adj").write_text(str(bounds["oom_score"]))
    if bounds["nice"]:
        with suppress(OSError):
            os.nice(bounds["nice"])
    # Python ignores these two; an engine must not inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.umask(0o077)
    if sys.platform == "linux":
        import ctypes  # slow to import, needed here only

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != bounds["parent"]:  # it died before the line above
        os._exit(EXIT_NOT_STARTED)


def main(arguments: list[str]) -> None:
    """Apply the bounds in ``arguments[0]`` and become the command after ``--``."""
    prepare(json.loads(arguments[0]))
    assert arguments[1] == "--"
    command = arguments[2:]
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is the point
    except OSError as fault:
        sys.stderr.write(f"cannot start {command[0]}: {fault.strerror}\n")
        sys.stderr.flush()
        os._exit(EXIT_NOT_STARTED)


if __name__ == "__main__":
    main(sys.argv[1:])
