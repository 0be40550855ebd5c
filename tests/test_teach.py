"""The stage `teach` against a server on loopback that misbehaves, is killed, and costs money."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import api
from tasks.config import load_config, resolve
from tasks.core.manifests import Manifest
from tasks.core.settings import TEACHER_KEY
from tasks.domain.errors import UserError
from tasks.evaluate_api import EvaluateApiConfig
from tasks.evaluate_api import check as check_apis
from tasks.synthesize import read_rows, synthesize
from tasks.teach import TeacherConfig, check_teacher, teach, teach_config
from tasks.teaching.asking import FAILURES_IN_A_ROW
from tests.conftest import REPOSITORY
from tests.fault_server import KEY, Faults
from tests.lessons import DATA, TEACHER, holding, lesson, log_of


def test_lessons_are_checked_counted_and_bought_once(server: Faults, ask: Callable[..., Manifest], home: Path) -> None:
    three = threading.Barrier(3)

    def answer(body: dict[str, Any]) -> str:
        if 2 <= len(server.requests) <= 4 and not three.broken:  # the first goes alone; then three come at once, or nobody passes
            three.wait(30)
        return lesson(body)

    server.answer = answer
    taught = ask(concurrency=3)
    figures = taught.metrics
    assert (figures["model"], figures["requests"], figures["requests_from_log"], figures["tokens"]) == ("openai/m", 8, 0, 120)
    assert figures["usd"] is None and "price" in figures["usd_reason"] and figures["stopped"] is None
    assert figures["prompt_version"] >= 1
    folder = home / "store" / "teach" / taught.key
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("patterns", "products", "utterances", "rejected")}
    assert figures["accepted"] == {kind: len(rows[kind]) for kind in ("patterns", "products", "utterances")}
    assert all(rows[kind] for kind in rows)
    assert figures["rejected"] == Counter(row["reason"] for row in rows["rejected"])
    assert {"refusal", "wrong_language"} <= set(figures["rejected"])
    assert all(row["item"] for row in rows["rejected"])
    assert all("response_format" in body and body["temperature"] == 1.0 for body in server.requests)
    assert server.most_at_once == 3
    assert {row["source"] for row in rows["utterances"]} <= {entry["hash"] for entry in log_of(home)}

    def data_set(name: str) -> dict[str, str]:
        (made := home / name).mkdir()
        synthesize.function(DATA, {"teacher": folder}, made)
        return {path.name: path.read_text(encoding="utf-8") for path in made.iterdir()}

    first = data_set("first")
    again = ask(concurrency=1)  # the artefact is there
    assert again.key == taught.key and len(server.requests) == 8
    for path in folder.iterdir():
        path.unlink()
    rebuilt = ask()  # it is gone, and the log is not
    assert rebuilt.digest == taught.digest and len(server.requests) == 8 and rebuilt.metrics["requests_from_log"] == 8
    assert data_set("second") == first  # and nothing that is made from it is made anew
    more = ask(requests=10)
    assert more.metrics["requests_from_log"] == 8 and len(server.requests) == 10


@pytest.mark.parametrize("fault", ["429", "500", "drop", "half", "wrong", "nothing", "slow", "drip"])
def test_what_may_pass_is_asked_again(server: Faults, ask: Callable[..., Manifest], fault: str) -> None:
    server.answer, server.faults, server.retry_after = lesson, ["", fault], "0"
    taught = ask(requests=2, timeout_s=1)
    assert taught.metrics["requests"] == 2 and len(server.requests) == 3
    assert server.requests[1] == server.requests[2]


@pytest.mark.parametrize(
    ("said", "reason"),
    [('{"items": [{"message": "hello"}]}', "wrong_schema"), ('{"items": [{"te', "not_json"), ("", "empty_answer"), ("I'm sorry, but I can't help with that.", "refusal")],
)  # fmt: skip
def test_an_answer_that_cannot_be_used_is_kept_with_its_reason_and_not_bought_again(
    server: Faults, ask: Callable[..., Manifest], home: Path, said: str, reason: str
) -> None:
    server.answer = said
    taught = ask(requests=3)
    assert taught.metrics["rejected"] == {reason: 3} and taught.metrics["requests"] == 3
    assert len(read_rows(home / "store" / "teach" / taught.key / "rejected.jsonl")) == 3
    assert ask(requests=4).metrics["requests_from_log"] == 3 and len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_server_without_schemas_is_asked_in_words(server: Faults, ask: Callable[..., Manifest], status: int) -> None:
    server.answer, server.faults = lesson, [f"no_format_{status}"] * 100
    taught = ask(requests=4)
    assert taught.metrics["requests"] == 4 and taught.metrics["accepted"]["utterances"] > 0
    schemas = ["response_format" in body for body in server.requests]
    assert schemas == [True] * (len(schemas) - 4) + [False] * 4 and len(schemas) <= 6  # LiteLLM asks twice after a 422


def test_a_refused_key_is_one_request_and_one_message(server: Faults, ask: Callable[..., Manifest], home: Path) -> None:
    server.faults = ["401"] * 50
    with pytest.raises(UserError, match=r"data.teacher.*refuses the key.*environment") as caught:
        ask(concurrency=4, isolated=True)
    assert len(server.requests) == 1 and KEY not in str(caught.value)
    assert not holding(home, KEY) and not holding(home, KEY[3:])


def test_a_request_that_is_moderated_is_one_that_is_not_answered(server: Faults, ask: Callable[..., Manifest]) -> None:
    server.answer, server.faults = lesson, ["", "moderated"]
    figures = ask(requests=3, concurrency=1).metrics
    assert figures["requests"] == 2 and figures["rejected"]["no_answer"] == 1 and len(server.requests) == 3
    server.faults = ["moderated"]  # it always will be
    figures = ask(requests=5, concurrency=1).metrics
    assert figures["requests"] == 4 and figures["rejected"]["no_answer"] == 1 and len(server.requests) == 6
    server.faults = ["moderated"] * 50  # the key was taken back
    with pytest.raises(UserError, match="refuses the key"):
        ask(requests=9)
    assert len(server.requests) == 6 + FAILURES_IN_A_ROW


def test_a_teacher_that_is_not_there_is_one_message(
    ask: Callable[..., Manifest], server: Faults, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "FIRST_WAIT_S", 0.01)
    server.answer, server.faults, server.retry_after = lesson, ["", "", *["500"] * 100], "0"
    with pytest.raises(UserError, match=r"does not answer.*teacher.api_base.*same command again"):
        ask()
    assert len(log_of(home)) == 2  # what was paid for is kept
    server.faults.clear()
    assert ask().metrics["requests_from_log"] == 2
    assert len({json.dumps(body) for body in server.requests}) == 8
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="does not answer"):
        ask(requests=9)


@pytest.mark.fast
def test_of_a_domain_that_changed_after_the_run_began_nothing_is_asked(server: Faults, ask: Callable[..., Manifest], home: Path) -> None:
    changed = DATA.model_copy(update={"domain_sha256": "ab" * 32})
    with pytest.raises(UserError, match=r"data\.domain = 'ecommerce': has changed since the run began"):
        ask(changed)
    assert not server.requests and not list((home / "store" / "teach").glob("*/manifest.json"))


def test_one_request_without_an_answer_does_not_stop_the_others(server: Faults, ask: Callable[..., Manifest]) -> None:
    server.answer, server.faults, server.retry_after = lesson, ["", *["503"] * 6], "0"
    figures = ask().metrics
    assert figures["requests"] == 7 and figures["rejected"]["no_answer"] == 1


def test_one_that_never_gets_an_answer_does_not_stop_those_that_are_asked_for_later(
    server: Faults, ask: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    server.answer, server.faults = lesson, ["", "503"]
    assert ask(requests=3, concurrency=1).metrics["requests"] == 2
    server.faults = ["503"]
    figures = ask(requests=5, concurrency=1).metrics
    assert figures["requests"] == 4 and figures["rejected"]["no_answer"] == 1


def test_a_request_that_content_policy_forbids_fails_alone(server: Faults, ask: Callable[..., Manifest]) -> None:
    server.answer, server.faults = lesson, ["refuse"]
    figures = ask(requests=4).metrics
    assert figures["requests"] == 3 and figures["rejected"]["no_answer"] == 1 and len(server.requests) == 4


@pytest.mark.parametrize(("budget", "bought"), [({"max_requests": 3}, 3), ({"max_tokens": 80}, 5), ({"max_usd": 0.00013}, 2)])
def test_a_budget_stops_cleanly_and_says_so(
    server: Faults, ask: Callable[..., Manifest], home: Path, budget: dict[str, float], bought: int
) -> None:
    server.answer = lesson
    priced = DATA.model_copy(update={"teacher": "openai/gpt-4.1"})  # 60 millionths of a dollar an answer
    figures = ask(priced, concurrency=4, **budget).metrics
    assert figures["requests"] == len(server.requests) == bought
    assert figures["stopped"] and next(iter(budget)) in figures["stopped"]
    assert figures["usd"] == pytest.approx(bought * 60e-6) and len(log_of(home)) == bought
    larger = ask(priced, concurrency=4, **{name: 2 * value for name, value in budget.items()}).metrics
    assert larger["requests_from_log"] == bought and larger["requests"] == len(server.requests) > bought


@pytest.mark.parametrize("fault", ["slow", "half"])
@pytest.mark.parametrize("budget", [{"max_requests": 3}, {"max_tokens": 50}, {"max_usd": 0.00019}])
def test_an_attempt_whose_answer_was_lost_may_have_been_paid_for(
    server: Faults, ask: Callable[..., Manifest], budget: dict[str, float], fault: str
) -> None:
    server.answer, server.faults = lesson, ["", fault]
    figures = ask(DATA.model_copy(update={"teacher": "openai/gpt-4.1"}), timeout_s=1, **budget).metrics
    assert figures["requests"] == 2 and len(server.requests) == 3 and next(iter(budget)) in figures["stopped"]
    assert figures["tokens"] == 30 and figures["usd"] == pytest.approx(120e-6)  # of the answers that came


CHILD = """
import sys, pathlib
from tasks.teach import TeachConfig, teach
teach.function(TeachConfig.model_validate_json(sys.argv[1]), {}, pathlib.Path(sys.argv[2]))
"""


def test_killed_in_the_middle_it_buys_nothing_twice(server: Faults, ask: Callable[..., Manifest], home: Path, tmp_path: Path) -> None:
    answered: list[str] = []

    def answer(body: dict[str, Any]) -> str:
        answered.append(json.dumps(body))
        if len(answered) == 4:
            server.open.clear()  # what comes after this answer waits
        return lesson(body)

    server.answer = answer
    config = teach_config(DATA, TEACHER)
    process = subprocess.Popen([sys.executable, "-c", CHILD, config.model_dump_json(), str(tmp_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while len(log_of(home)) < 4 or len(server.requests) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    bought = answered[:4]
    server.faults, server.answer = ["drop"], lesson  # the fifth was never answered
    server.open.set()
    while server.at_once:
        time.sleep(0.02)
    log = home / "teacher" / "answers.jsonl"
    with log.open("a") as file:
        file.write('{"hash": "torn')
    before = len(server.requests)
    figures = ask().metrics
    assert figures["requests_from_log"] == 4 and figures["requests"] == 8
    assert not {json.dumps(body) for body in server.requests[before:]} & set(bought)
    assert len(server.requests) - before <= 5  # the four that were left, one of which met the fault


def test_a_key_never_reaches_a_file(server: Faults, ask: Callable[..., Manifest], home: Path) -> None:
    server.answer = lambda body: json.dumps({"items": [{"text": f"my key is {KEY} and {server.keys[-1]}"}]})
    server.faults = ["", "429", "500"]
    server.retry_after = "0"
    ask(requests=4, isolated=True)
    assert server.keys[0] == f"Bearer {KEY}"
    assert log_of(home) and not holding(home, KEY)
    assert holding(home, "my key is ***")


def test_a_key_whose_line_break_came_with_it_is_sent_without(
    server: Faults, ask: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEACHER_KEY, "planted-in-a-block\n")
    ask(requests=1)
    assert server.keys == ["Bearer planted-in-a-block"]


def test_a_key_that_litellm_finds_by_another_name_is_the_one_that_is_sent(
    server: Faults, ask: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOGETHER_API_KEY", KEY)
    data = DATA.model_copy(update={"teacher": "together_ai/m"})
    ask(data, requests=1, api_base=f"http://127.0.0.1:{server.server_port}/v1")
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.fast
@pytest.mark.slow
@pytest.mark.parametrize("model", ["ollama/m", "azure/m", "vertex_ai/m", "bedrock/m", "together_ai/m", "huggingface/m", "perplexity/m"])
def test_where_a_key_may_come_from_elsewhere_the_first_request_decides(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    check_teacher(DATA.model_copy(update={"teacher": model}), TeacherConfig())
    check_apis([EvaluateApiConfig(model=model)])


@pytest.mark.fast
@pytest.mark.slow
def test_what_is_wrong_with_a_teacher_is_said_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="no model that LiteLLM knows"):
        resolve(load_config("smoke", {"data.teacher": "nonsense"}))
    with pytest.raises(UserError, match=r"OPENAI_API_KEY.*secret_block"):
        resolve(load_config("smoke", {"data.teacher": "openai/gpt-4.1"}))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    check_teacher(DATA.model_copy(update={"teacher": "openai/gpt-4.1"}), TeacherConfig(max_usd=1))
    with pytest.raises(UserError, match=r"teacher.max_usd = 1.0.*price of openai/m is unknown.*max_tokens or teacher.max_requests"):
        check_teacher(DATA, TeacherConfig(max_usd=1))
    for address in ("http://me:secret@host/v1", "host:80", "http://host/v1?key=abc"):
        with pytest.raises(UserError, match=r"teacher\.api_base") as refused:
            load_config("smoke", {"teacher.api_base": address})
        assert "secret" not in str(refused.value).partition(" must ")[0] and "abc" not in str(refused.value)
    with pytest.raises(UserError, match=r"teacher.max_tokns.*unknown field.*max_tokens"):
        load_config("smoke", {"teacher.max_tokns": 5})


@pytest.mark.fast
def test_the_key_depends_on_what_is_asked_and_not_on_how_it_is_reached() -> None:
    key = teach.key(teach_config(DATA, TEACHER), {})
    for same in ({"concurrency": 9}, {"timeout_s": 1}, {"api_base": "http://127.0.0.1:1/v1"}, {"secret_block": "x"}):
        assert teach.key(teach_config(DATA, TEACHER.model_copy(update=same)), {}) == key
    for other in ({"requests": 9}, {"temperature": 0.5}, {"max_tokens": 7}):
        assert teach.key(teach_config(DATA, TEACHER.model_copy(update=other)), {}) != key
    for other in ({"teacher": "openai/n"}, {"domain_sha256": "b"}, {"languages": ("en",)}):
        assert teach.key(teach_config(DATA.model_copy(update=other), TEACHER), {}) != key
    newer = teach_config(DATA, TEACHER).model_copy(update={"prompt_version": 99})
    assert teach.key(newer, {}) != key
