"""The one error a user sees: which field, which value, what is allowed, how to mend it."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. Printed as one message, without a traceback, exit code 2."""

    def __init__(self, field: str, value: object, problem: str, *, allowed: object = None, mend: str = "") -> None:
        parts = [f"{field} = {value!r}: {problem}" if value is not None else f"{field}: {problem}"]
        if allowed is not None:
            shown = ", ".join(map(str, allowed)) if isinstance(allowed, (list, tuple, set, frozenset)) else str(allowed)
            parts.append(f"Allowed: {shown}")
        if mend:
            parts.append(mend)
        super().__init__(". ".join(part.rstrip(".") for part in parts) + ".")
        self.field = field
