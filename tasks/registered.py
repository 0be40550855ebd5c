"""A registered version in a process of its own: what is promoted must load from the registry and answer."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from tasks import runtimes
from tasks.core import hardware
from tasks.core.lifetime import tied
from tasks.core.registry import champion_files
from tasks.core.settings import child_environment, load_settings
from tasks.domain import prompt
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec

ANSWERS_WITHIN_S = 600
NO_ROOM = 28  # exit code
QUESTION = "where is my order?"


def problem_of(name: str, version: str) -> str:
    """Load a version of a registered model from the registry and ask it something; what went wrong, empty if nothing did.

    Raises:
        OSError: there is no room for its files, which is no fault of the model.
    """
    try:
        done = subprocess.run(
            tied("python", "-m", "tasks.registered", name, version),
            capture_output=True,
            text=True,
            env={**child_environment(), "TMPDIR": gettempdir()},  # that of this process, which may be one that is cleaned up
            timeout=ANSWERS_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWERS_WITHIN_S} s"
    if done.returncode == 0:
        return ""
    if done.returncode == NO_ROOM:
        raise OSError(errno.ENOSPC, "the disk is full", gettempdir())
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _answer(name: str, version: str) -> None:
    with TemporaryDirectory() as folder:
        try:
            path, runtime, asked_by = champion_files(load_settings(), name, Path(folder), version)
        except Exception as error:
            if hardware.says_full(error) or hardware.disk_is_full(Path(folder)):  # MLflow's own error has lost its cause
                sys.exit(NO_ROOM)
            raise
        model = runtimes.load(runtime, path, hardware.cores())
        (answer,) = model.generate([prompt.messages(load_spec(str(asked_by)), QUESTION)], 32, 1)
    if not answer.completion_tokens:
        raise ValueError("it answers nothing")


if __name__ == "__main__":
    try:
        _answer(*sys.argv[1:])
    except (UserError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
