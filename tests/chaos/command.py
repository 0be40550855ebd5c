"""The command under way: a process of its own, or one forked from a process that has imported all it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Command:
    """A command that was given.

    Attributes:
        pid: of its process.
        exit_code: negative for a signal; None while it goes on.
    """

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self._output = pid, output
        self.exit_code: int | None = None
        self._over = threading.Event()
        self.started = time.monotonic()

    def over(self, code: int) -> None:
        """It has ended."""
        self.exit_code = code
        self._over.set()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def runs(self) -> bool:
        return not self._over.is_set()

    def signal(self, number: int) -> bool:
        """Send a signal; whether there was a process to get it."""
        if self.runs:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
                return True
        return False

    def wait(self, limit_s: float) -> bool:
        """Wait for the end; False, and killed, if it does not come within so many seconds of the start."""
        if self._over.wait(max(1.0, self.started + limit_s - time.monotonic())):
            return True
        self.signal(signal.SIGKILL)
        self._over.wait()
        return False


def start(arguments: list[str], environment: dict[str, str], output: Path) -> Command:
    """Give a command in a new interpreter."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            arguments,
            env=environment,
            cwd=REPOSITORY,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a background job of a shell ignores Ctrl-C
    command = Command(process.pid, output)
    threading.Thread(target=lambda: command.over(process.wait()), daemon=True).start()
    return command


class Imported:
    """A process that has imported a pipeline, from which its commands are forked, one at a time: imports are most of a short command."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.command", module], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: list[str], environment: dict[str, str], output: Path) -> Command:
        """Give a command; the one before must be over."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([arguments, environment, str(output)]) + "\n")
        self._process.stdin.flush()
        command = Command(int(self._process.stdout.readline()), output)
        threading.Thread(target=lambda: command.over(int(self._process.stdout.readline())), daemon=True).start()  # type: ignore[union-attr]
        return command

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _fork_commands(module: str) -> None:
    from importlib import import_module

    main = import_module(module).main
    for line in sys.stdin:
        arguments, environment, output = json.loads(line)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        if (pid := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.clear()
            os.environ.update(environment)
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            code = _exit_code(lambda: main(*arguments))  # noqa: B023 - called at once
            sys.stdout.flush()
            os._exit(code)
        os.close(descriptor)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _exit_code(call: Callable[[], None]) -> int:
    """As the interpreter would end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        call()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _fork_commands(sys.argv[1])
