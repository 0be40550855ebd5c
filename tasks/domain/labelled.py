"""Labelled rows of one's own, as JSONL: `{"text": ..., "gold": {...}}` a line, optionally with `language`, `source` and `score`.

A field that is null, as exports of tables have them, is one that is not there.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tasks.domain.errors import UserError
from tasks.domain.files import read_bytes
from tasks.domain.scoring import normalise
from tasks.domain.spec import CatalogSlot, CodeSlot, IntegerSlot, SlotDefault, Spec

ROWS_READ_BY = 2  # number of the rules of this module: what was made of a team's rows by others is made anew
LARGEST_FILE = 256_000_000  # bytes
MOST_LINES = 500_000  # of a file; a row takes about a kilobyte in memory, however short it is
LONGEST_LINE = 1_000_000  # characters
DEEPEST = 50  # levels of nesting; what goes through a row level by level must never be near the end of Python's stack
SHOWN = 80  # characters of a wrong value
SHOWN_NAMES = 12  # intents or slots that are allowed in its place
READ = ("text", "gold", "language", "source", "score")  # the fields that are held in memory, and a plain `id`


def read_lines(field: str, path: Path) -> Iterator[bytes]:
    """Lines of a file, without a byte order mark, one by one: a list of them could take twenty times the size of the file.

    Args:
        field: what an error calls the file.

    Raises:
        UserError: it cannot be read, is larger than `LARGEST_FILE`, or has more than `MOST_LINES`.
    """
    for number, line in enumerate(io.BytesIO(read_bytes(field, path, LARGEST_FILE)), 1):  # splitlines() would also cut inside texts
        if number > MOST_LINES:
            raise UserError(field, str(path), "has too many lines", allowed=f"at most {MOST_LINES:,} lines", mend="Give several files")
        yield line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").removesuffix(b"\n")


def read_labelled(path: Path, spec: Spec, field: str = "data") -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Labelled rows of a JSONL file, with what they have of `READ` and their `line`, and the lines that cannot be used with their problem.

    Raises:
        UserError: see `read_lines`.
    """
    rows, bad = [], []
    for number, line in enumerate(read_lines(field, path), 1):
        if not line.strip():
            continue
        row, problem = parse_json(line)
        row = _plain(row)
        problem = problem or _problem_of(row, spec)
        if problem:
            bad.append((number, problem))
        else:
            kept = {name: row[name] for name in READ if name in row}
            kept |= {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
            rows.append({**kept, "line": number, "gold": {**_defaults(row["gold"], spec), **row["gold"]}})
    return rows, bad


def read_training(path: Path, spec: Spec, field: str = "data") -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """As `read_labelled`, of the rows that a model may learn from: every field is labelled, and what is labelled is said.

    Raises:
        UserError: as `read_labelled`.
    """
    labelled, bad = read_labelled(path, spec, field)
    rows = []
    for row in labelled:
        problem = _unfit_for_training(row, spec)
        if problem:
            bad.append((row["line"], problem))
        else:
            codes = {name: value.lstrip("#") for name, value in row["gold"].items() if isinstance(spec.slots.get(name), CodeSlot)}
            rows.append({**row, "gold": {**row["gold"], **codes}})  # without the "#", as the generator labels them
    return rows, sorted(bad)


def _unfit_for_training(row: dict[str, Any], spec: Spec) -> str | None:
    gold = row["gold"]
    if "score" in row:  # a label in part would teach the model to leave the rest out
        return f"not every field is labelled. Given: `score` is {_shown(row['score'])}"
    if missing := [name for name, use in spec.intents[gold["intent"]].slots.items() if use == "always" and name not in gold]:
        return f"`gold` has no {missing[0]}, which {gold['intent']} always has"
    said = str(normalise(row["text"]))
    for name, value in gold.items():
        slot, use = spec.slots.get(name), spec.intents[gold["intent"]].slots.get(name)
        if isinstance(use, SlotDefault) and value == use.default:
            continue
        if isinstance(slot, CatalogSlot | CodeSlot):
            written = str(normalise(value))
            if not written or not re.search(rf"(?<!\w){re.escape(written)}(?!\w)", said):
                return f"`gold.{name}` is not in the text. Given: {_shown(value)}"
        if isinstance(slot, IntegerSlot) and not slot.minimum <= value <= slot.maximum:
            return f"`gold.{name}` is out of range. Given: {_shown(value)}. Allowed: {slot.minimum} to {slot.maximum}"
    return None


def parse_json(line: str | bytes) -> tuple[Any, str | None]:
    """What a line of JSONL holds, or None and why it holds nothing that can be used."""
    if isinstance(line, bytes):
        try:
            line = line.decode()
        except UnicodeDecodeError:
            return None, "is not UTF-8"
    if len(line) > LONGEST_LINE:
        return None, f"is longer than {LONGEST_LINE} characters"
    try:
        value = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        return None, f"is not JSON ({error})"
    except RecursionError:
        return None, "is nested too deeply"
    return (None, "is nested too deeply") if is_deeper(value, DEEPEST) else (value, None)


def _finite(written: str) -> float:
    """A number that JSON can write again: Python also reads `NaN`, `Infinity` and `1e999`, and writes what no other program reads."""
    if not math.isfinite(value := float(written)):
        raise ValueError(f"{written[:SHOWN]} is no number")
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings that were read from JSON are nested in more than so many levels."""
    level = [value]
    for _ in range(levels + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return False
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
    return True


def has_half_character(value: Any) -> bool:
    """Whether a value that was read from JSON has half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _defaults(gold: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """The slots that are in every answer of the intent, with what they are when the customer does not say."""
    uses = spec.intents[gold["intent"]].slots
    values = {name: use.default for name, use in uses.items() if isinstance(use, SlotDefault)}
    return {name: int(value) if spec.slots[name].type == "integer" else value for name, value in values.items()}


def reason_of(problem: str) -> str:
    """A line's problem without what was given and what is allowed, as it can be counted."""
    return re.split(r"\. (?:Given|Allowed): ", problem, maxsplit=1)[0]


def _plain(row: Any) -> Any:
    """A row without the fields, and the slots of its label, that are null; a `source` that is a number as its text.

    A label's 2.0 is 2: pandas writes a column of whole numbers so where some rows have none.
    """
    if not isinstance(row, dict):
        return row
    row = _without_nulls(row)
    if isinstance(row.get("gold"), dict):
        whole = {name: int(value) for name, value in row["gold"].items() if isinstance(value, float) and value.is_integer()}
        row["gold"] = _without_nulls(row["gold"]) | whole
    if isinstance(row.get("source"), int) and not isinstance(row["source"], bool):
        row["source"] = str(row["source"])
    return row


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _problem_of(row: Any, spec: Spec) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "has no `text`"
    if has_half_character(row):
        return "has half a character"
    gold = row.get("gold")
    if not isinstance(gold, dict):
        return f"`gold` is not an answer. Given: {_shown(gold)}" if "gold" in row else "has no `gold`"
    intent = gold.get("intent")
    if not isinstance(intent, str) or intent not in spec.intents:
        given = f". Given: {_shown(intent)}" if "intent" in gold else ""
        return f"`gold.intent` is no intent of the domain{given}. Allowed: {_names(spec.intents)}"
    slots = spec.intents[gold["intent"]].slots
    unknown = set(gold) - {"intent"} - set(slots)
    if unknown:
        return f"`gold` has {_shown(sorted(unknown)[0])}, which {gold['intent']} does not have. Allowed: {_names(slots) or 'no slots'}"
    for name in set(gold) - {"intent"}:
        wanted = int if spec.slots[name].type == "integer" else str
        if not isinstance(gold[name], wanted) or isinstance(gold[name], bool):
            return f"`gold.{name}` is {_shown(gold[name])}. Allowed: {'an integer' if wanted is int else 'a text'}"
    for name in ("language", "source"):
        if not isinstance(row.get(name, ""), str):
            return f"`{name}` is {_shown(row[name])}. Allowed: a text"
    fields = row.get("score", ["intent"])
    if not isinstance(fields, list) or not 0 < len(fields) <= 1 + len(spec.slots) or set(map(str, fields)) - {"intent", *spec.slots}:
        return f"`score` is {_shown(fields)}. Allowed: a list of some of intent, {_names(spec.slots)}"
    return None


def _shown(value: Any) -> str:
    return repr(value)[:SHOWN]


def _names(names: Collection[str]) -> str:
    left = len(names) - SHOWN_NAMES
    return ", ".join([*names][:SHOWN_NAMES]) + (f" and {left} more" if left > 0 else "")
