"""The prompt: one home for data, training, calibration, evaluation, benchmark and serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.domain.scoring import compact_json
from tasks.domain.spec import SlotDefault, SlotUse, Spec

Message = dict[str, str]


def messages(spec: Spec, text: str, *, zero_shot: bool = False, examples: Sequence[Mapping[str, Any]] = ()) -> list[Message]:
    """The conversation that asks for one answer.

    Args:
        zero_shot: give the long instructions, for a model that was not fine-tuned.
        examples: labelled rows shown as earlier turns.
    """
    shown = [message for row in examples for message in (_said(row["text"]), {"role": "assistant", "content": compact_json(row["gold"])})]
    if spec.prompt == "short" and not zero_shot:
        return [*shown, _said(text)]
    system = zero_shot_prompt(spec) if zero_shot else spec.system_prompt
    return [{"role": "system", "content": system}, *shown, _said(text)]


def _said(text: str) -> Message:
    """A customer's message. The space lets a product at its very beginning have the tokens it has anywhere else, see `answer_text`."""
    return {"role": "user", "content": f" {text}"}


def pick_examples(rows: Sequence[Mapping[str, Any]], spec: Spec, count: int) -> list[Mapping[str, Any]]:
    """`count` of the rows to show as examples: intents take turns, and so do languages. The same for every question, so that
    a runtime reads them once."""
    picked: list[Mapping[str, Any]] = []
    left = list(rows)
    intents = list(spec.intents)
    for turn in range(count):
        language = spec.languages[turn % len(spec.languages)]
        wanted = [row for row in left if row["gold"]["intent"] == intents[turn % len(intents)]] or left
        if not wanted:
            break
        row = next((row for row in wanted if row.get("language") == language), wanted[0])
        picked.append(row)
        left.remove(row)
    return picked


def zero_shot_prompt(spec: Spec, *, defaults: bool = True) -> str:
    """Instructions for a model that has not learnt the task, with every intent and its slots.

    Args:
        defaults: say what a slot is when the customer does not say it; without, an answer that leaves it out would be scored as wrong.
    """

    def slot(name: str, use: SlotUse) -> str:
        if isinstance(use, SlotDefault):
            return f"{name} ({use.default} when not stated)" if defaults else name
        return f"{name} (only when stated)" if use == "optional" else name

    lines = []
    for name, intent in spec.intents.items():
        lines.append(f"- {name}: {', '.join(slot(*of) for of in intent.slots.items()) or 'no slots'}")
    return spec.zero_shot_prompt.format(intents="Intents and their slots:\n" + "\n".join(lines))
