"""How a command ends when something is in its way: one message, one exit code, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str, code: int = 1) -> NoReturn:
    """End with a message; with 2 the user can mend what is wrong."""
    print(f"Error: {message}" if code == 2 else message, file=sys.stderr)
    raise SystemExit(code)


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
