"""Training rows as batches, and the loss of their completions: what a step of fine-tuning computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.domain import prompt
from tasks.domain.scoring import answer_text
from tasks.domain.spec import Spec
from tasks.tokenization import encode_example

LENGTH_STEP = 4  # lengths of batches are multiples of it
LABELS_STEP = 64  # the output head is given a multiple of so many states; hundreds of different counts took gigabytes
IGNORED = -100  # label of a position without loss


def encode_rows(rows: list[dict[str, Any]], tokenizer: Any, spec: Spec, max_length: int) -> list[dict[str, Any]]:
    """Rows as `{"input_ids", "labels", "length"}`, with loss on the completion only; rows over `max_length` are left out."""
    examples = []
    for row in rows:
        question, answer = encode_example(tokenizer, prompt.messages(spec, row["text"]), answer_text(row["gold"], spec))
        if len(question) + len(answer) <= max_length:
            examples.append(
                {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer, "length": len(question) + len(answer)}
            )
    return examples


def pad(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Right-padded tensors of shape (batch, longest), with the longest rounded up: a CPU makes, and keeps, a kernel for every shape it meets."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    longest += -longest % LENGTH_STEP

    def stack(field: str, filler: int) -> Any:
        return torch.tensor([example[field] + [filler] * (longest - len(example[field])) for example in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    return {"input_ids": stack("input_ids", pad_id), "attention_mask": mask, "labels": stack("labels", IGNORED)}


def parts(inputs: dict[str, Any], most_tokens: int) -> Iterator[dict[str, Any]]:
    """A batch in parts of `most_tokens` tokens at most and of about as many rows each; a part has one row at least.

    Products of a few hundred tokens compute as fast as longer ones, and what is kept for the backward pass grows with their number.
    """
    rows, longest = inputs["labels"].shape
    if not rows:
        return
    count = -(-rows // max(1, most_tokens // longest))
    size = -(-rows // count)
    for start in range(0, rows, size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


def bucketed_order(lengths: list[int], batch_size: int, seed: int) -> list[int]:
    """An order of rows whose batches hold rows of like length, while the batches themselves come in random order.

    Sorting alone would show the model all short rows, then all long ones. Rows of one length are shuffled, so that batches differ
    from epoch to epoch. The batch that is not full comes last: who cuts the order into batches again must find the same ones.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    ordered = np.argsort(np.asarray(lengths) + draw.random(len(lengths)))
    left_over = len(ordered) % batch_size
    start = int(draw.integers(len(ordered) - left_over + 1))  # which rows are left over is random
    rest = ordered[start : start + left_over]
    full = np.delete(ordered, np.arange(start, start + left_over)).reshape(-1, batch_size)
    return [*draw.permutation(full).ravel().tolist(), *rest.tolist()]


def completion_states(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """What the completion's logits are made of: the model; its last hidden states where there is a label, (labels, width); the labels;
    and where they stand, a mask of (batch, longest - 1). The output head is a fifth of a small model's arithmetic.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.get_decoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).last_hidden_state
    targets = inputs["labels"][:, 1:]
    wanted = targets != IGNORED
    return causal, hidden[:, :-1][wanted], targets[wanted], wanted


def _rounded_up(states: Any, labels: Any) -> tuple[Any, Any]:
    """States and labels with as many ignored ones behind them as make their number a multiple of `LABELS_STEP`."""
    from torch.nn.functional import pad

    more = -len(labels) % LABELS_STEP
    return pad(states, (0, 0, 0, more)), pad(labels, (0, more), value=IGNORED)


def _logits(causal: Any, states: Any) -> Any:
    import torch

    logits = causal.get_output_embeddings()(states).float()
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def completion_loss(model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
    """Mean cross entropy of the completion tokens; `items` is the number of labels in the whole (accumulated) batch, if that is larger."""
    import torch

    causal, states, labels, _ = completion_states(model, inputs)
    count = items if items is not None else len(labels)
    states, labels = _rounded_up(states, labels)
    return torch.nn.functional.cross_entropy(_logits(causal, states), labels, reduction="sum", ignore_index=IGNORED) / count


def completion_matches(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Loss, and for each row whether every completion token is the likeliest one: then greedy decoding writes the label."""
    import torch

    causal, states, labels, wanted = completion_states(model, inputs)
    logits = _logits(causal, _rounded_up(states, labels)[0])[: len(labels)]
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == labels
    return torch.nn.functional.cross_entropy(logits, labels), right.all(-1)
