"""The grammar of a model's answers, made from the specification: what constrained decoding keeps to."""

from __future__ import annotations

import json

from tasks.domain.spec import IntegerSlot, Slot, Spec

# GBNF, llama.cpp's notation of grammars. A value that is copied from the text is anything up to the end of its line, or of its JSON string,
# in which half a character (\uD800 to \uDFFF) may not stand.
LINE_VALUE = r"[^\n]+"
JSON_VALUE = r'"\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})))+ "\""'


def answer_grammar(spec: Spec) -> str:
    """Every answer a model may give, as a GBNF grammar: one intent, then the slots it has, in their order (see `scoring.answer_text`)."""
    return "root ::= " + " | ".join(_intent(name, spec) for name in spec.intents)


def _intent(name: str, spec: Spec) -> str:
    short = spec.answer == "short"
    written = [_literal(spec.intent_codes[name] if short else f'{{"intent":"{name}"')]
    for slot, use in spec.intents[name].slots.items():
        lead = _literal(f"\n{spec.slot_codes[slot]}" if short else f',"{slot}":')
        part = f"{lead} {_value(spec.slots[slot], LINE_VALUE if short else JSON_VALUE)}"
        written.append(f"({part})?" if use == "optional" else part)
    return " ".join(written if short else [*written, _literal("}")])


def _value(slot: Slot, text: str) -> str:
    return f"({_integers(slot.minimum, slot.maximum)})" if isinstance(slot, IntegerSlot) else text


def _integers(low: int, high: int) -> str:
    """Every integer from `low` to `high`, without leading zeros."""
    lengths = range(len(str(low)), len(str(high)) + 1)
    bounds = [(max(low, 10 ** (n - 1) if n > 1 else 0), min(high, 10**n - 1)) for n in lengths]
    return " | ".join(_same_length(str(first), str(last)) for first, last in bounds)


def _same_length(low: str, high: str) -> str:
    if not low:
        return ""
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}'.strip()
    rest = len(low) - 1
    zeros, nines = "0" * rest, "9" * rest
    # The first digit whose other digits may be any, and the last; what is left below and above has bounds of its own.
    first, last = int(low[0]) + (low[1:] > zeros), int(high[0]) - (high[1:] < nines)
    parts = [f'"{low[0]}" {_same_length(low[1:], nines)}'] if low[1:] > zeros else []
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    if high[1:] < nines:
        parts.append(f'"{high[0]}" {_same_length(zeros, high[1:])}')
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # escapes as GBNF does
