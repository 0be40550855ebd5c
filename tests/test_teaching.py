"""What a teacher's answers go through: the plan, the log, and the validators."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.domain.bank import Bank, load_bank
from tasks.domain.spec import load_spec
from tasks.domain.utterances import split_patterns, split_products
from tasks.teaching.answers import is_refusal, items_of
from tasks.teaching.asking import Budget, Request
from tasks.teaching.log import Answer, AnswerLog
from tasks.teaching.plan import make_plan
from tasks.teaching.prompts import REGISTERS

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")
BANKS = {language: load_bank(SPEC, language) for language in ("en", "de", "hr")}
REQUEST = Request("utterances", "en", "view_cart", "plain", (), {"max_tokens": 100}, "m", 1)
ANSWER = Answer("{}", 10, 5, 0.01, 0.1)


def plan(requests: int, items: int = 10, banks: dict[str, Bank] = BANKS) -> list[Request]:
    return make_plan(SPEC, banks, list(SPEC.intents), "openai/m", requests, items, 1.0)


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_request_is_another_and_a_longer_plan_begins_like_a_shorter_one() -> None:
    long, short = plan(400), plan(50)
    assert len({request.hash for request in long}) == 400
    assert [request.hash for request in long[:50]] == [request.hash for request in short]
    assert {request.register for request in long} == {"", *REGISTERS}
    cells = {(request.language, request.topic) for request in long if request.kind == "utterances"}
    assert cells == {(language, intent) for language in BANKS for intent in SPEC.intents}


@pytest.mark.slow
def test_a_teacher_is_shown_nothing_that_evaluation_holds_out() -> None:
    shown = {(r.language, r.kind): "" for r in plan(1)}
    for request in plan(300):
        shown[request.language, request.kind] = shown.get((request.language, request.kind), "") + request.messages[1]["content"]
    for language, bank in BANKS.items():
        text = shown[language, "patterns"]
        hard = [p.text for patterns in bank.patterns.values() for p in split_patterns(patterns)["hard"]]
        train = [p.text for patterns in bank.patterns.values() for p in split_patterns(patterns)["train"]]
        assert not [pattern for pattern in hard if json.dumps({"pattern": pattern}, ensure_ascii=False) in text]
        assert [pattern for pattern in train if json.dumps({"pattern": pattern}, ensure_ascii=False) in text]
        parts = split_products(bank.products, SPEC)
        held_out = {product.name for split in ("validation", "test", "hard") for product in parts[split]}
        named = {name for line in shown[language, "utterances"].splitlines() if "such as: " in line for name in
                 line.partition("such as: ")[2].partition('. "product"')[0].split("; ")}  # fmt: skip
        assert len(named) > 20 and not named & held_out


def test_a_request_says_language_manner_and_schema() -> None:
    request = next(r for r in plan(100) if r.kind == "utterances" and r.topic == "update_quantity" and r.register)
    text = request.messages[1]["content"]
    assert f"Language: {request.language}" in text and REGISTERS[request.register] in text
    schema = request.parameters["response_format"]["json_schema"]["schema"]["properties"]["items"]["items"]
    assert schema["required"] == ["text", "product", "quantity"] and schema["properties"]["quantity"]["type"] == ["integer", "null"]


# --- the log -----------------------------------------------------------------------------------------------------


def test_an_answer_is_there_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "teacher" / "answers.jsonl"
    with AnswerLog(path, {"a", "b", "c"}) as log:
        log.add("a", ANSWER, {"kind": "utterances"})
        log.add("b", ANSWER, {})
    path.write_bytes(path.read_bytes()[:-20])  # killed in the middle of a line
    with AnswerLog(path, {"a", "b", "c"}) as log:
        assert log.get("a") == ANSWER and log.get("b") is None
        log.add("c", ANSWER, {})
    with AnswerLog(path, {"a", "b", "c"}) as log:
        assert log.get("a") == log.get("c") == ANSWER and log.get("b") is None
    with AnswerLog(path, {"z"}) as log:
        assert log.get("a") is None  # not of this run: not held in memory, still in the file
    assert len(path.read_text().splitlines()) == 3


def test_a_log_that_is_no_text_loses_only_its_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"a"}) as log:
        log.add("a", Answer("žuč ü", 1, 1, None, 0.0), {})
    path.write_bytes(b'\xff\xfe\x00\n{"hash": "a"}\n[]\n"a"\n' + path.read_bytes())
    with AnswerLog(path, {"a"}) as log:
        found = log.get("a")
    assert found and found.text == "žuč ü" and found.usd is None


def test_an_answer_that_was_changed_in_the_log_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"a", "b"}) as log:
        log.add("a", Answer("red shoes", 1, 1, None, 0.1), {})
        log.add("b", ANSWER, {})
    path.write_bytes(path.read_bytes().replace(b"red shoes", b"rad shoes"))
    with AnswerLog(path, {"a", "b"}) as log:
        assert log.get("a") is None and log.get("b") == ANSWER


def test_a_log_that_forgets_leaves_the_whole_lines_of_others(tmp_path: Path) -> None:
    """Lines end where JSON's do: U+2028 and U+0085 may stand in a text, and one answer may name another's request."""
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"a", "b"}) as log:
        log.add("a", Answer("red\u2028shoes\x85", 1, 1, None, 0.1), {})
        log.add("b", Answer("says a", 1, 1, None, 0.1), {})
    _, others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes() + b'{"hash": "a", "te\xff')
    with AnswerLog(path, {"a"}) as log:
        log.forget()
    assert path.read_bytes() == others
    with AnswerLog(path, {"b"}) as log:
        log.forget()
    assert not list(tmp_path.iterdir())


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    names = [str(i) for i in range(40)]
    with AnswerLog(path, names) as log:
        threads = [threading.Thread(target=log.add, args=(name, Answer(name * 5000, 1, 1, None, 0.0), {})) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(json.loads(line)["hash"] for line in path.read_text().splitlines()) == sorted(names)


def test_a_budget_expects_of_an_awaited_answer_what_the_dearest_cost() -> None:
    short, long = (replace(REQUEST, parameters={"max_tokens": most}) for most in (100, 200))
    budget = Budget(max_tokens=100)
    assert budget.limit((), long) is None
    budget.spend(Answer("", 20, 10, None, 0.0), short)
    budget.spend(Answer("", 10, 10, None, 0.0), short)
    assert budget.limit((), short) is None and "max_tokens = 100" in str(budget.limit([short], short))
    assert "max_tokens = 100" in str(budget.limit((), long))  # it may answer twice as much
    assert "max_requests" in str(Budget(max_requests=2).limit([short] * 2, short)) and Budget(max_requests=2).limit([short], short) is None
    dollars = Budget(max_usd=0.025)
    dollars.spend(ANSWER, short)
    assert dollars.limit((), short) is None
    dollars.spend(ANSWER, short)
    assert "0.0200 dollars spent" in str(dollars.limit((), short))


# --- reading answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items", "problem"),
    [
        ('{"items": [{"text": "a"}]}', [{"text": "a"}], None),
        ('Here you are:\n```json\n{"items": [{"text": "a"}]}\n```', [{"text": "a"}], None),
        ('[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}], None),
        ('{"items": [{"text": "a"}, {"text": "b"}, {"te', [{"text": "a"}, {"text": "b"}], "cut_off"),
        ('{"items": [{"te', [], "not_json"),
        ('{"things": []}', [], "wrong_schema"),
        ('{"items": {"text": "a"}}', [], "wrong_schema"),
        ("  ", [], "empty_answer"),
        ("I'm sorry, but I can't help with that.", [], "refusal"),
        ("Als KI-Sprachmodell kann ich das nicht.", [], "refusal"),
        ("Sure! One is: add milk", [], "not_json"),
    ],
)
def test_items_are_read_as_far_as_they_go(text: str, items: list[Any], problem: str | None) -> None:
    assert items_of(text) == (items, problem)


def test_customers_are_not_taken_for_models() -> None:
    """No line that a phrase bank holds is a refusal."""
    assert not [p.text for bank in BANKS.values() for patterns in bank.patterns.values() for p in patterns if is_refusal(p.text)]
    assert not is_refusal("I can't find the blue one") and is_refusal("I can’t assist with that request.")
