"""What a teacher is asked, in words. `PROMPT_VERSION` is part of every request's name: raise it with any change of wording."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tasks.domain.bank import COUNTED, DIGITS, MENTION, Bank, Product
from tasks.domain.prompt import Message, zero_shot_prompt
from tasks.domain.spec import CatalogSlot, CodeSlot, Spec

PROMPT_VERSION = 1

# Ways of writing that a phrase bank written at a desk has too little of.
REGISTERS = {
    "plain": "plain and direct, each with another verb and another order of words",
    "indirect": "indirect: the wish is never named as a command or a request; the customer describes a situation, a need or a worry, and a clerk would know what to do",
    "rude": "rude and impatient: annoyed, blunt, sarcastic, sometimes with mild swear words, never polite",
    "chatty": "chatty: two or three sentences with a little story about family, work, weather or plans around the wish",
    "terse": "terse: two to five words, typed in a hurry, without greeting and often without a verb",
    "voice": "dictated to a voice assistant: all small letters, no punctuation at all, hesitations and repeated words left in, numbers as words",
    "self_correction": "corrected on the way: the customer says one thing, changes their mind within the message (no wait, sorry, I mean), and what holds in the end is the label",
    "several_sentences": "several sentences of which only one carries the wish; the others are remarks, thanks or questions to oneself",
    "formal": "formal and old-fashioned, like a letter",
    "young": "young and casual: chat abbreviations, slang, an emoji here and there, small letters",
}

_SYSTEM = """\
You help to train a small model that reads what customers write ({title}), by inventing what they really write. These are the instructions of that model:
<<<
{instructions}
>>>
Write as people do, not as an advertisement and not as a textbook: no two items may differ in one word only, and none may repeat an example. Do not explain, count, translate or comment.
Answer with one JSON object and nothing else: {{"items": [...]}}."""

_UTTERANCES = """\
Write {items} messages with the intent {intent}.
Language: {language} (ISO 639-1), as a native speaker writes it.
Manner: {manner}.
Each item has these fields: {fields}. A field is null where the message does not say it. Every value but a number must stand in "text" letter by letter; a number may stand there as a word.
{products}Labels done right (take the labelling from them, not the wording):
{examples}"""

_PATTERNS = """\
Write {items} phrase patterns for the intent {intent}. A pattern stands for many messages: it has placeholders where the labels are.
Language: {language} (ISO 639-1), as a native speaker writes it.
Manner: {manner}.
Syntax: [x] is optional, (a|b) is one of several. These placeholders are allowed, and no others: {placeholders}.
{required}Never write a number, a code or the name of a product yourself: that is what placeholders are for. Any product may stand in place of the placeholder, so the words around it must fit them all.
{agreement}Each item has one field, "pattern". Patterns done right:
{examples}"""

_PRODUCTS = """\
Write {items} products that customers order by name, of the department {department}: plain ones, and ones with brand, colour, size or number in their name.
Language: {language} (ISO 639-1), as a native speaker writes it, without an article, in small letters except where the language or a brand has capitals.
Each item has these fields: {fields}. "class" is one of {classes}: the inflection class, as in the examples. The other fields but "measure" are inflected forms of the whole name, as in the examples; a form that is the same as the first is empty, and so is the plural of what is not counted, which has a measure instead. "measure" is one of {measures}, several separated by "/", or empty.
Products done right:
{examples}"""

_AGAIN = "\nThis was asked {times} before: leave out what comes to mind first."

_OF_A_KIND = 'Let them be about other products each time, such as: {names}. "product" is the shortest phrase that names it, without article, number or measure word.\n'


def system_message(spec: Spec) -> Message:
    """What every request begins with. A teacher is asked for null where a message does not say a value, so it reads of no default."""
    return {"role": "system", "content": _SYSTEM.format(title=spec.title, instructions=zero_shot_prompt(spec, defaults=False))}


def ask_utterances(
    spec: Spec,
    language: str,
    intent: str,
    register: str,
    items: int,
    products: Sequence[str],
    examples: Sequence[dict[str, Any]],
    times: int,
) -> tuple[list[Message], dict[str, Any]]:
    """Messages that ask for whole labelled utterances, and the JSON schema of the answer.

    Args:
        products: names to give an idea of what is sold.
        examples: rows with `text` and `gold`.
        times: how often the same was asked before.
    """
    slots = spec.intents[intent].slots
    shown = [json.dumps({"text": row["text"], **{slot: row["gold"].get(slot) for slot in slots}}, ensure_ascii=False) for row in examples]
    named = any(isinstance(spec.slots[slot], CatalogSlot) for slot in slots)
    content = _UTTERANCES.format(
        items=items,
        intent=intent,
        language=language,
        manner=REGISTERS[register],
        fields=", ".join(["text", *slots]),
        products=_OF_A_KIND.format(names="; ".join(products)) if named else "",
        examples="\n".join(shown),
    )
    fields = {
        "text": {"type": "string"},
        **{slot: {"type": ["integer" if spec.slots[slot].type == "integer" else "string", "null"]} for slot in slots},
    }
    return _messages(spec, content, times), _schema("utterances", fields)


def ask_patterns(
    spec: Spec, bank: Bank, intent: str, register: str, items: int, placeholders: Sequence[str], examples: Sequence[str], times: int
) -> tuple[list[Message], dict[str, Any]]:
    """Messages that ask for phrase patterns, and the JSON schema of the answer."""
    always = [name for name, use in spec.intents[intent].slots.items() if use == "always"]
    named = any(isinstance(spec.slots[slot], CatalogSlot) for slot in spec.intents[intent].slots)
    agreement = [f"{{{word}}} is {_words(forms)}" for word, forms in bank.agree.items()] if named else []
    content = _PATTERNS.format(
        items=items,
        intent=intent,
        language=bank.language,
        manner=REGISTERS[register],
        placeholders="; ".join(_explained(name, bank, spec) for name in placeholders if name not in bank.agree),
        required=f"Outside of every optional part a pattern must have {' and '.join(always)}.\n" if always else "",
        agreement=f"Words that agree with the product, each with its own space, also in braces: {'; '.join(agreement)}.\n"
        if agreement
        else "",
        examples="\n".join(json.dumps({"pattern": example}, ensure_ascii=False) for example in examples),
    )
    return _messages(spec, content, times), _schema("patterns", {"pattern": {"type": "string"}})


def ask_products(
    spec: Spec, bank: Bank, department: str, items: int, examples: Sequence[Product], times: int
) -> tuple[list[Message], dict[str, Any]]:
    """Messages that ask for rows of a catalog, and the JSON schema of the answer."""
    classes = list(next(iter(bank.agree.values()))) if bank.agree else sorted({product.agreement for product in bank.products})
    fields = ["class", *bank.forms, "measure"]
    shown = [
        json.dumps(
            {"class": p.agreement, **{form: p.forms.get(form, "") for form in bank.forms}, "measure": "/".join(p.measures)},
            ensure_ascii=False,
        )
        for p in examples
    ]
    content = _PRODUCTS.format(
        items=items,
        department=department,
        language=bank.language,
        fields=", ".join(fields),
        classes=", ".join(classes),
        measures=", ".join(bank.measures),
        examples="\n".join(shown),
    )
    schema = {name: {"type": "string", "enum": classes} if name == "class" else {"type": "string"} for name in fields}
    return _messages(spec, content, times), _schema("products", schema)


def _messages(spec: Spec, content: str, times: int) -> list[Message]:
    again = _AGAIN.format(times="once" if times == 1 else f"{times} times") if times else ""
    return [system_message(spec), {"role": "user", "content": content + again}]


def _schema(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A `response_format` in the form that every provider's strict mode takes: all fields required, no others."""
    item = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    whole = {
        "type": "object",
        "properties": {"items": {"type": "array", "items": item}},
        "required": ["items"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": name, "schema": whole, "strict": True}}


def _words(forms: dict[str, str]) -> str:
    return "/".join(dict.fromkeys(form.strip() for form in forms.values() if form.strip()))


def _explained(name: str, bank: Bank, spec: Spec) -> str:
    if name == COUNTED:
        return "{counted} (number, measure word if any, and product together, where a noun phrase with a number fits)"
    if name == DIGITS:
        return "{digits} (a number in digits)"
    slot = spec.slots.get(name)
    if name == MENTION or isinstance(slot, CatalogSlot):
        forms = (
            f", in the form that the sentence needs: {', '.join(f'{{{name}.{form}}}' for form in bank.forms)}"
            if len(bank.forms) > 1
            else ""
        )
        return f"{{{name}}} (a product's name{forms})"
    return f"{{{name}}} ({'a code' if isinstance(slot, CodeSlot) else 'a number, as a word or in digits'})"
