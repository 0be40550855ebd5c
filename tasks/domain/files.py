"""Reading files that people give: never more of them than fits, and one clear error for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

from tasks.domain.errors import UserError


def read_text(field: str, path: Path, most: int) -> str:
    """The text of a UTF-8 file, without a byte order mark; see `read_bytes`.

    Raises:
        UserError: also where it is not UTF-8; names the line.
    """
    try:
        data = read_bytes(field, path, most)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(field, f"{path}:{line}", f"is not UTF-8 ({error})", mend="Save it as UTF-8") from None


def read_bytes(field: str, path: Path, most: int) -> bytes:
    """The bytes of a file.

    Args:
        field: what the error calls it.
        most: bytes it may have. A device or a pipe says nothing of its size, so that is seen while reading.

    Raises:
        UserError: no such file, unreadable, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(field, str(path), "does not exist", mend="Restore it or correct the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise UserError(field, str(path), f"cannot be read ({error})", mend="Correct the path or the permissions") from None
    if len(data) > most:
        raise UserError(field, str(path), "is too large", allowed=f"at most {most:,} bytes", mend="Give fewer rows, or several files")
    return data
