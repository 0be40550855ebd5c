"""The data card says what is in the rows, and shows them without letting them become markup."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.data_card import SAMPLES, DataCard, DataCardConfig, as_markdown, data_card, origin_kind, read_card
from tasks.domain.spec import load_spec
from tasks.rendering import render
from tasks.synthesize import SynthesizeConfig, read_rows
from tests.own import synthesize_with
from tests.test_rendering import EVIL, sample_report

pytestmark = [pytest.mark.fast, pytest.mark.slow]
SPLITS = ("test", "hard", "validation", "train")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """A data set with rows of one's own, its metrics, and its drawn card."""
    folder = tmp_path_factory.mktemp("card")
    dataset, card, mine = folder / "dataset", folder / "card", folder / "mine.jsonl"
    dataset.mkdir()
    card.mkdir()
    own = {"text": f"{EVIL} | zebra ![x](y)", "gold": {"intent": "search_product", "product": "zebra"}, "language": EVIL, "source": EVIL}
    mine.write_text(f"{json.dumps(own)}\n{json.dumps(own)}", encoding="utf-8")
    config = SynthesizeConfig(train_rows=600, validation_rows=72, test_rows=72, hard_rows=72)
    metrics = synthesize_with(config, mine, dataset)
    data_card.function(DataCardConfig(), {"dataset": dataset}, card)
    return dataset, metrics, card


def test_every_count_is_that_of_the_rows(made: tuple[Path, dict[str, Any], Path]) -> None:
    dataset, metrics, _ = made
    card = json.loads((dataset / "data_card.json").read_text(encoding="utf-8"))
    assert metrics.items() <= card.items()
    for split in SPLITS:
        rows = read_rows(dataset / f"{split}.jsonl")
        assert card["counts"][split] == len(rows)
        assert card["languages"][split] == Counter(row["language"] for row in rows)
        assert card["intents"][split] == Counter(row["gold"]["intent"] for row in rows)
        assert card["origins"][split] == Counter(row["origin"].split(":")[0] if ":" in row["origin"] else "generator" for row in rows)
        noise = Counter(kind for row in rows for kind in row["noise"] or ["unknown" if ":" in row["origin"] else "none"])
        assert card["noise"][split] == noise
        assert card["products"][split] == len({row["product"] for row in rows} - {None})
        lengths = [len(row["text"]) for row in rows]
        quantiles = np.percentile(lengths, [5, 50, 95, 100], method="inverted_cdf").tolist()
        assert list(card["lengths"][split].values()) == quantiles
        assert card["length_bins"][split] == {str(k): n for k, n in sorted(Counter(length // 10 * 10 for length in lengths).items())}
    assert card["rejected"]["extra: duplicate"] == 1
    assert card["duplicates_removed"] == 1 + card["rejected"].get("duplicate", 0)
    assert card["near_duplicates_removed"] == card["rejected"].get("near_duplicate_of_evaluation", 0) + card["rejected"].get(
        "extra: near_duplicate_of_evaluation", 0
    )


def test_samples_of_every_cell_are_rows(made: tuple[Path, dict[str, Any], Path]) -> None:
    dataset = made[0]
    written = {(split, row["text"]): row for split in SPLITS for row in read_rows(dataset / f"{split}.jsonl")}
    samples = json.loads((dataset / "data_card.json").read_text(encoding="utf-8"))["samples"]
    spec = load_spec("ecommerce")
    wanted = {(intent, language) for intent in spec.intents for language in spec.languages} | {("search_product", EVIL)}
    assert {(cell["intent"], cell["language"]) for cell in samples} == wanted
    for cell in samples:
        assert len(cell["rows"]) == (1 if cell["language"] == EVIL else SAMPLES)
        for sample in cell["rows"]:
            row = written[sample["split"], sample["text"]]
            assert (row["gold"]["intent"], row["language"]) == (cell["intent"], cell["language"])
            assert {name: row[name] for name in ("gold", "origin", "noise")} == {name: sample[name] for name in ("gold", "origin", "noise")}


def test_samples_are_drawn_from_all_rows() -> None:
    """Each row of a cell is as likely as any other: over many seeds, the first half and the last half are drawn equally often."""
    early = 0
    for seed in range(400):
        card = DataCard(seed)
        for number in range(20):
            card.add(
                "train", {"text": str(number), "gold": {"intent": "x"}, "language": "en", "origin": "e.x.0", "product": None, "noise": []}
            )
        kept = card._samples["x", "en"]
        early += sum(int(row["text"]) < 10 for row in kept)
        assert len({row["text"] for row in kept}) == SAMPLES
    assert 0.42 < early / (400 * SAMPLES) < 0.58


def test_the_card_does_not_grow_with_the_rows() -> None:
    card = DataCard(1)

    def add(start: int, stop: int) -> int:
        for number in range(start, stop):
            card.add(
                "train",
                {"text": f"{number:06}", "gold": {"intent": "x"}, "language": "en", "origin": "en.x.0", "product": "p", "noise": []},
            )
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few, many = add(0, 500), add(500, 20_000)
    finally:
        tracemalloc.stop()
    assert many - few < 20_000


def test_where_a_row_comes_from() -> None:
    origins = ("en.view_cart.0a1b", "extra", "extra:my.chat", "teacher:77.a")
    assert [origin_kind(origin) for origin in origins] == ["generator", "extra", "extra", "teacher"]


@pytest.fixture(scope="module")
def page(made: tuple[Path, dict[str, Any], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with the card in it."""
    folder = tmp_path_factory.mktemp("page")
    render({**sample_report(), "dataset": {"sha256": "ab" * 32, **made[1]}}, folder, made[2])
    return folder


def test_rows_cannot_become_markup(page: Path) -> None:
    html, markdown = (page / "report.html").read_text(encoding="utf-8"), (page / "data_card.md").read_text(encoding="utf-8")
    assert "<script>alert" not in html and html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | zebra" in html
    assert "<script>" not in markdown
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| zebra !\[x\](y)" in markdown
    assert html.count("<details>") == 1 + len(load_spec("ecommerce").intents)


def test_the_card_lies_beside_the_report(made: tuple[Path, dict[str, Any], Path], page: Path) -> None:
    for name in read_card(made[2])["files"]:
        assert (page / name).read_bytes() == (made[2] / name).read_bytes()
    for name in ("data_contents", "data_texts"):
        assert f"({name}.png)" in (page / "report.md").read_text(encoding="utf-8")
        assert (page / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    counts = [made[1]["intents"][split]["add_to_cart"] for split in SPLITS]
    assert "| add_to_cart | " + " | ".join(map(str, counts)) + " |" in (page / "report.md").read_text(encoding="utf-8").splitlines()


def test_markdown_for_prefect_refers_to_no_file(made: tuple[Path, dict[str, Any], Path]) -> None:
    text = as_markdown(json.loads((made[2] / "data_card.json").read_text(encoding="utf-8")))
    assert "](data" not in text and "### view_cart" in text and "| en | 12 |" in text


def test_the_same_data_gives_the_same_card(made: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    data_card.function(DataCardConfig(), {"dataset": made[0]}, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (made[2] / path.name).read_bytes(), path.name


def test_rows_about_products_that_own_rows_name_are_counted_and_the_report_says_so(
    made: tuple[Path, dict[str, Any], Path], tmp_path: Path
) -> None:
    plain = json.loads((made[2] / "data_card.json").read_text(encoding="utf-8"))
    assert plain["named_by_own_rows"] == {"test": 0, "hard": 0}
    about = [row for row in read_rows(made[0] / "test.jsonl") if row["gold"].get("product")]
    labelled, said = about[0], next(row for row in about if row["product"] != about[0]["product"])
    own = [
        {"text": f"gimme some of that {labelled['product']} would ya", "gold": {"intent": "add_to_cart", "product": labelled["product"]}},
        {"text": f"is the {said['product'].upper()} I spoke of in my cart by now?", "gold": {"intent": "view_cart"}},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    config = SynthesizeConfig(train_rows=24, validation_rows=12, test_rows=72, hard_rows=72)
    metrics = synthesize_with(config, tmp_path / "mine.jsonl", tmp_path / "dataset")
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    found = data_card.function(DataCardConfig(), {"dataset": tmp_path / "dataset"}, drawn)["named_by_own_rows"]
    rows = read_rows(tmp_path / "dataset" / "test.jsonl")
    assert found["test"] == sum(row["product"] in (labelled["product"], said["product"]) for row in rows) >= 2
    assert json.loads((drawn / "data_card.json").read_text(encoding="utf-8"))["named_by_own_rows"] == found
    says = f"name the products of {found['test']} of 72 rows of test and {found['hard']} of 72 rows of hard"
    render({**sample_report(), "dataset": {"sha256": "ab" * 32, **metrics}}, tmp_path / "page", drawn)
    for page in (drawn / "data_card.md", tmp_path / "page" / "report.md", tmp_path / "page" / "report.html"):
        assert says in page.read_text(encoding="utf-8"), page.name
