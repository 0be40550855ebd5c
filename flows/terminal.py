"""How a command ends when something is in its way: one message, one exit code, no traceback."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tasks.core.settings import Settings, without_secrets
from tasks.domain.errors import UserError

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)  # what a person can do something about
FULL = 1 << 20  # bytes: with less, a database does not get on, whatever its error says
SERVERS = {"mlflow": "MLflow", "httpx": "Prefect's API", "httpcore": "Prefect's API"}  # by the package whose error it is
AGAIN = "run the same command again; finished stages are kept"


def fail(message: str, code: int = 1) -> NoReturn:
    """End with a message; with 2 the user can mend what is wrong."""
    print(f"Error: {message}" if code == 2 else message, file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_message(settings: Settings) -> Iterator[None]:
    """What a person can mend is one message and exit code 2."""
    try:
        yield
    except UserError as error:
        fail(str(error), 2)
    except Exception as error:
        if told := _told(error, settings):
            fail(told, 2)
        raise
    except KeyboardInterrupt:
        fail("Stopped. The same command goes on where this one ended.", 130)


def _told(error: Exception, settings: Settings) -> str:
    """What a person is told of an error that is not ours; nothing of one that only a developer can do something about."""
    if isinstance(error, OSError) and error.errno in STORAGE:
        return f"{error.strerror}: {error.filename or settings.home}. Free space or mend the permissions, and {AGAIN}."
    if settings.home.exists() and shutil.disk_usage(settings.home).free < FULL:
        return f"the disk is full: {settings.home}. Free space, and {AGAIN}."
    if server := SERVERS.get(type(error).__module__.partition(".")[0]):
        reason = next(iter(without_secrets(str(error)).splitlines()), "") or type(error).__name__
        return f"{server} does not do what was asked ({reason[:300]}). See that it is there, and {AGAIN}."
    return ""


@contextmanager
def goes_on() -> Iterator[None]:
    """What stops a run is one message that says how to go on."""
    from tasks.core.child import StageError

    try:
        yield
    except StageError as error:
        fail(f"{error}\nThe same command goes on after the last finished stage.")
    except KeyboardInterrupt:  # click would turn it into a bare `Aborted`
        fail("Stopped. The same command goes on where this one ended.", 130)
