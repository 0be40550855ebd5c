"""What stands in a teacher's answer: its items, and what is wrong with the rest."""

from __future__ import annotations

import json
import re
from typing import Any

from tasks.domain.labelled import is_deeper
from tasks.domain.scoring import normalise

DEEPEST = 10  # levels of nesting; deeper is no item, and to write it down might exceed Python's stack

# How models decline, and how they speak of themselves; no customer writes so.
REFUSAL = re.compile(
    r"\b(as an? (ai|artificial|language model)|(i'm|i am) (just )?an? (ai|language model)|ai language model"
    r"|i (can(no|')?t|am (not able|unable) to|'m (not able|unable) to|won't) (assist|help (you )?with (that|this)|comply|fulfil|generate|create|provide|produce|write)"
    r"|(als|bin) (eine?n? )?(ki|sprachmodell|k[üu]nstliche)|en tant qu['e ]+(ia|mod[èe]le|intelligence)|je ne peux pas (générer|créer|répondre à cette)"
    r"|como (una? )?(ia|modelo de lenguaje|inteligencia artificial)|no puedo (generar|ayudarte con (eso|esa))"
    r"|come (una? )?(ia|modello linguistico|intelligenza artificiale)|non posso (generare|aiutarti con questa)"
    r"|kao (umjetna inteligencija|jezični model|ai)|ne mogu (generirati|pomoći s tim)"
    r"|content polic(y|ies)|(my|our) (usage )?guidelines)\b"
)


def is_refusal(text: str) -> bool:
    return bool(REFUSAL.search(normalise(text.replace("’", "'"))))


def items_of(text: str) -> tuple[list[Any], str | None]:
    """The items of an answer such as `{"items": [...]}`, also in a code fence, in prose, as a bare list, or cut off in the middle.

    Returns:
        The whole items, and what is wrong: `empty_answer`, `refusal`, `not_json`, `wrong_schema`, `cut_off`, or None.
    """
    if not text.strip():
        return [], "empty_answer"
    found = re.search(r'\{\s*"|\[\s*[\[{"\]]|\{\s*\}', text)
    if not found:
        return [], "refusal" if is_refusal(text) else "not_json"
    value: Any
    problem: str | None
    try:
        value, _ = json.JSONDecoder().raw_decode(text[found.start() :])
    except (ValueError, RecursionError):
        value = _whole_items(text[found.start() :])
        problem = "cut_off" if value else "not_json"
    else:
        value, problem = value.get("items") if isinstance(value, dict) else value, None
    fits = isinstance(value, list) and not any(is_deeper(item, DEEPEST) for item in value)
    return (value, problem) if fits else ([], "wrong_schema")


def _whole_items(text: str) -> list[Any]:
    """The objects of a list that ends too early: they were paid for."""
    start = text.find("[")
    items: list[Any] = []
    decoder = json.JSONDecoder()
    position = start + 1
    while start >= 0 and (found := re.compile(r"[\s,]*(?=\{)").match(text, position)):
        try:
            item, position = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            break
        items.append(item)
    return items
