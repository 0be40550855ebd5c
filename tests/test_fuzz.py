"""Whatever bytes people and models give are an answer or one clear error, never another exception and never work without end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.domain.bank import load_bank
from tasks.domain.errors import UserError
from tasks.domain.grammar import answer_grammar
from tasks.domain.labelled import read_labelled
from tasks.domain.scoring import compact_json, normalise, parse_answer
from tasks.domain.spec import load_spec
from tests.fuzzing import DEEP, JSON, answered, mutated

SPEC = load_spec("ecommerce")

SPEC_FILE = b"""\
name: toys
version: 1
title: t
languages: [en]
system_prompt: p
zero_shot_prompt: "{intents}"
slots: {product: {type: catalog}, quantity: {type: integer, maximum: 99}, code: {type: code, formats: ["A9"]}}
intents:
  add: {slots: {product: always, quantity: {default: 1}}}
  other: {fallback: true, weight: 2}
departments: [a, b]
held_out_departments: [b]
"""
BANK_FILE = b"""\
language: en
forms: [one, pl]
plural: {one: [1]}
counted: {one: one, other: pl}
measured: pl
agree: {the: {sc: "a ", p: "some "}}
measures: {box: {class: sc, one: box of, other: boxes of}}
numbers: {1: [one], 2: [two]}
bare_numbers: {1: [one]}
openers: [hi]
closers: [bye]
chatter: [so]
fillers: [uh]
coupon_words: [SAVE]
attributes: {any: ["size {n}"]}
intents:
  add: ["[please] (put|add) {counted} in", "add {product.pl}"]
  other: ["what (time|day) is it"]
"""
CATALOG = b"department,class,one,pl,measure\na,sc,ball,balls,box\nb,p,dice,dice,\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    for name in ("phrases", "catalog"):
        (made / name).mkdir()
    return made


# Answers of models ---------------------------------------------------------------------------------------------------

PIECES = ["{", "}", '"intent"', ":", '"add_to_cart"', ",", '"quantity"', "1e999", "9" * 5000, "NaN", '"\\ud800"', "[" * DEEP, '{"a":' * DEEP,
          "add", "\n", "p ", "q2", "q" + "9" * 50, "view", "\x00", "!" * 5_000, "\n" * 5000, '{"intent":"add_to_cart","product":"\\udfff"}']  # fmt: skip


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@example('{"intent":"add_to_cart","product":"\\ud800","quantity":1}')
@example("[" * DEEP)
@example("!" * 100_000 + "a" + "!" * 100_000 + "a")
def test_output_of_a_model(text: str) -> None:
    parsed = parse_answer(text, SPEC)
    assert (parsed.answer is None) != (parsed.problem is None)
    if parsed.answer:
        assert parsed.answer["intent"] in SPEC.intents
        assert json.loads(compact_json(parsed.answer).encode()) == parsed.answer
    assert normalise(normalise(text)) == normalise(text)


@given(st.lists(st.sampled_from(PIECES) | JSON.map(json.dumps), max_size=6).map("".join), JSON)
@example('{"items": [' + "[" * 500 + "]" * 500 + "]}", {"text": "\ud800", "pattern": "(" * 5000})
@example("", {"pattern": "(" * 5000})
def test_answer_of_a_teacher(folder: Path, judges: Any, text: str, item: Any) -> None:
    from tasks.teach import _write
    from tasks.teaching.answers import items_of

    judge, requests = judges
    items, problem = items_of(text)
    rows: list[Any] = [problem]
    for one in (*items, item, {"text": item}, {"pattern": item}, {"class": "sc", "one": item, "measure": item}):
        for request in requests:
            row, reason = judge.judge(one, request)
            assert (row is None) != (reason is None)
            rows.append(row or {"reason": reason, "item": one})
    _write(folder / "rows.jsonl", [{"row": row} for row in rows])
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line)


def test_what_no_file_could_hold_is_no_item(judges: Any) -> None:
    from tasks.teaching.answers import items_of

    judge, (utterances, *_) = judges
    assert items_of('{"items": [' + "[" * 500 + "]" * 500 + "]}") == ([], "wrong_schema")
    item = {"text": "gimme three brass kettles \ud800 will you", "product": "brass kettles", "quantity": 3}
    assert judge.judge(item, utterances) == (None, "implausible")
    assert judge.judge({**item, "text": item["text"].replace("\ud800", "")}, utterances)[1] is None


@pytest.fixture(scope="module")
def judges() -> Any:
    from tasks.teaching.asking import Request
    from tasks.teaching.validators import Judge

    kinds = (("utterances", "add_to_cart"), ("patterns", "add_to_cart"), ("products", "groceries"))
    return Judge(SPEC, {"en": load_bank(SPEC, "en")}), [Request(kind, "en", topic, "plain", (), {}, "m", 1) for kind, topic in kinds]


LOGGED = b'{"hash": "a", "text": "t", "prompt_tokens": 1, "completion_tokens": 2, "usd": null, "seconds": 0.5}\n'


@given(mutated(LOGGED * 2))
@example(LOGGED.replace(b'"t"', b"5"))
@example(b"[" * DEEP)
def test_log_of_a_teachers_answers(folder: Path, data: bytes) -> None:
    from tasks.teaching.log import AnswerLog

    (folder / "answers.jsonl").write_bytes(data)
    with AnswerLog(folder / "answers.jsonl", {"a"}) as log:
        answer = log.get("a")
    assert answer is None or (isinstance(answer.text, str) and answer.tokens >= 0)


# Files of a domain ---------------------------------------------------------------------------------------------------


@given(mutated(SPEC_FILE))
@example(SPEC_FILE + b"path: /\n")
@example(SPEC_FILE + b"1: 2\n")
@example(SPEC_FILE.replace(b"version: 1", b"version: 2001-99-99"))
@example(SPEC_FILE.replace(b"{default: 1}", b"{default: many}"))
@example(SPEC_FILE.replace(b"{product: {", b"{'': {type: catalog}, product: {"))
@example(SPEC_FILE.replace(b"version: 1", b"version: " + b"[" * DEEP))
@example(SPEC_FILE.replace(b"title: t", b"title: \x07"))
@example(b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n")
def test_specification(folder: Path, data: bytes) -> None:
    (folder / "spec.yaml").write_bytes(data)
    spec = answered(lambda: load_spec.__wrapped__(str(folder)))
    if isinstance(spec, UserError):
        return
    assert len(set(spec.intent_codes.values())) == len(spec.intents) and answer_grammar(spec)
    assert all(spec.slot_codes.values()) and sum(intent.fallback for intent in spec.intents.values()) == 1
    (folder / "rows.jsonl").write_text('{"text": "x", "gold": {"intent": "add", "product": "x"}}')
    read_labelled(folder / "rows.jsonl", spec)


@given(mutated(BANK_FILE), mutated(CATALOG))
@example(BANK_FILE.replace(b'["[please]', b'["' + b"(" * 5000 + b'", "[please]'), CATALOG)
@example(BANK_FILE.replace(b"[what", b"[!!binary eA==, what"), CATALOG)
@example(BANK_FILE.replace(b"language", b"l\tanguage"), CATALOG)
@example(BANK_FILE, CATALOG + b"\xff")
@example(BANK_FILE, CATALOG + b'a,sc,"' + b"x" * 200_000)
@example(BANK_FILE.replace(b", one: box of, other: boxes of", b""), CATALOG)
def test_phrase_bank_and_catalog(folder: Path, bank: bytes, catalog: bytes) -> None:
    (folder / "spec.yaml").write_bytes(SPEC_FILE)
    (folder / "phrases" / "en.yaml").write_bytes(bank)
    (folder / "catalog" / "en.csv").write_bytes(catalog)
    loaded = answered(lambda: load_bank(load_spec.__wrapped__(str(folder)), "en"))
    if not isinstance(loaded, UserError):
        assert set(loaded.patterns) == {"add", "other"} and all(product.name for product in loaded.products)
        assert all(measure.form("other") for measure in loaded.measures.values())


def test_the_right_files_of_these_tests_are_right(folder: Path) -> None:
    """Else nothing but refusals would have been tried."""
    for name, data in (("spec.yaml", SPEC_FILE), ("phrases/en.yaml", BANK_FILE), ("catalog/en.csv", CATALOG)):
        (folder / name).write_bytes(data)
    assert len(load_bank(load_spec.__wrapped__(str(folder)), "en").products) == 2


# Rows and texts ------------------------------------------------------------------------------------------------------

ROW = (
    b'{"text": "two balls", "gold": {"intent": "add_to_cart", "product": "balls", "quantity": 2}, "score": ["intent"], "language": "en"}\n'
)


@given(
    mutated(ROW * 2)
    | JSON.map(lambda row: json.dumps(row).encode())
    | JSON.map(lambda row: json.dumps({"text": "x", "gold": row}).encode())
)
@example(b'{"text": "\\ud800", "gold": {"intent": "view_cart"}}')
@example(b"[" * DEEP)
@example(b'{"text": "x", "gold": {"intent": "view_cart", "' + b"x" * 500_000 + b'": 1}}')
def test_labelled_rows(folder: Path, data: bytes) -> None:
    from tasks.asking import read_texts

    (folder / "rows.jsonl").write_bytes(data)
    found = answered(lambda: read_labelled(folder / "rows.jsonl", SPEC))
    if isinstance(found, UserError):
        return
    rows, bad = found
    for row in rows:
        assert row["gold"]["intent"] in SPEC.intents and normalise(row["text"]) is not None
        json.dumps(row, ensure_ascii=False).encode()
    assert all(len(problem) < 500 for _, problem in bad)
    texts, bad = read_texts(data.split(b"\n"))
    assert all(json.dumps(given.fields(), ensure_ascii=False).encode() for given in texts) and all(len(problem) < 500 for _, problem in bad)


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=5))
@example([b"my cart", b"caf\xe9", b'{"text": "\xff"}', b"\xef\xbb\xbfmore"])
def test_texts_of_standard_input(lines: list[bytes]) -> None:
    from tasks.asking import read_texts

    texts, bad = read_texts(lines)
    assert all(given.text.encode() and given.fields()["text"] == given.text for given in texts) and len(texts) + len(bad) <= len(lines)
    assert {number for number, line in enumerate(lines, 1) if b"\xff" in line} <= {number for number, _ in bad}


@given(mutated(ROW * 2), st.booleans())
@example(b'{"text": "\\ud800"}\n', False)
@example(b"[" * DEEP, False)
@example(b"x" * 2_500_000, True)
def test_recent_texts(folder: Path, data: bytes, packed: bool) -> None:
    from tasks.recent_texts import read_texts

    plain, zipped = folder / "texts.jsonl", folder / "texts.jsonl.gz"
    plain.write_bytes(data)
    zipped.write_bytes(gzip.compress(data, 1) if packed else data)
    for file in (plain, zipped):
        found = answered(lambda file=file: read_texts(str(file), 1))  # type: ignore[misc]
        if not isinstance(found, UserError):
            assert found.usable and len(found.texts) == 1 and all(text.encode() for text in found.texts)
