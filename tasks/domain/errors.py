"""The one error a user sees: which field, which value, what is allowed, how to mend it."""

from __future__ import annotations

import re

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_VALUE = 500  # characters of a value that are shown: it may be a whole file on one line


class UserError(ValueError):
    """Something the user gave cannot be used. Printed as one message, without a traceback, exit code 2."""

    def __init__(self, field: str, value: object, problem: str, *, allowed: object = None, mend: str = "") -> None:
        said = value if value is None else repr(value)
        if said and len(said) > LONGEST_VALUE:
            said = f"{said[:LONGEST_VALUE]}... ({len(said)} characters)"
        parts = [f"{field}: {problem}" if said is None else f"{field} = {said}: {problem}"]
        if allowed is not None:
            shown = ", ".join(map(str, allowed)) if isinstance(allowed, (list, tuple, set, frozenset)) else str(allowed)
            parts.append(f"Allowed: {shown}")
        if mend:
            parts.append(mend)
        super().__init__(". ".join(part.rstrip(".") for part in parts) + ".")
        self.field = field


def printable(text: str) -> str:
    """A text without what would steer a terminal: control characters, half characters, and those that turn the direction of writing."""
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)
