"""One process that has imported torch and transformers, from which the processes of stages are forked.

The import takes 4 to 12 seconds, and a run has twenty stages that need it. A fork takes none, and shares the memory of what was
imported. The server dies with its owner, and what was forked from it dies with the server.

Linux only, and only without a GPU: CUDA does not survive a fork. Elsewhere each stage starts an interpreter of its own. The threads
that are there when it forks are of OpenBLAS and of Arrow's allocator, which are made for that; torch has computed nothing yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tasks.core import hardware, settings
from tasks.core.lifetime import die_with_parent

# What stages that train, quantize or score with torch have in common. Not gptqmodel: it starts workers when it is imported.
MODULES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
    "datasets",
    "peft",
    "bitsandbytes",
    "safetensors.torch",
)
OTHER_GPUS = ("/dev/kfd", "/dev/dxg")  # AMD's, and any in WSL
LOOK_S = 0.2  # how often a server that still imports looks whether its owner lives
GONE = (BrokenPipeError, ConnectionResetError, ChildProcessError)

Work = Callable[[int, int], int]


class Forked:
    """A process that was forked for us. Its exit code comes through a pipe, as it is not our child.

    Attributes:
        pid: of its supervisor, which leads the group of both and ends right after it.

    Raises:
        ChildProcessError: the server ended, perhaps for want of memory.
    """

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status)
        if not (pid := self._status.readline()):
            self._status.close()
            raise ChildProcessError("the process from which stages are forked has ended")
        self.pid = int(pid)
        self._code: int | None = None

    def wait(self) -> int:
        """Exit code, negative for a signal. Where its supervisor has ended without one, it was killed with it."""
        if self._code is None:
            with self._status:
                self._code = int(self._status.readline() or -signal.SIGKILL)
        return self._code


class ForkServer:
    """Begins with the first process that is asked for, and anew after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    @staticmethod
    def usable() -> bool:
        return sys.platform == "linux" and hardware.gpu() is None and not any(Path(device).exists() for device in OTHER_GPUS)

    def fork(self, stdin: int, output: int, events: int) -> Forked:
        """A process that does the server's work with these descriptors. What the server itself has to say goes to `output`, too.

        Raises:
            ChildProcessError: the server ended twice.
        """
        with self._lock:
            for _ in range(2):
                with contextlib.suppress(*GONE):
                    return self._ask(stdin, output, events)
                self._end()
            raise ChildProcessError("the process from which stages are forked has ended, and so has the next one")

    def warm(self) -> None:
        """Let the import begin beside what is done until the first process is asked for. Who asks for one is told what is wrong, not who warms."""
        if self.usable():
            with self._lock, contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                self._running(nowhere.fileno())

    def close(self) -> None:
        """Give its memory back; the next stage starts it again. What was forked from it ends with it."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._requests:
            self._requests.close()
        if self._process:
            self._process.kill()  # it may be importing still
            self._process.wait()
        self._requests = self._process = None

    def _ask(self, *descriptors: int) -> Forked:
        reading, writing = os.pipe()
        try:
            socket.send_fds(self._running(descriptors[1]), [b"\0"], [*descriptors, writing])
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return Forked(reading)

    def _running(self, output: int) -> socket.socket:
        if self._requests and self._process and self._process.poll() is None:
            return self._requests
        self._end()
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks.core.child", "--fork-server", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                env=settings.child_environment(reuse_memory=True),
                start_new_session=True,  # Ctrl-C is for the owner to handle
            )
        return self._requests


def serve(requests: socket.socket, owner: int, work: Work) -> None:
    """Fork a process for every request, until the owner has closed the other end.

    Args:
        owner: pid of the process that started this one.
        work: given a descriptor for events and the pid of the parent, does a stage's work and gives the exit code.
    """

    def look(number: int, frame: FrameType | None) -> None:
        if os.getppid() != owner:
            os._exit(1)

    # The kernel could tell, but only of the end of the thread that started this process, and that may not be the owner's last one.
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
    gc.disable()  # next to nothing of what an import makes is garbage
    for name in MODULES:
        with contextlib.suppress(Exception):  # whatever is wrong with it, the stage that needs it will say so
            importlib.import_module(name)
    gc.freeze()  # nor is it searched by what is forked, which would have to copy every page of it
    gc.enable()
    signal.setitimer(signal.ITIMER_REAL, 0)  # from here on the end of the owner is the end of its requests
    signal.signal(signal.SIGCHLD, _reap)
    server = os.getpid()
    while descriptors := socket.recv_fds(requests, 1, 4)[1]:
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _supervise(server, descriptors, work)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap(number: int, frame: FrameType | None) -> None:
    """Supervisors that have ended. Waited for, unlike ignored, the processor time of them and their stages is the server's, and so its owner's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _supervise(server: int, descriptors: list[int], work: Work) -> None:
    """Fork the stage's process, wait for it and say its exit code."""
    stdin, output, events, status = descriptors
    die_with_parent(server)
    os.setsid()  # a signal to its group reaches the stage's own children too
    supervisor = os.getpid()
    os.write(status, f"{supervisor}\n".encode())
    if (pid := os.fork()) == 0:
        code = 1
        try:
            for descriptor, place in ((stdin, 0), (output, 1), (output, 2)):
                os.dup2(descriptor, place)
            os.close(stdin)
            os.close(output)
            os.set_inheritable(status, False)  # kept open: that it is closed says that this process has ended, however it did
            code = work(events, supervisor)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    for descriptor in (stdin, output, events):  # the owner waits for their end
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\n".encode())
