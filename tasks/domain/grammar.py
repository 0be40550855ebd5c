"""The grammar of a model's answers, made from the specification: what constrained decoding keeps to."""

from __future__ import annotations

import json

from tasks.domain.spec import IntegerSlot, Slot, Spec

# GBNF, llama.cpp's notation of grammars. A value that is copied from the text is anything up to the end of its line, or of its JSON string.
LINE_VALUE = r"[^\n]+"
JSON_VALUE = r'"\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))+ "\""'


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
    if not isinstance(slot, IntegerSlot):
        return text
    return f"[1-9] [0-9]{{0,{len(str(slot.maximum)) - 1}}}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # escapes as GBNF does
