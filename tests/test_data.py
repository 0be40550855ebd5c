"""Phrase banks, generator, noise, splits and the leakage check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import yaml

from tasks.config import left_out, load_config, resolve
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.domain.bank import Bank, load_bank, make_pattern, parse_pattern
from tasks.domain.errors import UserError
from tasks.domain.expansion import Segment, expand
from tasks.domain.noise import KINDS
from tasks.domain.scoring import normalise, text_contains_slots
from tasks.domain.spec import DOMAINS_DIR, MOST_NODES, LineLoader, load_spec, load_yaml
from tasks.domain.utterances import SPLITS, split_catalogs, split_patterns, split_products
from tasks.gate_rows import gate_rows
from tasks.synthesize import SynthesizeConfig, domain_digest, in_turns, make_generator, read_rows, synthesize
from tests.own import synthesize_with

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")
SMALL = SynthesizeConfig(train_rows=600, validation_rows=72, test_rows=144, hard_rows=144)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dataset")
    return folder, synthesize.function(SMALL, {}, folder)


def test_in_turns_the_first_rows_are_of_all_intents_and_languages_and_none_is_lost(dataset: tuple[Path, dict[str, Any]]) -> None:
    rows = read_rows(dataset[0] / "test.jsonl")[:-7]  # not the same number of each
    turned = in_turns(rows)
    assert len({row["gold"]["intent"] for row in rows[:24]}) == 4  # as written
    for first in (12, 24, 72):
        intents, languages = Counter(row["gold"]["intent"] for row in turned[:first]), Counter(row["language"] for row in turned[:first])
        assert set(intents.values()) == {first // 12} and set(languages.values()) == {first // 6}
    assert sorted(row["id"] for row in turned) == sorted(row["id"] for row in rows) and in_turns([]) == []


@pytest.mark.parametrize("language", SPEC.languages)
def test_banks_are_large_enough(language: str) -> None:
    bank = load_bank(SPEC, language)
    with_product_or_order = {name for name, intent in SPEC.intents.items() if {"product", "order_id"} & set(intent.slots)} | {"view_cart"}
    assert all(len(patterns) >= (80 if name in with_product_or_order else 65) for name, patterns in bank.patterns.items())
    assert len(bank.products) >= 400 and len(SPEC.departments) >= 12
    assert len(bank.corrections) >= 12 and len(bank.attributes) == len(SPEC.departments) + 1
    assert {product.department for product in bank.products} == set(SPEC.departments)


@pytest.mark.parametrize("language", SPEC.languages)
def test_what_may_be_part_of_a_products_name_never_stands_behind_it_without_being_one(language: str) -> None:
    bank = load_bank(SPEC, language)
    attributes = "|".join(re.escape(text) for texts in bank.attributes.values() for text in texts)
    said = re.compile(rf"\{{(product|counted)[^}}]*\}} ({attributes})(?!\w)", re.IGNORECASE)
    assert not [pattern.text for patterns in bank.patterns.values() for pattern in patterns if said.search(pattern.text)]


@pytest.mark.parametrize("language", SPEC.languages)
def test_every_pattern_expands_into_a_label_that_stands_in_the_text(language: str) -> None:
    generator = make_generator(SMALL.model_copy(update={"languages": (language,), "noise_rate": 0.0}))
    required = {name: {slot for slot, use in intent.slots.items() if use != "optional"} for name, intent in SPEC.intents.items()}
    for index in range(600):
        row = generator.row("train", index)
        assert required[row["gold"]["intent"]] <= set(row["gold"]), row
        assert text_contains_slots(row["text"], row["gold"], SPEC), row
        assert "{" not in row["text"] and "  " not in row["text"], row


@pytest.mark.slow
def test_splits_share_no_product_and_hard_has_patterns_of_its_own(dataset: tuple[Path, dict[str, Any]]) -> None:
    rows = {split: read_rows(dataset[0] / f"{split}.jsonl") for split in SPLITS}
    products = {split: {row["product"] for row in rows[split]} - {None} for split in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not products[a] & products[b], (a, b)
    patterns = {split: {row["origin"] for row in rows[split]} for split in SPLITS}
    assert not patterns["hard"] & (patterns["train"] | patterns["validation"] | patterns["test"])


def test_held_out_departments_are_in_hard_only() -> None:
    parts = split_products(load_bank(SPEC, "en").products, SPEC)
    held_out = set(SPEC.held_out_departments)
    assert {product.department for product in parts["hard"]} == held_out
    assert all(product.department not in held_out for split in ("train", "validation", "test") for product in parts[split])


def test_no_held_out_product_holds_a_training_product_of_any_language_or_is_part_of_one() -> None:
    banks = {language: load_bank(SPEC, language) for language in SPEC.languages}
    catalogs = split_catalogs(banks, SPEC)
    names = {
        split: {f" {normalise(form)} " for parts in catalogs.values() for product in parts[split] for form in product.forms.values()}
        for split in SPLITS
    }
    trained = "|".join(names["train"])
    for split in ("validation", "test", "hard"):
        assert not [name for name in names[split] if name in trained or any(inner in name for inner in names["train"])]
    for language, parts in catalogs.items():
        assert 400 < sum(map(len, parts.values())) > len(banks[language].products) - 40


def test_a_foreign_product_begins_as_the_words_around_it_need() -> None:
    generator = make_generator(SynthesizeConfig(languages=("fr", "hr"), noise_rate=0, decoration_rate=1))
    french = {product.name for product in load_bank(SPEC, "fr").products}
    rows = [
        row for row in (generator.row("train", index) for index in range(0, 24000, 2)) if row["product"] and row["product"] not in french
    ]
    elided = [row["product"][0] for row in rows if re.search(rf"\b[dl]'{re.escape(row['product'])}", row["text"])]
    assert len(elided) > 5 and all(normalise(letter) in "aeiouh" for letter in elided)


def test_a_product_may_be_named_in_another_language() -> None:
    generator = make_generator(SynthesizeConfig(languages=("en", "hr"), noise_rate=0, decoration_rate=1))
    catalogs = split_catalogs({language: load_bank(SPEC, language) for language in ("en", "hr")}, SPEC)
    native, english = ({split: {p.name for p in part} for split, part in catalogs[language].items()} for language in ("hr", "en"))
    rows = [generator.row("test", index) for index in range(1, 2400, 2)]  # the Croatian ones
    mixed = [row for row in rows if row["product"] and row["product"] not in native["test"]]
    assert 10 < len(mixed) < 120
    assert all(row["product"] in english["test"] and "code_switch" in row["noise"] for row in mixed)
    assert any(row["product"] in row["text"] and row["gold"]["product"].startswith(row["product"]) for row in mixed)


def test_a_brand_is_in_one_split_in_every_language() -> None:
    where: dict[str, set[str]] = {}
    for language in SPEC.languages:
        for split, products in split_products(load_bank(SPEC, language).products, SPEC).items():
            for product in products:
                where.setdefault(normalise(product.name), set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())


def test_limit_takes_the_first_patterns_and_leaves_hard_alone() -> None:
    patterns = load_bank(SPEC, "en").patterns["view_cart"]
    limited, whole = split_patterns(patterns, 12), split_patterns(patterns)
    assert len(limited["train"]) == 12 and limited["hard"] == whole["hard"]
    assert not set(limited["train"]) & set(limited["hard"])


def test_rows_are_balanced_and_counted(dataset: tuple[Path, dict[str, Any]]) -> None:
    folder, card = dataset
    rows = read_rows(folder / "test.jsonl")
    assert card["counts"]["test"] == len(rows) == 144
    assert Counter(row["language"] for row in rows) == dict.fromkeys(SPEC.languages, 24)
    assert set(Counter(row["gold"]["intent"] for row in rows).values()) == {12}
    assert card["near_duplicates_removed"] == card["rejected"].get("near_duplicate_of_evaluation", 0)


def test_a_phrase_without_slots_is_learnt_though_test_has_it_too(tmp_path: Path) -> None:
    config = SynthesizeConfig(
        languages=("en", "hr"), intents=("view_cart", "checkout", "talk_to_agent"), train_rows=900, test_rows=60, hard_rows=12,
        validation_rows=12, patterns_per_intent=12, noise_rate=0, decoration_rate=0,
    )  # fmt: skip
    synthesize.function(config, {}, tmp_path)
    learnt = Counter(row["origin"] for row in read_rows(tmp_path / "train.jsonl"))
    asked = {row["origin"] for row in read_rows(tmp_path / "test.jsonl")}
    assert len(asked) > 20 and all(learnt[pattern] >= 3 for pattern in asked)


@pytest.mark.slow
def test_dataset_is_the_same_in_every_process(tmp_path: Path) -> None:
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / seed
        out.mkdir()
        code = "import sys, pathlib; from tasks.synthesize import *; synthesize.function(SynthesizeConfig(train_rows=96, test_rows=24, hard_rows=24, validation_rows=24), {}, pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(out)], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.add((out / "train.jsonl").read_bytes())
    assert len(digests) == 1


def test_rows_of_ones_own_join_training_and_what_cannot_be_used_is_counted(dataset: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    leaked = read_rows(dataset[0] / "test.jsonl")[0]
    mine = [
        {"text": "zwei Kisten Fritz-Kola", "gold": {"intent": "add_to_cart", "product": "Fritz-Kola", "quantity": 2}, "source": "chat"},
        {"text": "Zwei Kisten Fritz-Kola!", "gold": {"intent": "view_cart"}},
        {"text": "fliegen", "gold": {"intent": "fly"}},
        {"text": leaked["text"], "gold": leaked["gold"]},
        {"text": "was kosten Mirabellen", "gold": {"intent": "search_product"}, "score": ["intent"]},
        {"text": "was kosten Mirabellen denn", "gold": {"intent": "search_product"}},
        {"text": "was kosten Mirabellen so", "gold": {"intent": "search_product", "product": "Reineclauden"}},
        {"text": "was kosten Mirabellen hier", "gold": {"intent": "search_product", "product": "!"}},
        {"text": "was kosten Mirabellen dort", "gold": {"intent": "search_product", "product": "bellen"}},
        {"text": "wo bleibt 4711", "gold": {"intent": "track_order", "order_id": "4712"}},
        {"text": "fünftausend Mirabellen", "gold": {"intent": "add_to_cart", "product": "Mirabellen", "quantity": 5000}},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in mine), encoding="utf-8")
    out = tmp_path / "out"
    card = synthesize_with(SMALL, path, out)
    assert card["origins"]["train"] == {"extra": 1, "generator": card["counts"]["train"] - 1}
    added = read_rows(out / "train.jsonl")[-1]
    assert (added["text"], added["origin"], added["product"]) == ("zwei Kisten Fritz-Kola", "extra:chat", None)
    reasons = {reason: n for reason, n in card["rejected"].items() if reason.startswith("extra")}
    assert len(reasons) == 8 and reasons.pop("extra: `gold.product` is not in the text") == 3 and set(reasons.values()) == {1}
    assert {
        "extra: duplicate",
        "extra: near_duplicate_of_evaluation",
        "extra: not every field is labelled",
        "extra: `gold` has no product, which search_product always has",
        "extra: `gold.order_id` is not in the text",
        "extra: `gold.quantity` is out of range",
    } < set(reasons)
    told = list(left_out(load_config("smoke", {"data.extra": [str(path)]})))
    assert f"data.extra {path}, line 7: `gold.product` is not in the text. Given: 'Reineclauden'" in told and len(told) == 8


def test_the_key_depends_on_what_a_file_of_ones_own_holds_and_not_on_where_it_is() -> None:
    here, there = (SMALL.model_copy(update={"extra": (path,), "extra_sha256": ("a",)}) for path in ("/x/mine.jsonl", "/y/mine.jsonl"))
    assert synthesize.key(here, {}) == synthesize.key(there, {})
    assert synthesize.key(here, {}) != synthesize.key(here.model_copy(update={"extra_sha256": ("b",)}), {})


@pytest.mark.parametrize("kind", KINDS)
def test_noise_changes_the_label_with_the_text_and_no_number(kind: str) -> None:
    changed = 0
    for seed in range(200):
        segments = [
            Segment("Bitte legen Sie "),
            Segment("SOMMER-12", protected=True),
            Segment(" "),
            Segment("grüne Äpfel", "product"),
            Segment(", danke schön."),
        ]
        before = "".join(segment.text for segment in segments)
        KINDS[kind](segments, Random(seed))
        text = "".join(segment.text for segment in segments)
        changed += text != before
        assert [segment.text.upper() for segment in segments if segment.protected] == ["SOMMER-12"]
    assert changed > 100


@pytest.mark.slow
def test_seed_changes_rows_but_no_split() -> None:
    a, b = make_generator(SMALL), make_generator(SMALL.model_copy(update={"seed": 8}))
    assert [a.row("train", i)["text"] for i in range(20)] != [b.row("train", i)["text"] for i in range(20)]
    trained = [b.row("train", i) for i in range(3000)]
    assert not {a.row("hard", i)["origin"] for i in range(500)} & {row["origin"] for row in trained}
    assert not {row["product"] for row in trained} & {a.row("test", i)["product"] for i in range(500)} - {None}


# --- broken files ------------------------------------------------------------------------------------------------


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    """A copy of the domain to break."""
    folder = tmp_path / "shop"
    shutil.copytree(DOMAINS_DIR / "ecommerce", folder)
    return folder


def edit(path: Path, old: str, new: str) -> int:
    """Replace the first occurrence and return its line."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


@pytest.mark.slow
def test_a_copy_of_the_domain_needs_no_code(domain: Path) -> None:
    row = make_generator(SMALL.model_copy(update={"domain": str(domain)})).row("train", 0)
    assert row == make_generator(SMALL).row("train", 0)


@pytest.mark.slow
def test_a_run_uses_the_languages_of_its_domain_unless_it_is_told_which(domain: Path) -> None:
    edit(domain / "spec.yaml", "languages: [en, de, es, fr, it, hr]", "languages: [de, en]")
    told = ({}, {"data.languages": ["en"]})
    spoken = [resolve(load_config("smoke", {"data.domain": str(domain), **said})).data.languages for said in told]
    assert spoken == [("de", "en"), ("en",)]
    with pytest.raises(UserError, match=r"data.languages = 'fr'.*Allowed: de, en"):
        resolve(load_config("smoke", {"data.domain": str(domain), "data.languages": ["fr"]}))


@pytest.mark.parametrize("stage", [synthesize, gate_rows], ids=lambda stage: stage.name)
def test_a_domain_that_changed_after_the_run_began_is_refused_and_nothing_is_stored(
    domain: Path, tmp_path: Path, stage: seam.Stage
) -> None:
    given = {"domain": str(domain), "domain_sha256": domain_digest(str(domain)), "languages": ("en",)}
    config = stage.config_type.model_validate(SMALL.model_dump() | given)
    edit(domain / "phrases" / "en.yaml", "please", "pretty please")
    store = Store((tmp_path / "store").as_uri(), tmp_path)
    with pytest.raises(UserError, match=r"data\.domain = .*shop.*has changed since the run began"):
        seam.run(replace(stage, isolated=False), config, {}, store, tmp_path / "logs")
    assert store.find(stage.name, stage.key(config, {})) == (None, None)


def test_broken_yaml_names_file_and_line(domain: Path) -> None:
    line = edit(domain / "spec.yaml", "languages: [", "languages: [[")
    with pytest.raises(UserError, match="not valid YAML") as error:
        load_spec(str(domain))
    assert "spec.yaml:" in str(error.value)
    assert int(str(error.value).split("spec.yaml:")[1].split("'")[0]) >= line


def test_a_small_file_of_very_many_values_is_refused_before_they_are_made(domain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banks = [(domain / "phrases" / f"{language}.yaml").read_text(encoding="utf-8") for language in load_spec(str(domain)).languages]
    most = max(sum(isinstance(event, yaml.NodeEvent) for event in yaml.parse(bank, Loader=LineLoader)) for bank in banks)
    assert most * 10 < MOST_NODES  # of our own banks
    line = edit(domain / "spec.yaml", "slots:", f"more: [{'a,' * MOST_NODES}]\nslots:")
    monkeypatch.setattr(LineLoader, "get_single_data", None)
    with pytest.raises(UserError, match=rf"spec.yaml:{line}': has 100,001 keys and values up to this line. Allowed: at most 100,000"):
        load_yaml(domain / "spec.yaml")


def test_wrong_spec_field_names_its_line(domain: Path) -> None:
    line = edit(domain / "spec.yaml", "product: {type: catalog}", "product: {type: catalogue}")
    with pytest.raises(UserError, match=rf"slots.product.*spec.yaml:{line}"):
        load_spec(str(domain))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("search_product:", "search_product: {slots: {produkt: always}}\n  another:", "search_product.slots.produkt.*'produkt' is no slot; known slots: product"),
        ("held_out_departments: [", "held_out_departments: [petz, ", "held_out_departments.0.*'petz' is no department"),
        ("minimum: 1, maximum: 999", "minimum: 10, maximum: 5", "quantity.*the minimum 10 is above the maximum 5"),
        ("  order_id:", "  pages: {type: integer}\n  order_id:", "slots.pages.*'pages' is a second slot of the type 'integer'"),
        ("  quantity: {", "  brand: {type: catalog}\n  quantity: {", "slots.brand.*'brand' is a second slot of the type 'catalog'"),
        ('"{word}-99"', '"{worx}99"', r"coupon_code.code.formats.3.*'{worx}99' has braces other than one `{word}`"),
        ('"{word}-99"', '"{word}{word}"', "coupon_code.code.formats.3.*has braces other than one `{word}`"),
        ("quantity: {default: 1}", "quantity: {default: 0}", "add_to_cart.slots.quantity.*the default 0 is outside of the slot's range, 1 to 999"),
        ("quantity: {default: 1}", "quantity: {default: true}", "add_to_cart.slots.quantity.*the default True is no value of a slot of the type integer"),
        ("fallback: true", "fallback: false", "intents.*exactly one intent must have `fallback: true`"),
        ("Example: {{", "Example: {", "zero_shot_prompt.*braces other than `{intents}`"),
        ("  {intents}", "  {intents:>9999999999}", "zero_shot_prompt.*braces other than `{intents}`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_rest_of_a_spec_names_its_line(domain: Path, old: str, new: str, said: str) -> None:
    line = edit(domain / "spec.yaml", old, new)
    with pytest.raises(UserError) as error:
        load_spec(str(domain))
    assert re.search(said, str(error.value), re.DOTALL) and "Value error" not in str(error.value), str(error.value)
    found = int(re.search(r"spec.yaml:(\d+)", str(error.value))[1])  # type: ignore[index]
    assert 1 < found <= line


def test_a_field_that_is_missing_names_the_line_of_what_it_is_missing_in(domain: Path) -> None:
    edit(domain / "phrases/en.yaml", "coupon_words:", "coupon_wordz:")
    with pytest.raises(UserError, match=r"coupon_words.*phrases/en.yaml:1\b"):
        load_bank(load_spec(str(domain)), "en")


@pytest.mark.parametrize("field", ["prompt: chat", "answer: json"])
def test_what_a_run_chooses_is_not_said_by_a_domain(domain: Path, field: str) -> None:
    text = (domain / "spec.yaml").read_text()
    (domain / "spec.yaml").write_text(f"{text}{field}\n")
    name, value = field.split(": ")
    said = rf"^{name} = .*spec\.yaml:{len(text.splitlines()) + 1}': is chosen for each run.*data\.{name}={value}"
    with pytest.raises(UserError, match=said):
        resolve(load_config("smoke", {"data.domain": str(domain)}))


def test_unknown_field_of_the_spec_is_named(domain: Path) -> None:
    (domain / "spec.yaml").write_text((domain / "spec.yaml").read_text() + "colour: red\n")
    with pytest.raises(UserError, match="colour"):
        load_spec(str(domain))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("show {product} in my cart", "does not fit the intent"),
        ("show (my cart", "missing '\\)'"),
        ("show my cart]", "unexpected '\\]'"),
        ("show {} cart", "stray"),
        ("show {mention.pl} or {mention.plural}", "form 'plural' is unknown"),
        (" ", "may say nothing at all"),
        ("[show] [(my|) cart]", "may say nothing at all"),
    ],
)
def test_a_wrong_pattern_names_file_and_line(domain: Path, pattern: str, problem: str) -> None:
    path = domain / "phrases" / "en.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "view_cart:") + 1
    lines[at] = f'    - "{pattern}"'
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=problem) as error:
        load_bank(load_spec(str(domain)), "en")
    assert f"en.yaml:{at + 1}" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("language: en", "language: de", "language = '.*en.yaml:1': is 'de' in the phrase bank of 'en'"),
        ("counted: {one: one, other: pl}", "counted: {one: one}", "counted = '.*en.yaml:4': has no form for `other`"),
        (
            "counted: {one: one, other: pl}",
            "counted: {one: one, other: plural}",
            "counted.other = .*form 'plural' is unknown. Allowed: one, pl",
        ),
        ("counted: {one: one, other: pl}", "counted: {one: one, few: one, other: pl}", "counted.few = .*category 'few' is unknown"),
        ("measured: pl", "measured: many", "measured = .*form 'many' is unknown"),
        (
            '  3: ["three"]',
            '  2000: ["two thousand"]',
            "numbers.2000 = .*en.yaml:66': is a number that quantity cannot be. Allowed: 1 to 999",
        ),
        ('  3: ["three"]', '  -3: ["minus three"]', "numbers.-3 = .*is a number that quantity cannot be"),
        ('  3: ["three"]', "  3: [{}]", "numbers.3 = .*has no word, or one that is empty"),
        ('  3: ["three"]', "  3: []", "numbers.3 = .*has no word"),
        ('  3: ["three"]', '  3: [{sc: ""}]', "numbers.3 = .*has no word, or one that is empty"),
        ("  view_cart:", "  checkout:\n    - pay\n  view_cart:", "en.yaml:[0-9]+': is not valid YAML: 'checkout' stands twice"),
        (
            "  add_to_cart:\n",
            '  add_to_cart:\n    - "{quantity.pl} of {product.pl} please"\n',
            "intents.add_to_cart = .*placeholder {quantity} has no forms, so 'pl' would say nothing. Write {quantity}",
        ),
        ("  add_to_cart:\n", '  add_to_cart:\n    - "{counted.pl} please"\n', "placeholder {counted} has no forms"),
        (
            "  search_product:\n",
            '  search_product:\n    - "[{product}] please"\n',
            "may leave out product, which search_product always has",
        ),
    ],
)
def test_what_a_bank_cannot_say_is_found_before_any_work(domain: Path, old: str, new: str, problem: str) -> None:
    edit(domain / "phrases" / "en.yaml", old, new)
    with pytest.raises(UserError, match=problem):
        load_bank(load_spec(str(domain)), "en")


def test_a_domain_whose_splits_would_be_empty_is_refused(domain: Path) -> None:
    here = SMALL.model_copy(update={"domain": str(domain), "languages": ("en",)})
    path = domain / "phrases" / "en.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(?m)(^  view_cart:\n    - .*\n)(    - .*\n)+", r"\1", text), encoding="utf-8")
    with pytest.raises(UserError, match=r"intents.view_cart = '.*en.yaml:[0-9]+': has a single pattern.*at least one more"):
        make_generator(here)
    path.write_text(text, encoding="utf-8")
    catalog = domain / "catalog" / "en.csv"
    catalog.write_text("\n".join(catalog.read_text(encoding="utf-8").splitlines()[:11]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"catalog = '.*en.csv:1': has no product for the split"):
        make_generator(here)


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        ("version: 2026-13-45", "month must be in 1..12"),
        ("version: 1\x07", "is not valid YAML"),
        ("version: 1 # \udcff", "is not UTF-8"),
    ],
)
def test_a_value_or_character_that_cannot_be_read_names_its_line(domain: Path, new: str, problem: str) -> None:
    path = domain / "spec.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("version:"))
    lines[at] = new
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=rf"spec\.yaml:{at + 1}': .*{problem}"):
        load_spec(str(domain))


def test_an_empty_format_of_a_code_and_an_intent_without_patterns_name_their_line(domain: Path) -> None:
    bank = domain / "phrases" / "en.yaml"
    text = bank.read_text(encoding="utf-8")
    bank.write_text(re.sub(r"(?m)^  view_cart:\n(    .*\n)+", "  view_cart: []\n", text), encoding="utf-8")
    line = bank.read_text(encoding="utf-8").splitlines().index("  view_cart: []") + 1
    with pytest.raises(UserError, match=rf"intents.view_cart = '.*en\.yaml:{line}': has no pattern"):
        load_bank(load_spec(str(domain)), "en")
    load_spec.cache_clear()
    line = edit(domain / "spec.yaml", "formats: [", 'formats: ["", ')
    with pytest.raises(UserError, match=rf"formats.0 = '.*spec\.yaml:{line}'"):
        load_spec(str(domain))


def test_a_file_of_ones_own_that_is_not_there_is_said_by_the_field_that_names_it() -> None:
    with pytest.raises(UserError, match=r"data\.extra = '/nope': does not exist"):
        list(left_out(load_config("smoke", {"data.extra": ["/nope"]})))


def test_a_wrong_catalog_row_names_file_and_line(domain: Path) -> None:
    path = domain / "catalog" / "en.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[10] = lines[10].replace(lines[10].split(",")[0], "spaceships", 1)
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"spaceships.*groceries") as error:
        load_bank(load_spec(str(domain)), "en")
    assert "en.csv:11" in str(error.value)


def test_a_language_without_bank_is_named(domain: Path) -> None:
    (domain / "phrases" / "it.yaml").unlink()
    with pytest.raises(UserError, match="has no phrase bank"):
        make_generator(SMALL.model_copy(update={"domain": str(domain)}))


def test_nested_choices_parse() -> None:
    nodes = parse_pattern("(a|b [c (d|e)]) {product.pl}")
    assert len(nodes) == 3


def varied(bank: Bank, line: str, intent: str, variety: float = 1.0, drilled: bool = False) -> list[tuple[str, dict[str, object]]]:
    pattern = make_pattern(line, "en", intent)
    said = []
    for seed in range(200):
        segments, values = expand(pattern, bank.products[seed], bank, SPEC, Random(seed), variety, drilled)
        written = {segment.slot: segment.text for segment in segments if segment.slot}
        said.append((" ".join("".join(segment.text for segment in segments).split()), {**written, **values}))
    return said


@pytest.fixture(scope="module")
def varied_bank() -> Bank:
    return load_bank(SPEC, "en").model_copy(update={"attributes": {"any": ["in blue"]}, "corrections": ["no wait"]})


def test_an_attribute_becomes_part_of_the_product(varied_bank: Bank) -> None:
    said = varied(varied_bank, "find {product} now", "search_product")
    assert {label["product"] == text[len("find ") : -len(" now")] for text, label in said} == {True}
    assert 50 < sum(text.endswith(" in blue now") for text, _ in said) < 150
    assert not any("in blue" in text for text, _ in varied(varied_bank, "find {product} now", "search_product", variety=0))


def test_attributes_have_numbers_of_their_own_and_may_be_two(varied_bank: Bank) -> None:
    sized = varied_bank.model_copy(update={"attributes": {"any": ["black", "{n}x{n} cm"]}})
    products = [label["product"] for _, label in varied(sized, "find {product} now", "search_product")]
    sizes = {found.group(1) for product in products if (found := re.search(r" (\d+x\d+) cm", product))}
    assert len(sizes) > 30 and all(2 <= int(side) <= 500 for size in sizes for side in size.split("x"))
    both = sum("black" in product and "cm" in product for product in products)
    assert 3 < both < 40


@pytest.mark.parametrize(
    ("line", "intent", "slot"),
    [
        ("set {product} to {digits}", "update_quantity", "quantity"),
        ("order {order_id}", "track_order", "order_id"),
    ],
)
def test_who_corrects_himself_means_what_he_says_last(varied_bank: Bank, line: str, intent: str, slot: str) -> None:
    corrected = [(text, label) for text, label in varied(varied_bank, line, intent) if "no wait" in text]
    assert 10 < len(corrected) < 80
    for text, label in corrected:
        wrong, right = text.split(" no wait ")
        assert right == str(label[slot]) != wrong.split()[-1]


def test_another_number_is_no_label(varied_bank: Bank) -> None:
    for text, label in varied(varied_bank, "{product}: {digits} instead of {other}", "update_quantity", variety=0):
        said, other = text.rsplit(": ", 1)[1].split(" instead of ")
        assert said == str(label["quantity"]) != other


def test_another_number_may_be_any_where_numbers_are_drilled(varied_bank: Bank) -> None:
    said = varied(varied_bank, "{product}: {quantity} instead of {other}", "update_quantity", variety=0, drilled=True)
    others = {text.rsplit(" instead of ", 1)[1] for text, _ in said}
    assert {"seventeen", "twenty-two"} & others
    for text, label in said:
        assert text.rsplit(" instead of ", 1)[1] not in varied_bank.bare_numbers[cast(int, label["quantity"])]


def test_a_drilled_number_is_any_the_bank_has_a_word_for_and_said_in_words(varied_bank: Bank) -> None:
    said = varied(varied_bank, "{product}: {quantity}", "update_quantity", variety=0, drilled=True)
    for text, label in said:
        assert text.rsplit(": ", 1)[1] in varied_bank.bare_numbers[cast(int, label["quantity"])]
    assert len({label["quantity"] for _, label in said}) > 0.9 * len(varied_bank.numbers)
    digits = varied(varied_bank, "{product}: {digits}", "update_quantity", variety=0, drilled=True)
    assert all(text.endswith(f": {label['quantity']}") for text, label in digits)


def test_training_meets_seldom_number_words_more_often_than_evaluation() -> None:
    generator = make_generator(SMALL.model_copy(update={"languages": ("de",), "intents": ("update_quantity",)}))
    seldom = {
        split: sum(
            "und" in row["text"] and str(row["gold"]["quantity"]) not in row["text"] and row["gold"]["quantity"] > 20
            for row in (generator.row(split, index) for index in range(1000))
        )
        for split in ("train", "test")
    }
    assert seldom["train"] > 2 * seldom["test"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (("  any:\n", "  cars:\n"), r"'cars' is unknown.*any"),
        (("in the large size", "size {size}"), r"'size \{size\}' has an unknown placeholder.*\{n\}"),
    ],
)
def test_attributes_that_cannot_be_used_name_file_and_line(domain: Path, changed: tuple[str, str], problem: str) -> None:
    path = domain / "phrases" / "en.yaml"
    edit(path, *changed)
    with pytest.raises(UserError, match=rf"en\.yaml:\d+.*{problem}"):
        load_bank(load_spec(str(domain)), "en")
