"""Duplicates and near-duplicates: none is missed, planted leaks fail the run, and memory does not grow with the rows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rapidfuzz import fuzz

from tasks.leakage import NEAR_DUPLICATE, Admission, LeakError, NearDuplicates, SeenTexts, check_leakage, folded
from tasks.synthesize import SynthesizeConfig, distinct_rows, make_generator, read_rows, synthesize
from tests.own import synthesize_with

pytestmark = pytest.mark.fast
SMALL = SynthesizeConfig(train_rows=400, validation_rows=72, test_rows=144, hard_rows=72)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    synthesize.function(SMALL, {}, folder)
    return folder


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Zurück zum Größten", "zurueck zum groessten"),
        ("Zurück", "ZURUCK"),
        ("Među košaricama", "medju kosaricama"),
        ("¿Dónde está?", "donde esta"),
        ("un cœur", "UN COEUR"),
        ("my cart!!! 🙂🙂🙂🙂", "my cart"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_case_marks_and_emojis_do_not_make_another_text(a: str, b: str) -> None:
    assert folded(a) == folded(b)


def test_a_text_without_letters_stays_what_it_is() -> None:
    assert folded("🙂🙂") == "🙂🙂" != folded("😡")


@pytest.mark.slow
def test_no_near_duplicate_is_missed_and_none_is_made_up() -> None:
    """Against every pair compared one by one: texts of all lengths, a few edits apart, in a small alphabet and a large one."""
    rng = Random(5)
    texts: list[str] = []
    for alphabet in ("ab ", "abcdefghijklmnop ", "žßđ日本🙂a "):
        for _ in range(120):
            text = [rng.choice(alphabet) for _ in range(rng.choice([1, 2, 3, 5, 8, 10, 11, 12, 20, 30, 60]))]
            texts.append("".join(text))
            for _ in range(rng.randrange(6)):
                at = rng.randrange(len(text) + 1)
                text[at : at + rng.randrange(2)] = rng.choice(alphabet) * rng.randrange(2)
            texts.append("".join(text) or "a")
    rng.shuffle(texts)
    collection, asked = texts[:400], texts[400:]
    near = NearDuplicates(collection[:250])
    near.add(collection[250:])
    ratio = {(i, j): fuzz.ratio(folded(a), folded(b)) for i, a in enumerate(asked) for j, b in enumerate(collection)}
    expected = {pair for pair, value in ratio.items() if value >= 100 * NEAR_DUPLICATE}
    assert len(expected) > 100
    assert set(near.pairs(asked)) == expected
    assert list(NearDuplicates().pairs(asked)) == []


def without_marks(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))


CHANGES: dict[str, Callable[[str], str]] = {
    "exact": lambda text: text,
    "case": str.upper,
    "diacritics": without_marks,
    "spelt_out": lambda text: text.replace("ü", "ue").replace("ö", "oe").replace("ä", "ae").replace("ß", "ss"),
    "punctuation": lambda text: f"¡¡{re.sub('[,.?!]', ' ', text)}!! 👍👍👍👍👍👍👍👍",
    "typo": lambda text: text[:12] + "x" + text[12:20] + text[21:],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("source", "target"), [("test", "train"), ("hard", "validation"), ("validation", "train"), ("test", "hard")])
def test_a_planted_leak_fails_and_names_the_rows(dataset: Path, tmp_path: Path, change: str, source: str, target: str) -> None:
    """The planted row says it is in another language and has no product: only its text gives it away."""
    folder = tmp_path / "leak"
    shutil.copytree(dataset, folder)
    long = [row for row in read_rows(folder / f"{source}.jsonl") if row["language"] == "de" and len(row["text"]) > 40]
    victim = next(row for row in long if change not in ("diacritics", "spelt_out") or CHANGES[change](row["text"]) != row["text"])
    planted = {**victim, "id": "planted", "text": CHANGES[change](victim["text"]), "language": "it", "product": None, "origin": "x"}
    with (folder / f"{target}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(planted) + "\n")
    with pytest.raises(LeakError, match=f"{victim['id']} ~ planted"):
        check_leakage(folder)


@pytest.mark.parametrize(
    ("field", "source", "target"), [("product", "validation", "train"), ("product", "test", "hard"), ("origin", "hard", "train")]
)
def test_a_shared_product_or_pattern_fails_too(dataset: Path, tmp_path: Path, field: str, source: str, target: str) -> None:
    folder = tmp_path / "leak"
    shutil.copytree(dataset, folder)
    victim = next(row for row in read_rows(folder / f"{source}.jsonl") if row["product"])
    row = {"id": "planted", "text": "qwertz uiop", "product": None, "origin": "x", field: victim[field]}
    with (folder / f"{target}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(LeakError, match=rf"planted \((product|pattern) {re.escape(victim[field])}"):
        check_leakage(folder)


def test_a_sound_data_set_passes_and_has_no_text_twice(dataset: Path) -> None:
    check_leakage(dataset)
    texts = [row["text"].casefold() for split in ("test", "hard", "validation", "train") for row in read_rows(dataset / f"{split}.jsonl")]
    assert len(texts) == len(set(texts))


def test_rows_of_ones_own_are_refused_in_any_spelling(dataset: Path, tmp_path: Path) -> None:
    victim = next(row for row in read_rows(dataset / "validation.jsonl") if row["language"] == "hr" and len(row["text"]) > 30)
    mine = tmp_path / "mine.jsonl"
    gold = {name: without_marks(value) if isinstance(value, str) else value for name, value in victim["gold"].items()}
    mine.write_text(json.dumps({"text": without_marks(victim["text"]).upper() + "!!", "gold": gold, "language": "en"}), encoding="utf-8")
    card = synthesize_with(SMALL, mine, tmp_path / "out")
    assert card["rejected"]["extra: near_duplicate_of_evaluation"] == 1
    assert "extra" not in card["origins"]["train"]


def test_admission_counts_what_it_refuses() -> None:
    admission = Admission()
    admission.hold_out([{"text": "where is my parcel from Zagreb"}])
    rows = [{"text": text} for text in ("Where is my parcel from Zagreb?!", "my cart", "My cart.", "my basket")]
    assert admission.admit(rows, "extra: ") == [False, True, False, True]
    assert admission.counts() == {
        "duplicates_removed": 1,
        "near_duplicates_removed": 1,
        "rejected": {"extra: duplicate": 1, "extra: near_duplicate_of_evaluation": 1},
    }


def test_seen_texts() -> None:
    seen = SeenTexts()
    assert [seen.add(text) for text in ("a", "b", "A!", "🙂", "🙂", "🙂🙂")] == [True, True, False, True, False, True]


@pytest.mark.slow
def test_seen_texts_stay_on_disk() -> None:
    """A set in memory would grow by some 40 MB."""
    code = """
import resource
from tasks.leakage import SeenTexts
seen = SeenTexts()
for i in range(20_000): seen.add(f"text {i}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
new = sum(seen.add(f"text {i}") for i in range(20_000, 520_000))
print(new, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    new, grown_kb = map(int, done.stdout.split())
    assert new == 500_000 and grown_kb < 12_000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows() -> None:
    generator, admission = make_generator(SMALL), Admission()
    admission.hold_out(generator.row("test", index) for index in range(72))

    def peak(rows: int) -> int:
        tracemalloc.reset_peak()
        made: list[Any] = [None for _ in distinct_rows(generator, "train", rows, admission)]
        return tracemalloc.get_traced_memory()[1] - sys.getsizeof(made)

    tracemalloc.start()
    try:
        peak(1000)  # fills caches
        few, many = peak(1000), peak(3000)
    finally:
        tracemalloc.stop()
    assert many - few < 500_000  # 2,000 rows would take some 2 MB
