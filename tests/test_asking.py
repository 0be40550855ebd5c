"""Labelled data of one's own: reading it, and what is said about the answers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.cli import predict
from tasks.asking import Found, ask, find_model, read_texts, wrong_answers
from tasks.core import progress
from tasks.core.settings import load_settings
from tasks.domain.errors import UserError
from tasks.domain.labelled import DEEPEST, read_labelled, read_lines, read_training
from tasks.domain.scoring import score
from tasks.domain.spec import Intent, load_spec

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")
GOOD: dict[str, Any] = {"text": "2 milk", "gold": {"intent": "add_to_cart", "product": "milk", "quantity": 2}}


def read(tmp_path: Path, *lines: Any) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return read_labelled(path, SPEC)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": 5}, "no `text`"),
        ({"gold": None}, "has no `gold`"),
        ({"gold": ["view_cart"]}, "`gold` is not an answer. Given: ['view_cart']"),
        ({"gold": {"intent": None}}, "`gold.intent` is no intent of the domain. Allowed: search_product"),
        ({"gold": {"intent": ["view_cart"]}}, "`gold.intent` is no intent of the domain. Given: ['view_cart']. Allowed: search_product"),
        ({"gold": {"intent": "fly"}}, "`gold.intent` is no intent of the domain. Given: 'fly'. Allowed: search_product"),
        ({"source": True}, "`source` is True. Allowed: a text"),
        ({"source": 1.5}, "`source` is 1.5. Allowed: a text"),
        ({"gold": {"intent": "view_cart", "product": "x"}}, "'product', which view_cart does not have. Allowed: no slots"),
        ({"gold": {"intent": "add_to_cart", "quantity": "2"}}, "`gold.quantity` is '2'. Allowed: an integer"),
        ({"gold": {"intent": "add_to_cart", "product": 2}}, "`gold.product` is 2. Allowed: a text"),
        ({"score": "intent"}, "`score` is 'intent'. Allowed: a list of some of intent, product"),
        ({"score": ["colour"]}, "`score` is ['colour']"),
        ({"score": []}, "`score` is []"),
        ({"score": ["intent"] * 99}, "`score` is ['intent', 'intent'"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_goes_on(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    rows, bad = read(tmp_path, GOOD, "", {**GOOD, **change}, "{broken", GOOD)
    assert [row["line"] for row in rows] == [1, 5]
    assert [line for line, _ in bad] == [3, 4] and problem in bad[0][1] and "is not JSON" in bad[1][1]


def test_a_field_that_is_null_is_one_that_is_not_there(tmp_path: Path) -> None:
    """Exports of tables have a column for each field, whatever a row has of it."""
    gold = {"intent": "add_to_cart", "product": "milk", "quantity": None, "order_id": None, "coupon_code": None}
    rows, bad = read(
        tmp_path, {"text": "milk", "gold": gold, "language": None, "source": None, "score": None, "id": None}, {**GOOD, "source": 7}
    )
    assert not bad and rows[0] == {"text": "milk", "gold": {"intent": "add_to_cart", "product": "milk", "quantity": 1}, "line": 1}
    assert rows[1]["source"] == "7"
    assert [row["line"] for row in read_training(tmp_path / "mine.jsonl", SPEC)[0]] == [1, 2]


def test_a_whole_number_that_is_written_with_a_point_is_one(tmp_path: Path) -> None:
    """pandas writes a column of integers so where some rows have none."""
    rows, bad = read(tmp_path, {**GOOD, "gold": {**GOOD["gold"], "quantity": 2.0}}, {**GOOD, "gold": {**GOOD["gold"], "quantity": 2.5}})
    assert str(rows[0]["gold"]["quantity"]) == "2"
    assert [problem for _, problem in bad] == ["`gold.quantity` is 2.5. Allowed: an integer"]


def test_of_many_intents_a_message_names_the_first(tmp_path: Path) -> None:
    many = SPEC.model_copy(update={"intents": {f"intent_{number}": Intent() for number in range(40)}})
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD))
    (_, problem), *_ = read_labelled(path, many)[1]
    assert problem.endswith("intent_10, intent_11 and 28 more") and "intent_12" not in problem


def test_a_line_that_is_not_utf_8_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        b'{"text": "caf\xe9", "gold": {"intent": "view_cart"}}',
        json.dumps(GOOD).encode(),
    ]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    rows, bad = read_labelled(tmp_path / "mine.jsonl", SPEC)
    assert [row["line"] for row in rows] == [1, 3] and bad == [(2, "is not UTF-8")]


def test_a_line_that_is_nested_too_deeply_is_named_whatever_is_left_of_the_stack(tmp_path: Path) -> None:
    """Between the depth that Python reads and the one that it writes are a few levels, which depend on who calls."""
    depths = [DEEPEST - 1, *range(DEEPEST, DEEPEST + 3), *range(900, 1001)]
    lines = [f'{{"text": "x", "gold": {"[" * depth}{"]" * depth}}}' for depth in depths]  # the row itself is one level more
    problem = "is nested too deeply"
    _, bad = read(tmp_path, *lines)
    assert [line for line, _ in bad] == [*range(1, len(depths) + 1)] and {said for _, said in bad[1:]} == {problem}
    assert "`gold` is not an answer" in bad[0][1]
    texts, bad = read_texts([line.encode() for line in lines])
    assert len(texts) == 1 and bad == [(number, problem) for number in range(2, len(depths) + 1)]


def test_what_is_no_object_of_a_jsonl_is_named_and_not_taken_for_a_text() -> None:
    others = [b'"hello"', b"[1,2]", b"null", b"7", b"two milk", b'{"text": 5}']
    good, named = b'{"text": "one"}', [2, 3, 4, 5, 6, 7]
    for lines, jsonl, first in (([b"", *others, good], True, ""), ([good, *others, good], False, "one")):
        texts, bad = read_texts(lines, jsonl=jsonl)
        assert [given.text for given in texts] == [*[first] * bool(first), "one"] and [number for number, _ in bad] == named
    assert "has no `text`" in bad[0][1] and "is not JSON" in bad[4][1]
    texts, bad = read_texts([b"two milk", *others[:3]])
    assert [given.text for given in texts] == ["two milk", '"hello"', "[1,2]", "null"] and not bad  # plain lines are what they are


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_no_other_program_reads_as_json_is_not_json(tmp_path: Path, number: str) -> None:
    line = f'{{"text": "a", "x": [{number}], "gold": {{"intent": "view_cart"}}}}'
    assert read_texts([line.encode()]) == ([], [(1, f"is not JSON ({number} is no number)")])
    assert read(tmp_path, line, GOOD)[1] == [(1, f"is not JSON ({number} is no number)")]
    assert read_texts([b'{"text": "a", "x": 1.5e3}'])[0][0].fields()["x"] == 1500


@pytest.mark.parametrize("lines", ["", "[1]\nnull\n"])
def test_input_of_which_nothing_can_be_answered_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    monkeypatch.setattr("tasks.asking.find_model", lambda *_: Found(Path(), "llama_cpp", SPEC, Path()))
    (tmp_path / "texts.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"--data = '.*texts.jsonl': has no line that can be answered"):
        predict(data=tmp_path / "texts.jsonl")


def test_what_nobody_reads_of_a_small_file_takes_no_memory(tmp_path: Path) -> None:
    more = f', "id": [[]], "more": [{"[]," * 20_000}[]]}}\n'
    path = tmp_path / "mine.jsonl"
    path.write_text((json.dumps(GOOD)[:-1] + more) * 5)
    tracemalloc.start()
    try:
        rows, _ = read_labelled(path, SPEC)
        of_rows = tracemalloc.get_traced_memory()[0]
        texts, _ = read_texts(read_lines("--data", path))
        of_texts = tracemalloc.get_traced_memory()[0] - of_rows
    finally:
        tracemalloc.stop()
    assert [set(row) for row in rows] == [{"line", *GOOD}] * 5 and len(texts[0].fields()["more"]) == 20_001
    assert of_rows < path.stat().st_size / 4 and of_texts < 2 * path.stat().st_size  # their lists take twenty times as much


@pytest.mark.parametrize("read_all", [lambda path: read_labelled(path, SPEC), lambda path: read_texts(read_lines("data", path))])
def test_a_file_of_too_many_lines_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_all: Callable[[Path], Any]) -> None:
    monkeypatch.setattr("tasks.domain.labelled.MOST_LINES", 1000)
    path = tmp_path / "mine.jsonl"
    path.write_text("a\n" * 1000)
    read_all(path)
    path.write_text("\n" * 1001)
    with pytest.raises(UserError, match=r"mine.jsonl': has too many lines. Allowed: at most 1,000 lines. Give several files"):
        read_all(path)


def test_a_slot_with_a_default_need_not_be_labelled(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {"text": "milk", "gold": {"intent": "add_to_cart", "product": "milk"}})
    assert rows[0]["gold"] == {"intent": "add_to_cart", "product": "milk", "quantity": 1}


def test_separators_inside_a_text_do_not_cut_the_line(tmp_path: Path) -> None:
    rows, bad = read(tmp_path, {**GOOD, "text": "2\u2028milk\x85please"})
    assert rows[0]["text"] == "2\u2028milk\x85please" and not bad


def test_only_the_fields_to_score_count(tmp_path: Path) -> None:
    answer = '{"intent":"add_to_cart","product":"milk","quantity":3}'
    rows, _ = read(tmp_path, GOOD, {**GOOD, "score": ["intent", "product"]}, {**GOOD, "score": ["quantity"]})
    result = score(rows, [answer] * 3, SPEC)
    assert result["correct"] == [False, True, False]
    assert [item["wrong"] for item in wrong_answers(rows, [answer] * 3, SPEC)] == [["quantity"], ["quantity"]]


def test_what_is_not_to_be_scored_counts_in_no_figure(tmp_path: Path) -> None:
    labelled = {"text": "red shoes, two", "gold": {"intent": "add_to_cart"}}  # its quantity is the default, and its product not labelled
    rows, _ = read(tmp_path, {**labelled, "score": ["intent"]}, {**GOOD, "score": ["product"]})
    result = score(rows, ['{"intent":"add_to_cart","product":"red shoes","quantity":2}', '{"intent":"view_cart"}'], SPEC)
    assert result["intent_accuracy"] == 1 and result["confusion"] == {"add_to_cart": {"add_to_cart": 1}}
    assert {name: (part["value"], part["n"]) for name, part in result["by_slot"].items()} == {"product": (0, 1)}
    assert result["slot_f1"]["product"] == 0 and result["slot_f1"]["quantity"] is None


def test_columns_of_ones_own_are_kept_and_those_of_an_earlier_answer_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(asked: list[Any], *_: int) -> Iterator[Any]:
        yield from (
            SimpleNamespace(index=index, text='{"intent":"view_cart"}', total_s=0.1, prompt_tokens=3) for index in range(len(asked))
        )

    monkeypatch.setattr("tasks.asking.find_model", lambda *_: Found(Path(), "llama_cpp", SPEC, Path()))
    monkeypatch.setattr("tasks.runtimes.load", lambda *_: SimpleNamespace(generate=generate, encode=lambda _: []))
    lines = [{"text": "one", "problem": "late delivery"}, {"text": "two", "answer": None, "problem": "no_json", "output": "?"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    predict(data=tmp_path / "texts.jsonl")
    answer = {"answer": {"intent": "view_cart"}}
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{**lines[0], **answer}, {"text": "two", **answer}]


@pytest.mark.parametrize("terminal", [False, True])
def test_how_far_answers_are_is_shown_beside_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    def generate(asked: list[Any], *_: int) -> Iterator[Any]:
        for index in range(len(asked)):
            yield SimpleNamespace(index=index, text='{"intent":"view_cart"}', total_s=0.1, prompt_tokens=3)

    monkeypatch.setattr("tasks.asking.find_model", lambda *_: Found(Path(), "llama_cpp", SPEC, Path()))
    monkeypatch.setattr("tasks.runtimes.load", lambda *_: SimpleNamespace(generate=generate, encode=lambda _: []))
    monkeypatch.setattr("tasks.core.display.PLAIN_INTERVAL_S", 0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    predict(["one", "two", "three"])
    said = capsys.readouterr()
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["one", "two", "three"]
    assert "ask recommended" in said.err and "3/3" in said.err and "answers" in said.err
    assert progress._listener is progress._nobody
    monkeypatch.setattr("tasks.core.display.PLAIN_INTERVAL_S", 15)
    predict(["one"])
    assert terminal or not capsys.readouterr().err  # of what is quick, nothing but a bar


def test_answers_are_counted_by_slot_source_and_confusion(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, {**GOOD, "source": "chat"}, {**GOOD, "source": "mail"}, {"text": "?", "gold": {"intent": "view_cart"}})
    answers = ['{"intent":"add_to_cart","product":"milk"}', "none of it", '{"intent":"search_product","product":"?"}']
    result = score(rows, answers, SPEC)
    assert result["by_slot"]["product"] == pytest.approx({"value": 1 / 3, "low": 0.0615, "high": 0.7923, "n": 3}, abs=1e-3)
    assert result["by_slot"]["quantity"]["n"] == 2 and "order_id" not in result["by_slot"]
    assert result["slot_f1"]["product"] == 0.5  # one of four values that either has is in both
    assert {name: (part["value"], part["n"]) for name, part in result["by_source"].items()} == {"chat": (0, 1), "mail": (0, 1), "?": (0, 1)}
    assert result["confusion"] == {"add_to_cart": {"add_to_cart": 1, "unparseable": 1}, "view_cart": {"search_product": 1}}
    worst = wrong_answers(rows, answers, SPEC)
    assert [item["line"] for item in worst] == [2, 3, 1] and worst[0]["problem"] == "no_json" and worst[0]["source"] == "mail"


@pytest.mark.parametrize("content", ["no weights", "a template that is none", "an architecture nobody knows"])
def test_what_a_runtime_refuses_is_one_error(tiny_gguf: Path, tmp_path: Path, content: str) -> None:
    file, good = tmp_path / "mine.gguf", tiny_gguf.read_bytes()
    changes = {"a template that is none": (b"{% for", b"{% fro"), "an architecture nobody knows": (b"llama", b"lllll")}
    file.write_bytes(good.replace(*changes[content]) if content in changes else good[: len(good) // 2])
    with pytest.raises(UserError, match=r"model = '.*mine\.gguf': cannot be asked with llama_cpp \(.+\)\. See that it is whole"):
        ask(Found(file, "llama_cpp", SPEC, SPEC.path), ["2 milk"]).__enter__()


def test_a_folder_that_holds_no_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        find_model(load_settings(), str(tmp_path))


def test_a_folder_does_not_stand_for_the_champion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "champion").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no report"):
        find_model(load_settings(), "champion")


@pytest.mark.slow
def test_a_model_nobody_knows_is_named_before_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    with pytest.raises(
        UserError, match=r"model = 'foo': is no model .* no run yet .*Allowed: a \.gguf file, .*openai/gpt-4\.1\. Run `cart"
    ):
        find_model(load_settings(), "foo")


def test_a_damaged_report_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARTWRIGHT_HOME", str(tmp_path))
    file = tmp_path / "reports" / "latest" / "report.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"variants": [')
    with pytest.raises(UserError, match=r"has a damaged report .*Run `cartwright run` again"):
        find_model(load_settings(), "champion")
