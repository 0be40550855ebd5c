"""The answer's schema, its parsing and its scoring: the one home for what `correct` means."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.domain.spec import CatalogSlot, IntegerSlot, Spec

Z95 = 1.959963984540054  # quantile 0.975 of the normal distribution, for 95% intervals
UNPARSEABLE = "unparseable"  # column of the confusion matrix for what is no answer
Gold = Mapping[str, Any]  # {"intent": ..., slot: value, ...}


def answer_text(gold: Gold, spec: Spec) -> str:
    """How a model is taught to write an answer, with a space before everything that is copied from the text.

    `short` answers have a line for the intent and one for each slot, by their codes: `add`, `p red shoes`, `q2`. They say what the
    JSON says in half its tokens. Tokenizers cut a word after a space otherwise than after a quote ("tamna": ` tam|na` and `t|am|na`):
    with the space the model copies the very tokens of the text, which is learnt a third faster. `parse_answer` reads both styles.
    """
    written = {name: f" {' '.join(value.split())}" if isinstance(value, str) else value for name, value in gold.items()}
    if spec.answer == "json":
        return compact_json({**written, "intent": gold["intent"]})
    slots = [f"{spec.slot_codes[name]}{value}" for name, value in written.items() if name != "intent"]
    return "\n".join([spec.intent_codes[gold["intent"]], *slots])


def intent_text(gold: Gold, spec: Spec) -> str:
    """What `answer_text` begins with, up to the end of the intent."""
    return answer_text({"intent": gold["intent"]}, spec).removesuffix('"}')


def compact_json(answer: Gold) -> str:
    """The one way an answer is given to others: compact JSON, `intent` first."""
    ordered = {"intent": answer["intent"], **{name: value for name, value in answer.items() if name != "intent"}}
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Parsed:
    """A model's answer. `answer` is None when it could not be parsed, and `problem` says why."""

    answer: dict[str, Any] | None
    problem: str | None = None


def parse_answer(text: str, spec: Spec) -> Parsed:
    """Parse a model's output, a short answer or JSON; never raises.

    Of JSON the first object counts; text around it is ignored. Problems: `no_json`, `no_intent`, `unknown_intent`,
    `unknown_slot`, `bad_value`.
    """
    first, *lines = text.strip().split("\n")
    intent = next((name for name, code in spec.intent_codes.items() if code == first.strip()), None)
    if intent:
        return _checked({"intent": intent, **_short_slots(lines, spec)}, spec)
    start = text.find("{")
    if start < 0:
        return Parsed(None, "no_json")
    try:
        answer, _ = json.JSONDecoder().raw_decode(text[start:])
    except (ValueError, RecursionError):
        return Parsed(None, "no_json")
    return _checked(answer, spec)


def _short_slots(lines: Sequence[str], spec: Spec) -> dict[str, Any]:
    """The slots of a short answer's lines; a line that begins with no slot's code is a slot of its own name, and so unknown."""
    slots: dict[str, Any] = {}
    codes = sorted(spec.slot_codes.items(), key=lambda item: -len(item[1]))  # `order_` before `order`, where names begin alike
    for line in lines:
        name, value = next(((name, line[len(code) :]) for name, code in codes if line.startswith(code)), (line, ""))
        number = name in spec.slots and isinstance(spec.slots[name], IntegerSlot) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value)
        slots[name] = int(value) if number else value
    return slots


_HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: JSON can write it, UTF-8 cannot


def _checked(answer: Any, spec: Spec) -> Parsed:
    if not isinstance(answer, dict) or not isinstance(answer.get("intent"), str):
        return Parsed(None, "no_intent")
    if answer["intent"] not in spec.intents:
        return Parsed(None, "unknown_intent")
    for name, value in answer.items():
        if name == "intent":
            continue
        if name not in spec.intents[answer["intent"]].slots:
            return Parsed(None, "unknown_slot")
        slot = spec.slots[name]
        wanted = int if isinstance(slot, IntegerSlot) else str
        if not isinstance(value, wanted) or isinstance(value, bool) or (isinstance(value, str) and _HALF.search(value)):
            return Parsed(None, "bad_value")
    return Parsed({name: value.strip() if isinstance(value, str) else value for name, value in answer.items()})


def normalise(value: Any) -> Any:
    """How strings are compared: NFC, case folding, white space collapsed, outer punctuation stripped."""
    if not isinstance(value, str):
        return value
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", value).casefold())
    text = " ".join(folded.split())
    start, end = 0, len(text)  # by hand: a regular expression takes time that grows with the square of a row of punctuation
    while start < end and not text[start].isalnum():
        start += 1
    while end > start and not text[end - 1].isalnum():
        end -= 1
    return text[start:end]


def slots_of(answer: Gold | None) -> dict[str, Any]:
    return {key: normalise(value) for key, value in (answer or {}).items() if key != "intent"}


def exact_match(gold: Gold, answer: Gold | None, fields: Iterable[str] | None = None) -> bool:
    """Same intent and same slots after normalisation. An answer that could not be parsed is wrong.

    Args:
        fields: compare only these (`intent` or slots); all if None.
    """
    return answer is not None and not wrong_fields(gold, answer, fields)


def wrong_fields(gold: Gold, answer: Gold, fields: Iterable[str] | None = None) -> list[str]:
    """The fields in which an answer differs from its label: `intent`, and slots that are missing, wrong or too many."""
    labelled, answered = {"intent": gold["intent"], **slots_of(gold)}, {"intent": answer["intent"], **slots_of(answer)}
    names = labelled | answered if fields is None else fields
    return [name for name in names if labelled.get(name) != answered.get(name)]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953); (0, 1) without data."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, Z95 * Z95
    centre, half = p + zz / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = (centre - half) / (1 + zz / n), (centre + half) / (1 + zz / n)
    return max(0.0, min(p, low)), min(1.0, max(p, high))  # rounding may put a bound beyond a proportion of 0 or 1


def proportion(successes: int, n: int) -> dict[str, float | int]:
    """`{"value", "low", "high", "n"}`: a proportion with its 95% interval."""
    low, high = wilson_interval(successes, n)
    return {"value": successes / n if n else 0.0, "low": low, "high": high, "n": n}


def score(rows: Sequence[Mapping[str, Any]], outputs: Sequence[str], spec: Spec) -> dict[str, Any]:
    """Score outputs against labelled rows.

    Args:
        rows: each with `gold` and optionally `language`, `source` and `score`, the fields that count; as many as `outputs`.
        outputs: the raw text a model answered, in the order of the rows.

    Returns:
        `exact_match` (proportion), `intent_accuracy`, `json_valid`, `slot_f1` by slot, `by_language`, `by_intent`, `by_source`,
        `by_slot` (proportions; a slot's rows are those whose label or answer has it), `confusion` (counts of answered intents by
        labelled intent), `problems` (counts of unparseable answers by reason) and `correct` (one bool a row). What a row's `score` leaves out
        counts nowhere: its intent not in `intent_accuracy` and `confusion`, its slot not in `slot_f1` and `by_slot`.
    """
    if len(rows) != len(outputs):
        raise ValueError(f"{len(rows)} rows, {len(outputs)} outputs")
    parsed = [parse_answer(output, spec) for output in outputs]
    pairs = list(zip(rows, parsed, strict=True))
    of_intent = [(row, p) for row, p in pairs if _counts("intent", row)]
    correct = [exact_match(row["gold"], p.answer, row.get("score")) for row, p in pairs]
    intent_right = [p.answer is not None and p.answer["intent"] == row["gold"]["intent"] for row, p in of_intent]
    n = len(rows)
    return {
        "exact_match": proportion(sum(correct), n),
        "intent_accuracy": sum(intent_right) / len(of_intent) if of_intent else 0.0,
        "json_valid": sum(p.answer is not None for p in parsed) / n if n else 0.0,
        "slot_f1": {name: _slot_f1(name, pairs) for name in spec.slots},
        "by_language": _by((row.get("language", "?") for row in rows), correct),
        "by_intent": _by((row["gold"]["intent"] for row in rows), correct),
        "by_source": _by((str(row.get("source", "?")) for row in rows), correct),
        "by_slot": {name: part for name in spec.slots if (part := _slot_accuracy(name, pairs))},
        "confusion": _confusion(of_intent),
        "problems": dict(Counter(p.problem for p in parsed if p.problem)),
        "correct": correct,
    }


def _by(groups: Iterable[str], correct: Sequence[bool]) -> dict[str, dict[str, float | int]]:
    right, total = Counter[str](), Counter[str]()
    for group, is_right in zip(groups, correct, strict=True):
        total[group] += 1
        right[group] += is_right
    return {group: proportion(right[group], total[group]) for group in sorted(total)}


Pairs = Sequence[tuple[Mapping[str, Any], Parsed]]


def _counts(field: str, row: Mapping[str, Any]) -> bool:
    return row.get("score") is None or field in row["score"]


def _slot_values(name: str, pairs: Pairs) -> list[tuple[Any, Any]]:
    """One slot as labelled and as answered, in the rows where it counts and either has it."""
    values = [(slots_of(row["gold"]).get(name), slots_of(p.answer).get(name)) for row, p in pairs if _counts(name, row)]
    return [(gold, answer) for gold, answer in values if gold is not None or answer is not None]


def _slot_accuracy(name: str, pairs: Pairs) -> dict[str, float | int] | None:
    """How often one slot is right where label or answer has it; None when neither ever has."""
    concerned = [gold == answer for gold, answer in _slot_values(name, pairs)]
    return proportion(sum(concerned), len(concerned)) if concerned else None


def _confusion(pairs: Pairs) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for row, p in pairs:
        counts.setdefault(row["gold"]["intent"], Counter())[p.answer["intent"] if p.answer else UNPARSEABLE] += 1
    return {intent: dict(counts[intent].most_common()) for intent in sorted(counts)}


def _slot_f1(name: str, pairs: Pairs) -> float | None:
    """Micro F1 of one slot; None when neither labels nor answers have it."""
    values = _slot_values(name, pairs)
    said = sum((gold is not None) + (answer is not None) for gold, answer in values)
    return 2 * sum(gold == answer for gold, answer in values) / said if said else None


def text_contains_slots(text: str, gold: Gold, spec: Spec) -> bool:
    """Whether every catalog slot of a label stands in the text as written (after normalisation)."""
    haystack = normalise(text)
    return all(
        normalise(value) in haystack for name, value in gold.items() if name in spec.slots and isinstance(spec.slots[name], CatalogSlot)
    )
