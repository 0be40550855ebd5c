"""No process outlives the one that started it. `python -m tasks.core.lifetime PID PROGRAM ...` ties another program to its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies; survives exec. Linux only, elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def tied(program: str, *arguments: str) -> list[str]:
    """The command line that runs a program of this environment so that it dies with the process that starts it."""
    return [sys.executable, "-m", "tasks.core.lifetime", str(os.getpid()), program, *arguments]


def _exec(parent: int, command: list[str]) -> None:
    die_with_parent(parent)
    program = Path(sys.executable).parent / command[0]
    os.execv(program, [str(program), *command[1:]])


if __name__ == "__main__":
    _exec(int(sys.argv[1]), sys.argv[2:])
