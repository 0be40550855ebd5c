"""Whatever bytes somebody else gives are an answer or one clear error, never another exception and never work without end.

The examples are the same every time. For a campaign with new ones: `CARTWRIGHT_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py`.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tasks.domain.bank import load_bank
from tasks.domain.errors import UserError
from tasks.domain.grammar import answer_grammar
from tasks.domain.labelled import read_labelled
from tasks.domain.scoring import compact_json, normalise, parse_answer
from tasks.domain.spec import load_spec

pytestmark = pytest.mark.fast
MORE = os.environ.get("CARTWRIGHT_FUZZ_EXAMPLES")
settings.register_profile(
    "fuzz", derandomize=not MORE, max_examples=int(MORE or 40), deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fuzz")
SPEC = load_spec("ecommerce")
DEEP = 100_000

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
AWKWARD = [
    b"&a ", b"*a", b"<<: *a", b"!!binary x", b"!!python/object:os.system ", b"2001-99-99", b"0b", b"9" * 5000, b"? [a]\n: b\n", b"\x00", b"\xff",
    b"\x85", b"\r", b"\t", b"[" * 2000, b"(" * 2000, b"{", b"}", b"{}", b"[]", b"|", b"\n", b": ", b"- ", b"'", b'"', b"null", b"true", b"-1", b"''",
    b"../../x", b"path: /\n", b"1: 2\n", b".nan", b"\\ud800", b"\\u0000", b"," * 9, b"a" * 3000, b"\xef\xbb\xbf", b"{x.y}", b"@", b"=",
]  # fmt: skip


def mutated(*wholes: bytes) -> st.SearchStrategy[bytes]:
    """One of some right files, in which up to four pieces are replaced; or any bytes at all."""

    def mutate(whole: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, new in changes:
            start = at % (len(whole) + 1)
            whole = whole[:start] + new + whole[start + length :]
        return whole

    piece = st.sampled_from(AWKWARD) | st.binary(max_size=12)
    change = st.tuples(st.integers(0, 100_000), st.integers(0, 30), piece)
    return st.builds(mutate, st.sampled_from(wholes), st.lists(change, max_size=4)) | st.binary(max_size=300)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "9" * 500, "intent", "product"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "gold", "intent", "product", "quantity", "score", "items", "pattern"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


def answered(call: Callable[[], Any]) -> Any:
    """What a call gives, or the one clear error it raises instead; any other exception fails the test."""
    try:
        return call()
    except UserError as error:
        assert len(str(error)) < 3000
        return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    for name in ("phrases", "catalog"):
        (made / name).mkdir()
    return made


# Answers of models ---------------------------------------------------------------------------------------------------

PIECES = ["{", "}", '"intent"', ":", '"add_to_cart"', ",", '"quantity"', "1e999", "9" * 5000, "NaN", '"\\ud800"', "[" * DEEP, '{"a":' * DEEP,
          "add", "\n", "p ", "q2", "q" + "9" * 50, "view", "\x00", "!" * 50_000, "\n" * 5000, '{"intent":"add_to_cart","product":"\\udfff"}']  # fmt: skip


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
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


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
    assert all(spec.slot_codes.values()) and spec.fallback_intent
    (folder / "rows.jsonl").write_text('{"text": "x", "gold": {"intent": "add", "product": "x"}}')
    read_labelled(folder / "rows.jsonl", spec)


@given(mutated(BANK_FILE), mutated(CATALOG))
@example(BANK_FILE.replace(b'["[please]', b'["' + b"(" * 5000 + b'", "[please]'), CATALOG)
@example(BANK_FILE.replace(b"[what", b"[!!binary eA==, what"), CATALOG)
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
    texts, bad = read_texts(data.decode("utf-8-sig").split("\n"))
    assert all(text.encode() for text in texts) and all(len(problem) < 500 for _, problem in bad)


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


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_gguf(folder: Path) -> bytes:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2])
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "small.gguf").read_bytes()


HUGE = (2**60).to_bytes(8, "little")
COUNTS = b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little")  # no tensor, one field
FIELD = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")  # `a`, an array


@given(
    st.integers(0, 400),
    st.integers(0, 20),
    st.binary(max_size=12) | st.sampled_from([HUGE, b"\xff" * 8, bytes(8), (9).to_bytes(4, "little")]),
)
@example(0, 0, b"")
@example(0, 10_000, COUNTS + FIELD + (4).to_bytes(4, "little") + HUGE)  # an array of 2^60 numbers
@example(0, 10_000, COUNTS + FIELD + (9).to_bytes(4, "little") + HUGE)  # of arrays
@example(0, 10_000, COUNTS + FIELD + (8).to_bytes(4, "little") + HUGE)  # of texts
@example(0, 10_000, b"GGUF\x03\0\0\0" + HUGE + HUGE)
@example(0, 10_000, b"")
def test_header_of_a_gguf_file(folder: Path, small_gguf: bytes, at: int, length: int, new: bytes) -> None:
    from tasks.base_model import BaseModelConfig, resolve
    from tasks.weights import BrokenFileError, gguf_weights

    path = folder / "fuzzed.gguf"
    path.write_bytes(small_gguf[:at] + new + small_gguf[at + length :])
    found = answered(lambda: resolve(BaseModelConfig(source=str(path))))
    assert isinstance(found, UserError) or found.revision
    try:
        weights = gguf_weights(path)
    except BrokenFileError:
        return
    assert all(read().ndim > 1 for read in weights.values())


# What other machines write -------------------------------------------------------------------------------------------

KIND, KEY = "merge", "k"
FACTS: dict[str, Any] = {
    "kind": KIND, "key": KEY, "version": 1, "config": {}, "inputs": {}, "digest": "d", "metrics": {"loss": 0.1}, "libraries": {}, "hardware": "h",
    "wall_s": 1.5, "peak_rss_mb": None, "created": "now",
}  # fmt: skip
ENTRY = {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "size": 3}  # of `abc`
NAMES = [
    "w",
    "a/w",
    "../w",
    "../../../w",
    "/tmp/w",
    "a\\..\\w",
    "..",
    ".",
    "",
    "a//w",
    "a/../../w",
    "manifest.json",
    "x" * 300,
    "a\0w",
    "w\n",
    "é",
    "w/w",
    "C:w",
]
MANIFESTS = st.dictionaries(st.sampled_from(NAMES), st.just(ENTRY), max_size=3).map(
    lambda files: json.dumps({**FACTS, "files": files}).encode()
)


@given(MANIFESTS | mutated(json.dumps({**FACTS, "files": {"w": ENTRY, "a/w": ENTRY}}).encode()))
@example(json.dumps({**FACTS, "files": {"../../../../w": ENTRY}}).encode())
@example(json.dumps({**FACTS, "files": {"w": ENTRY, "w/w": ENTRY}}).encode())
@example(json.dumps({**FACTS, "files": {"x" * 300: ENTRY}}).encode())
@example(json.dumps({**FACTS, "files": {"w": {**ENTRY, "size": 10**30}}}).encode())
@example(b"[" * DEEP)
def test_manifest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    from tasks.core.artifacts import MANIFEST, Store

    top = tmp_path_factory.getbasetemp() / "manifests"
    there, here = Store("memory://fuzz", top / "a" / "home"), Store((top / "store").as_uri(), top / "home")
    there.fs.store.clear()
    for name in NAMES:  # whatever a name leads to in that storage, there is a file
        with_content = f"{there.root}/{KIND}/{KEY}/{name}"
        there.fs.store.setdefault(with_content, there.fs.open(with_content, "wb").__class__(there.fs, with_content, b"abc"))
    there.fs.pipe_file(f"{there.root}/{KIND}/{KEY}/{MANIFEST}", data)
    folder = here.path(KIND, KEY)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("w", "../w"):
        (folder / name).write_bytes(b"abc")
    (folder / MANIFEST).write_bytes(data)
    for store in (there, here):
        manifest, damage = store.find(KIND, KEY)
        assert (manifest is None) != (damage is None)
        if manifest:
            assert all((store.path(KIND, KEY) / name).resolve().is_relative_to(store.path(KIND, KEY).resolve()) for name in manifest.files)
        store.remove(KIND, KEY) if store is there else None
    written = {path for path in (top / "a").rglob("*") if path.is_file()}
    assert all(path.is_relative_to(top / "a" / "home") for path in written) and not (top / "w").exists()


@given(
    mutated(b'{"run": {"run_id": "r"}, "given": {}}', b'{"result": [], "stages": []}') | JSON.map(lambda note: json.dumps(note).encode())
)
@example(b"[" * DEEP)
@example(b'{"run": 1}')
@example(b'{"given": {"unknown": 1}}')
@example(b"\xff")
def test_note_of_an_errand(folder: Path, data: bytes) -> None:
    from flows.errands import Errand, read_errand
    from flows.stages import measure
    from tasks.core.artifacts import Store

    store = Store("memory://fuzz-notes", folder)
    for name in ("notes/e.json", "notes/e.result.json"):
        store.fs.pipe_file(f"{store.root}/{name}", data)
    assert isinstance(answered(lambda: read_errand(store, "e", measure, store.uri)), UserError)
    found = answered(lambda: Errand("e", {}).result(store, measure))
    assert isinstance(found, UserError) or len(found) == 2
