"""Conversations to token ids: the same for training, calibration and every transformers runtime."""

from __future__ import annotations

from typing import Any

from tasks.domain.prompt import Message
from tasks.domain.spec import Spec

# The chat template of a model that was trained on short prompts. It says nothing of roles: there is one question and one answer.
# Its special tokens are written out: a GGUF may name a first token that the tokenizer does not have.
SHORT_TEMPLATE = "BOS{% for message in messages %}{{ message['content'] }}EOS{% endfor %}"

# Llama 3.2's template tells the model today's date, unless it cannot, and then this one. A model is asked with what it was trained with, on any day.
NO_DATE = "26 Jul 2024"


def set_template(tokenizer: Any, spec: Spec) -> None:
    """Give the tokenizer of a model that is to be fine-tuned the template it will be asked with; all later stages read it there."""
    if spec.prompt == "chat" and "strftime_now" in (tokenizer.chat_template or ""):
        tokenizer.chat_template = f"{{% macro strftime_now(format) %}}{NO_DATE}{{% endmacro %}}{tokenizer.chat_template}"
    if spec.prompt == "short":
        tokenizer.chat_template = SHORT_TEMPLATE.replace("BOS", tokenizer.bos_token or "").replace("EOS", tokenizer.eos_token)


def prompt_text(tokenizer: Any, conversation: list[Message]) -> str:
    """The conversation as the model sees it, up to where its answer starts. The template comes from the tokenizer."""
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def encode_example(tokenizer: Any, conversation: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, which ends with the token that ends a turn.

    Both are tokenized apart, so that training sees the boundary that generation will see.
    """
    prompt = prompt_text(tokenizer, conversation)
    whole = tokenizer.apply_chat_template([*conversation, {"role": "assistant", "content": answer}], tokenize=False)
    rest = whole[len(prompt) :] if whole.startswith(prompt) else answer
    end = rest.find(tokenizer.eos_token)
    completion = rest[:end] if end >= 0 else rest.rstrip()
    return encode(tokenizer, prompt), [*encode(tokenizer, completion), tokenizer.eos_token_id]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that already has its special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
