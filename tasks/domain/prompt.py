"""The prompt: one home for data, training, calibration, evaluation, benchmark and serving."""

from __future__ import annotations

from tasks.domain.spec import Spec

Message = dict[str, str]


def messages(spec: Spec, text: str, *, zero_shot: bool = False) -> list[Message]:
    """The conversation that asks for one answer. A model that was not fine-tuned gets the long instructions."""
    system = zero_shot_prompt(spec) if zero_shot else spec.system_prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def zero_shot_prompt(spec: Spec) -> str:
    """Instructions for a model that has not learnt the task, with every intent and its slots."""
    lines = []
    for name, intent in spec.intents.items():
        slots = [slot + (" (only when stated)" if use == "optional" else "") for slot, use in intent.slots.items()]
        lines.append(f"- {name}: {', '.join(slots) or 'no slots'}")
    return spec.zero_shot_prompt.format(intents="Intents and their slots:\n" + "\n".join(lines))
