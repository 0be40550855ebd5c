"""A stage in a process of its own: memory is given back, a measurement is not disturbed, and no child outlives its parent.

The parent writes a request, starts `python -m tasks.core.child`, and reads one JSON event a line from a pipe.
The child's output goes to a log file. `python -m tasks.core.child --exec PID PROGRAM ...` ties another program to its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core import hardware, progress, settings
from tasks.core.progress import Event
from tasks.domain.errors import UserError

if TYPE_CHECKING:
    from tasks.core.stage import Stage, StageConfig

PR_SET_PDEATHSIG = 1


class StageError(RuntimeError):
    """A stage failed. The message has the reason and, if it ran in a child, the path of its log."""


@dataclass(frozen=True)
class Outcome:
    metrics: dict[str, Any]
    peak_rss_mb: float | None


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies; survives exec. Linux only, elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


def run_isolated(
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Path],
    out_dir: Path,
    log: Path,
    on_event: Callable[[Event], None],
    secrets: Mapping[str, str],
) -> Outcome:
    """Run a stage's function in a child process and wait for it.

    Args:
        secrets: environment variables for this child alone.

    Raises:
        StageError: the child failed or was killed.
        UserError: the child found the user's input unusable.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    function = stage.function
    request = {
        "module": function.__module__,
        "stage": stage.name,
        "config": config.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "out_dir": str(out_dir),
        "parent": os.getpid(),
    }
    reading, writing = os.pipe()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.core.child", str(writing)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            env={**settings.child_environment(stage.reuse_memory), **secrets},
            start_new_session=True,  # a signal to its group reaches its own children too
        )
    os.close(writing)
    last: Event = {}
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        with os.fdopen(reading, encoding="utf-8") as events:
            for line in events:
                last = json.loads(line)
                if "done" in last or ("metrics" in last and "step" in last):
                    on_event(last)
        code = process.wait()
    finally:
        _kill_group(process)
    if code == 0 and "outcome" in last:
        return Outcome(last["outcome"], last["peak_rss_mb"])
    if "user_error" in last:
        raise _rebuilt_user_error(last)
    reason = last.get("error") or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
    raise StageError(f"Stage {stage.name} failed: {reason}. Its log: {log}")


def _rebuilt_user_error(event: Event) -> UserError:
    error = UserError(event["field"], None, "")
    error.args = (event["user_error"],)
    return error


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _main(descriptor: int) -> int:
    request = json.loads(sys.stdin.read())
    die_with_parent(request["parent"])
    events = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(event: Event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    progress.listen(send)
    try:
        from tasks.core.stage import Stage

        module = importlib.import_module(request["module"])
        stage = next(value for value in vars(module).values() if isinstance(value, Stage) and value.name == request["stage"])
        inputs = {name: Path(path) for name, path in request["inputs"].items()}
        metrics = stage.function(stage.config_type.model_validate(request["config"]), inputs, Path(request["out_dir"]))
    except UserError as error:
        send({"user_error": str(error), "field": error.field})
        return 2
    except OSError as error:
        traceback.print_exc()
        if error.errno == errno.ENOSPC:
            full = UserError(
                "store", request["out_dir"], "the disk is full", mend="Free space and run the same command again; finished stages are kept"
            )
            send({"user_error": str(full), "field": "store"})
            return 2
        send({"error": f"{type(error).__name__}: {error}"})
        return 1
    except Exception as error:
        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {error}"})
        return 1
    peak = hardware.peak_rss_mb() + metrics.get("workers_peak_rss_mb", 0)  # of a stage that shared its work among processes
    send({"outcome": metrics, "peak_rss_mb": round(peak, 1)})
    return 0


def tied(program: str, *arguments: str) -> list[str]:
    """The command line that runs a program of this environment so that it dies with the process that starts it."""
    return [sys.executable, "-m", "tasks.core.child", "--exec", str(os.getpid()), program, *arguments]


def _exec(parent: int, command: list[str]) -> None:
    die_with_parent(parent)
    program = Path(sys.executable).parent / command[0]
    os.execv(program, [str(program), *command[1:]])


if __name__ == "__main__":
    if sys.argv[1] == "--exec":
        _exec(int(sys.argv[2]), sys.argv[3:])
    code = _main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that libraries left running must not hold the process
