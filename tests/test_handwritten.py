"""`handwritten.jsonl`: utterances written one by one, not generated, and without sight of the phrase banks. Never trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tasks.domain.labelled import read_labelled
from tasks.domain.scoring import text_contains_slots
from tasks.domain.spec import load_spec
from tasks.leakage import comparable
from tasks.synthesize import SynthesizeConfig, make_generator

pytestmark = pytest.mark.fast
FILE = Path(__file__).parent / "handwritten.jsonl"
SPEC = load_spec("ecommerce")


def test_rows_are_valid_balanced_and_labelled_from_the_text() -> None:
    rows, bad = read_labelled(FILE, SPEC)
    assert not bad
    assert Counter(row["language"] for row in rows) == dict.fromkeys(SPEC.languages, 72)
    assert Counter(row["gold"]["intent"] for row in rows) == dict.fromkeys(SPEC.intents, 36)
    assert all(text_contains_slots(row["text"], row["gold"], SPEC) for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_no_phrase_bank_has_learnt_them_by_heart() -> None:
    texts = {comparable(row["text"]) for row in read_labelled(FILE, SPEC)[0] if len(row["text"].split()) > 3}
    generator = make_generator(SynthesizeConfig(decoration_rate=0, noise_rate=0))
    made = {comparable(generator.row("train", index)["text"]) for index in range(5000)}
    assert not texts & made
