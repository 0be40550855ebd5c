"""How a command ends when something is in its way: one message, one exit code, no traceback."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tasks.core import hardware
from tasks.core.settings import Settings, without_secrets
from tasks.domain.errors import UserError, printable

# What a person can do something about, and what.
STORAGE = {
    **dict.fromkeys((*hardware.NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS), "Free space or mend the permissions"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP), "Correct the path, or choose another home by CARTWRIGHT_HOME"),
    errno.EIO: "See whether the disk is sound",
}
OF_A_DISK = (*hardware.NO_ROOM, errno.EACCES, errno.EROFS)  # even where no file is named; others may be a process's, or a terminal's
SERVERS = {"mlflow": "MLflow", "httpx": "Prefect's API", "httpcore": "Prefect's API"}  # by the package whose error it is
AGAIN = "run the same command again; finished stages are kept"


def fail(message: str, code: int = 1) -> NoReturn:
    """End with a message; with 2 the user can mend what is wrong."""
    print(printable(f"Error: {message}" if code == 2 else message), file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_message(settings: Settings) -> Iterator[None]:
    """What a person can mend is one message and exit code 2."""
    try:
        yield
    except UserError as error:
        fail(without_secrets(str(error)), 2)
    except Exception as error:
        if told := _told(error, settings):
            fail(told, 2)
        raise
    except KeyboardInterrupt:
        fail("Stopped. The same command goes on where this one ended.", 130)


def _told(error: Exception, settings: Settings) -> str:
    """What a person is told of an error that is not ours; nothing of one that only a developer can do something about."""
    if isinstance(error, OSError) and error.errno in STORAGE and (error.filename or error.errno in OF_A_DISK):
        return f"{error.strerror}: {error.filename or settings.home}. {STORAGE[error.errno]}, and {AGAIN}."
    if hardware.disk_is_full(settings.home):
        return f"the disk is full: {settings.home}. Free space, and {AGAIN}."
    for cause in _causes(error):
        packages = [kind.__module__.partition(".")[0] for kind in type(cause).__mro__]
        if server := next((SERVERS[package] for package in packages if package in SERVERS), ""):
            reason = next(iter(without_secrets(str(cause)).splitlines()), "") or type(cause).__name__
            return f"{server} does not do what was asked ({reason[:300]}). See that it is there, and {AGAIN}.{_where_told(settings)}"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__


def _where_told(settings: Settings) -> str:
    """For developers: it may as well be that what was asked is wrong."""
    log = settings.home / "logs" / "error.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(without_secrets(traceback.format_exc()), encoding="utf-8")
    except OSError:
        return ""
    return f" The traceback is in {log}."


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
