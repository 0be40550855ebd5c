"""A stage in a process of its own: memory is given back, a measurement is not disturbed, and no child outlives its parent.

The parent has a process forked that has torch imported already, or starts `python -m tasks.core.child`, writes a request to its
standard input and reads one JSON event a line from a pipe. The child's output goes to a log file.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core import hardware, ledger, progress, settings
from tasks.core.fork_server import Forked, ForkServer, serve
from tasks.core.lifetime import die_with_parent
from tasks.core.progress import Event
from tasks.domain.errors import UserError

if TYPE_CHECKING:
    from tasks.core.stage import Stage, StageConfig

FORKS = ForkServer()
MAKE_ROOM = " (make room, or leave this variant out)"
OUT_OF_MEMORY = f", as the kernel does where memory runs out{MAKE_ROOM}"


ITS_LOG = ". Its log: "  # between a reason and the path of a log


class StageError(RuntimeError):
    """A stage failed. The message has the reason and, if it ran in a child, the path of its log."""


@dataclass(frozen=True)
class Outcome:
    metrics: dict[str, Any]
    peak_rss_mb: float | None


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
        OSError: the child failed, and the disk is full.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    function = stage.function
    environment = {**settings.child_environment(stage.preloaded), **secrets}
    request = {
        "module": function.__module__,
        "stage": stage.name,
        "config": config.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "out_dir": str(out_dir),
        "environment": environment,
    }
    if stage.measures and not stage.preloaded:
        FORKS.close()  # it would share pages of libraries with a benchmark, which would seem to need less memory
    last: Event = {}
    started = time.monotonic()
    output = log.open("ab")
    asked, asking = os.pipe()
    reading, writing = os.pipe()
    with output, os.fdopen(asking, "w") as question, os.fdopen(reading) as events:
        descriptors = (asked, output.fileno(), writing)
        try:
            process = FORKS.fork(*descriptors) if stage.preloaded and FORKS.usable() else _start(environment, *descriptors)
        except ChildProcessError as error:
            raise StageError(f"Stage {stage.name} failed: {error}") from None
        finally:
            os.close(asked)
            os.close(writing)
        try:
            with contextlib.suppress(BrokenPipeError), question:  # it has ended already: its exit code says why
                json.dump(request, question)
            for line in events:
                last = json.loads(line)
                if "done" in last or ("metrics" in last and "step" in last):
                    on_event(last)
            code = process.wait()
            ledger.waited_for({"stages": last.get("worked_s", time.monotonic() - started)})
        finally:
            _kill_group(process)
    if code == 0 and "outcome" in last:
        return Outcome(last["outcome"], last["peak_rss_mb"])
    if last.get("disk_full") or hardware.disk_is_full(out_dir):  # what is not written in Python has no error of its own for it
        raise OSError(errno.ENOSPC, "the disk is full", last.get("file") or str(out_dir))
    if "user_error" in last:
        raise _rebuilt_user_error(last)
    reason = last.get("error") or (
        f"killed by signal {-code}{OUT_OF_MEMORY * (code == -signal.SIGKILL)}" if code < 0 else f"exit code {code}"
    )
    raise StageError(f"Stage {stage.name} failed: {reason}{ITS_LOG}{log}")


def _rebuilt_user_error(event: Event) -> UserError:
    error = UserError(event["field"], None, "")
    error.args = (event["user_error"],)
    return error


def _kill_group(process: subprocess.Popen[bytes] | Forked) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(environment: Mapping[str, str], stdin: int, output: int, events: int) -> subprocess.Popen[bytes]:
    """A new interpreter for a stage."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.core.child", str(events), str(os.getpid())],
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(events,),
        env=environment,
        start_new_session=True,  # a signal to its group reaches its own children too
    )


def _mend(error: Exception) -> str:
    """What to do about an error of libraries: torch has one of its own for a GPU's memory, and a RuntimeError for a computer's."""
    short = isinstance(error, MemoryError) or re.search(
        r"(?i)out of memory|(can.?t|cannot|could not) allocate|failed to allocate", str(error)
    )
    return MAKE_ROOM if short else ""


def _work(descriptor: int, parent: int) -> int:
    """What the child does; its exit code."""
    die_with_parent(parent)
    request = json.loads(sys.stdin.read())
    settings.replace_environment(request["environment"])
    events = os.fdopen(descriptor, "w")

    def send(event: Event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    began = time.monotonic()

    def end(event: Event) -> None:
        send({**event, "worked_s": time.monotonic() - began})

    progress.listen(send)
    try:
        from tasks.core.stage import Stage

        module = importlib.import_module(request["module"])
        stage = next(value for value in vars(module).values() if isinstance(value, Stage) and value.name == request["stage"])
        inputs = {name: Path(path) for name, path in request["inputs"].items()}
        config = stage.config_type.model_validate(request["config"])
        began = time.monotonic()  # what comes before is the start of the process
        metrics = stage.function(config, inputs, Path(request["out_dir"]))
    except UserError as error:
        end({"user_error": str(error), "field": error.field})
        return 2
    except Exception as error:
        traceback.print_exc()
        end(
            {
                "error": f"{type(error).__name__}: {error}{_mend(error)}",
                "disk_full": hardware.says_full(error),
                "file": getattr(error, "filename", None),
            }
        )
        return 1
    peak = hardware.peak_rss_mb() + metrics.get("workers_peak_rss_mb", 0)  # of a stage that shared its work among processes
    end({"outcome": metrics, "peak_rss_mb": round(peak, 1)})
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--fork-server":
        serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]), _work)
        os._exit(0)  # at once: what was forked ends with this process, and its owner may be dead
    else:
        code = _work(int(sys.argv[1]), int(sys.argv[2]))
        os._exit(code)  # threads that libraries left running must not hold the process
