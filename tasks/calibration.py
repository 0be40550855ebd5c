"""Rows on which quantization is fitted: templated training rows, as the model was trained with them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from tasks.domain import prompt
from tasks.domain.errors import UserError
from tasks.domain.scoring import answer_text
from tasks.domain.spec import load_spec
from tasks.synthesize import read_rows
from tasks.tokenization import encode_example

FEWEST = 8


def calibration_examples(dataset: Path, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Token ids, prompt and completion, of `count` random training rows (all, if there are fewer), the shortest first.

    Rows of like length can share a batch then, with little padding.

    Raises:
        UserError: there are too few rows to fit anything to.
    """
    spec = load_spec(str(dataset))
    rows = read_rows(dataset / "train.jsonl")
    if len(rows) < FEWEST:
        raise UserError(
            "calibration_rows", len(rows), "are too few training rows to calibrate on", mend=f"Make data.train_rows {FEWEST} or more"
        )
    chosen = Random(seed).sample(rows, min(count, len(rows)))
    pairs = [encode_example(tokenizer, prompt.messages(spec, row["text"]), answer_text(row["gold"], spec)) for row in chosen]
    return sorted(([*question, *answer] for question, answer in pairs), key=len)
