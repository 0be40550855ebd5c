"""Training rows as batches, and the loss of their completions: what a step of fine-tuning computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks import unpadded
from tasks.domain import prompt
from tasks.domain.scoring import answer_text, intent_text
from tasks.domain.spec import Spec
from tasks.tokenization import encode_example

# A CPU makes, and keeps, a kernel for every shape it meets: hundreds of different ones took gigabytes.
LENGTH_STEP = 4  # lengths of batches are multiples of it
TOKENS_STEP = 16  # the layers are given a multiple of so many tokens
LABELS_STEP = 64  # the output head computes a multiple of so many logits
IGNORED = -100  # label of a position without loss


def encode_rows(
    rows: list[dict[str, Any]], tokenizer: Any, spec: Spec, max_length: int, intent_weight: float = 1.0
) -> list[dict[str, Any]]:
    """Rows as `{"input_ids", "labels", "length"}`, with loss on the completion only; rows over `max_length` are left out.

    With an `intent_weight` other than 1 they have "weights", too: how much the loss of each token counts, that many times as much where an
    answer says its intent.
    """
    examples = []
    for row in rows:
        question, answer = encode_example(tokenizer, prompt.messages(spec, row["text"]), answer_text(row["gold"], spec))
        if len(question) + len(answer) <= max_length:
            example = {"input_ids": question + answer, "labels": [IGNORED] * len(question) + answer, "length": len(question) + len(answer)}
            if intent_weight != 1:
                said = where(tokenizer, answer, intent_text(row["gold"], spec))
                weights = [intent_weight if token in said else 1.0 for token in range(len(answer))]
                example["weights"] = [0.0] * len(question) + weights
            examples.append(example)
    return examples


def where(tokenizer: Any, ids: list[int], text: str) -> range:
    """The fewest tokens among `ids` that hold the first occurrence of a text; none, if it does not occur.

    A template may put something before an answer, such as an empty thought.
    """
    end = next((end for end in range(1, len(ids) + 1) if text in tokenizer.decode(ids[:end])), 0)
    start = next((start for start in reversed(range(end)) if text in tokenizer.decode(ids[start:end])), end)
    return range(start, end)


def pad(examples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Right-padded tensors of shape (batch, longest), with the longest rounded up; `weights` if the examples have them."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    longest += -longest % LENGTH_STEP

    def stack(field: str, filler: float) -> Any:
        return torch.tensor([example[field] + [filler] * (longest - len(example[field])) for example in examples])

    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples])
    weights = {"weights": stack("weights", 0.0)} if "weights" in examples[0] else {}
    return {"input_ids": stack("input_ids", pad_id), "attention_mask": mask, "labels": stack("labels", IGNORED), **weights}


def lengths(inputs: dict[str, Any]) -> list[int]:
    """Tokens of each row of a batch."""
    counted: list[int] = inputs["attention_mask"].sum(1).tolist()
    return counted


def parts(inputs: dict[str, Any], most_tokens: int) -> Iterator[dict[str, Any]]:
    """A batch in parts of `most_tokens` tokens at most, the longest rows first, as wide as these are; a part has one row at least.

    Products of a few hundred tokens compute as fast as longer ones, and what is kept for the backward pass grows with their number, in attention
    with that of padded rows: twice `most_tokens` at most.
    """
    counted = lengths(inputs)
    order = sorted(range(len(counted)), key=counted.__getitem__, reverse=True)
    while order:
        longest, tokens, rows = counted[order[0]], 0, 0
        while rows < len(order) and (
            not rows or (tokens + counted[order[rows]] <= most_tokens and (rows + 1) * longest <= 2 * most_tokens)
        ):
            tokens += counted[order[rows]]
            rows += 1
        width = longest + -longest % LENGTH_STEP
        yield {name: tensor[order[:rows], :width] for name, tensor in inputs.items()}
        order = order[rows:]


def shuffled_order(rows: int, seed: int) -> list[int]:
    """A random order of so many rows, the same for the same seed."""
    import numpy as np

    order: list[int] = np.random.default_rng(seed).permutation(rows).tolist()
    return order


def completion_logits(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What a model expects where there is a label: logits, float32 of (labels, vocabulary); the labels; and where they stand, a mask of (batch,
    longest - 1). A few more are computed to make a multiple of `LABELS_STEP`, with `IGNORED` for a label, and no others: the output head is a
    fifth of a small model's arithmetic.

    No padding is computed but in attention, which is little on rows this short: see `tasks/unpadded.py`.
    """
    from torch.nn.functional import pad

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    targets = inputs["labels"][:, 1:]
    wanted = targets != IGNORED
    labels = targets[wanted]
    more = -len(labels) % LABELS_STEP
    if unpadded.takes_lines(causal, mask.shape[1]):
        line = unpadded.in_line(mask, TOKENS_STEP)
        kept = pad(line.grid[:, :-1][wanted], (0, more))  # the first token, once more
        arguments = {"input_ids": ids.flatten()[line.places][None], **line.arguments(causal)}
        logits = causal(**arguments, use_cache=False, logits_to_keep=kept).logits[0]
        labels = pad(labels, (0, more), value=IGNORED)
    else:
        kept = pad(wanted, (0, 1))
        kept.view(-1)[(~kept).flatten().nonzero()[:more, 0]] = True  # any others
        logits = causal(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        labels = pad(targets, (0, 1), value=IGNORED)[kept]
    return logits.float(), labels, wanted


def completion_loss(model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
    """Mean cross entropy of the completion tokens, times their `weights` if there are any; `items` is the number of labels in the whole
    (accumulated) batch, if that is larger."""
    import torch

    logits, labels, wanted = completion_logits(model, inputs)
    count = items if items is not None else wanted.sum()
    if "weights" not in inputs:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / count
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return (each[labels != IGNORED] * inputs["weights"][:, 1:][wanted]).sum() / count


def completion_matches(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Loss, and for each row whether every completion token is the likeliest one: then greedy decoding writes the label."""
    import torch

    logits, labels, wanted = completion_logits(model, inputs)
    right = torch.ones_like(wanted)
    right[wanted] = (logits.argmax(-1) == labels)[labels != IGNORED]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED), right.all(-1)
