"""Models behind an API: a real server on loopback that misbehaves on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.api import ATTEMPTS, LONGEST_ANSWER, ApiError, _usd, complete
from tasks.asking import Asked, Found, ask, find_model
from tasks.core import settings
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.runtimes.litellm import LiteLlmRuntime
from tasks.teaching.log import Answer, AnswerLog
from tests.fault_server import KEY, Faults

ASK = [{"role": "user", "content": "2 milk"}]


def test_an_answer_comes_with_what_it_cost(server: Faults) -> None:
    reply = complete("openai/gpt-4.1", ASK, 32)
    assert reply.text == server.answer and (reply.prompt_tokens, reply.completion_tokens) == (10, 5)
    assert reply.usd and reply.usd > 0 and reply.seconds > 0
    assert complete("openai/of-our-own", ASK, 32).usd is None


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop"])
def test_what_may_pass_is_tried_again(server: Faults, fault: str) -> None:
    server.faults = [fault, fault]
    pauses: list[float] = []
    assert complete("openai/m", ASK, 32, sleep=pauses.append).text == server.answer
    assert len(server.requests) == 3 and len(pauses) == 2
    if fault == "429":
        assert pauses == [7.0, 7.0]  # what the server named


def test_a_server_that_asks_for_minutes_gets_them_and_one_that_asks_for_an_hour_is_left_alone(server: Faults) -> None:
    server.faults, server.retry_after = ["429"], "300"
    pauses: list[float] = []
    assert complete("openai/m", ASK, 32, sleep=pauses.append).text == server.answer and pauses == [300.0]
    server.faults, server.retry_after = ["429"], "3600"
    with pytest.raises(ApiError, match="left alone for 3600 s"):
        complete("openai/m", ASK, 32, sleep=pauses.append)
    assert len(server.requests) == 3 and len(pauses) == 1


def test_an_answer_whose_tokens_the_server_does_not_count_costs_what_they_do(server: Faults) -> None:
    server.usage = None
    server.answer = "milk " * 200
    reply = complete("openai/gpt-4.1", ASK, 1024)
    assert 5 < reply.prompt_tokens < 20 and 150 < reply.completion_tokens < 500
    assert reply.usd == pytest.approx(reply.prompt_tokens * 2e-6 + reply.completion_tokens * 8e-6)
    assert complete("openai/of-our-own", ASK, 32).usd is None


@pytest.mark.parametrize(("asked", "answered"), [(-5, 3), (10, -900), (10, 10**400)])
def test_tokens_that_cannot_be_are_counted_here_and_the_answer_is_not_bought_again(
    server: Faults, asked: int, answered: int, tmp_path: Path
) -> None:
    server.usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
    reply = complete("openai/gpt-4.1", ASK, 32)
    assert 5 < reply.prompt_tokens < 20 and 5 < reply.completion_tokens < 40
    assert reply.usd == pytest.approx(reply.prompt_tokens * 2e-6 + reply.completion_tokens * 8e-6)
    answer = Answer(reply.text, reply.prompt_tokens, reply.completion_tokens, reply.usd, reply.seconds)
    with AnswerLog(tmp_path / "answers.jsonl", {"a"}) as log:
        log.add("a", answer, {})
    with AnswerLog(tmp_path / "answers.jsonl", {"a"}) as log:
        assert log.get("a") == answer


@pytest.mark.parametrize(("price", "usd"), [(-0.5, 0.0), (float("nan"), None), (float("inf"), None), (0.25, 0.25)])
def test_an_answer_never_lowers_what_was_spent(price: float, usd: float | None) -> None:
    assert _usd(lambda: price) == usd


def test_an_answer_is_kept_without_keys_and_within_bounds(server: Faults) -> None:
    server.answer = f"You asked with {KEY}. " + "milk " * LONGEST_ANSWER
    (done,) = LiteLlmRuntime("openai/m").generate([ASK], 32, 1)
    assert done.text.startswith("You asked with ***. milk") and len(done.text) == LONGEST_ANSWER
    assert complete("openai/m", ASK, 32).text == done.text


def test_what_only_looks_like_a_key_stays_in_an_answer(server: Faults) -> None:
    for product in ("rk-482913", "sk-1234-56", "sk_winter24", "Ring Bearer Pillow", "https://shop.test/a@b"):
        server.answer = json.dumps({"intent": "add_to_cart", "product": product})
        assert complete("openai/m", ASK, 32).text == server.answer


def test_attempts_end(server: Faults) -> None:
    server.faults = ["500"] * 20
    with pytest.raises(ApiError, match=f"no answer in {ATTEMPTS} attempts"):
        complete("openai/m", ASK, 32, sleep=lambda _: None)
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_an_attempt_whose_time_ran_out_is_made_once_more(server: Faults, fault: str) -> None:
    server.faults, late = [fault] * 3, list[str]()
    with pytest.raises(ApiError, match="no answer in time in 2 attempts"):
        complete("openai/m", ASK, 32, sleep=lambda _: None, timeout_s=0.5, lost=lambda: late.append("late"))
    assert len(server.requests) == 2 and late == ["late"] * 2


@pytest.mark.parametrize("fault", ["half", "torn", "wrong", "nothing", "odd usage"])
def test_an_answer_that_came_and_cannot_be_read_is_asked_for_once_more(server: Faults, fault: str) -> None:
    server.faults, lost = [fault] * 3, list[str]()
    server.usage = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": "x"}}
    with pytest.raises(ApiError, match="no whole answer in 2 attempts"):
        complete("openai/m", ASK, 32, sleep=lambda _: None, lost=lambda: lost.append("lost"))
    assert len(server.requests) == 2 and lost == ["lost"] * 2


def test_an_answer_without_a_message_was_paid_for_and_is_not_asked_again(server: Faults) -> None:
    server.faults, lost = ["no_choice"], list[str]()
    with pytest.raises(ApiError, match="without a message"):
        complete("openai/m", ASK, 32, lost=lambda: lost.append("lost"))
    assert len(server.requests) == 1 and lost == ["lost"]


@pytest.mark.parametrize("model", ["perplexity/m", "deepinfra/m", "hosted_vllm/m"])
def test_the_key_of_one_provider_is_not_sent_to_another(server: Faults, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(model, ASK, 32, api_base=f"http://127.0.0.1:{server.server_port}/v1")
    assert len(server.keys) == 1 and KEY not in str(server.keys)


@pytest.mark.parametrize("status", ["401", "400", "404"])
def test_what_will_not_pass_is_asked_once_and_no_key_is_shown(server: Faults, status: str) -> None:
    server.faults = [status]
    with pytest.raises(UserError) as caught:
        complete("openai/m", ASK, 32)
    assert len(server.requests) == 1
    assert KEY not in str(caught.value) and "planted" not in str(caught.value)
    assert "openai/m" in str(caught.value)


def test_a_key_with_a_line_break_is_not_shown_by_the_error_that_quotes_it(server: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROQ_API_BASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GROQ_API_KEY", "planted/0123456789\n")
    with pytest.raises(ApiError, match=r"Illegal header value b'Bearer \*\*\*\\n'") as caught:
        complete("groq/m", ASK, 32, sleep=lambda _: None)
    assert "0123456789" not in str(caught.value)


def test_secrets_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh12345")
    assert settings.without_secrets("got abcdefgh12345 and the API key sk-abc*****wxyz.") == "got *** and the API key ***."
    monkeypatch.setenv("MY_SECRET", "pass\u017ee word\n")
    assert settings.without_secrets("b'pass\\xc5\\xbee word\\n', 'pass\u017ee word' and sk_winter24") == "b'***\\n', '***' and ***"
    assert settings.without_known_secrets("pass\u017ee word and sk_winter24") == "*** and sk_winter24"
    told = "no answer from https://ana:p4@ss@mlflow.test/api and http://host/a@b"
    assert settings.without_secrets(told) == "no answer from https://***@mlflow.test/api and http://host/a@b"
    assert settings.shown_uri("https://ana:p4@ss@mlflow.test/api") == "https://***@mlflow.test/api"
    assert settings.shown_uri("s3://ID:s3/cret@bucket/store") == "s3://***@bucket/store"  # keys of S3 have slashes
    assert settings.shown_uri("http://m:5000/team@acme and postgresql://ana@db/x") == "http://m:5000/team@acme and postgresql://***@db/x"
    assert settings.without_secrets("no answer from postgresql://ana:planted/pw#1@db/x") == "no answer from postgresql://***@db/x"
    assert settings.shown_uri("'postgresql://db/x?user=ana&sslPassword=planted&a=b'") == "'postgresql://db/x?user=ana&sslPassword=***&a=b'"


def test_a_model_behind_an_api_is_evaluated_like_any_other(
    server: Faults, tmp_path: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    gold = {"intent": "add_to_cart", "product": "milk", "quantity": 2}
    rows = [{"text": "2 milk", "gold": gold, "language": "en"}, {"text": "bye", "gold": {"intent": "out_of_scope"}, "language": "en"}]
    data, out = tmp_path / "mine.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n", encoding="utf-8")
    server.faults = ["500"]
    done = cartwright("evaluate", "--data", str(data), "--model", "openai/gpt-4.1", "--output", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["exact_match"]["value"] == 0.5 and figures["usd_per_1k_requests"] > 0
    assert figures["confusion"]["out_of_scope"] == {"add_to_cart": 1} and figures["bad_lines"][0]["line"] == 3
    assert "by language" in done.stdout and "'bye'" in done.stdout  # the worst rows
    assert "dollars for 1,000 requests" in done.stdout and "out_of_scope -> add_to_cart" in done.stdout
    assert "Intents and their slots" in server.requests[0]["messages"][0]["content"]  # it was not fine-tuned: the long instructions


def test_an_evaluation_that_was_stopped_buys_no_answer_twice_and_one_that_ended_asks_anew(
    server: Faults, tmp_path: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{n} milk", "gold": {"intent": "view_cart"}}) for n in range(3)), encoding="utf-8")
    command = ("evaluate", "--data", str(data), "--model", "openai/gpt-4.1", "--output", str(tmp_path / "out.json"))
    server.faults = ["", "401", ""]
    stopped = cartwright(*command)
    assert stopped.returncode == 2 and "refuses the key" in stopped.stderr and len(server.requests) == 3
    ended = cartwright(*command)
    assert ended.returncode == 0 and len(server.requests) == 4 and "2 answers are those of an earlier attempt" in ended.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["exact_match"]["n"] == 3 and figures["usd_per_1k_requests"] == pytest.approx(0.06)
    assert not list((home / "api").iterdir())
    assert cartwright(*command).returncode == 0 and len(server.requests) == 7


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
def test_answers_are_bought_once_until_what_was_made_of_them_is_written(
    server: Faults, tmp_path: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{n} milk", "gold": {"intent": "view_cart"}}) for n in range(3)), encoding="utf-8")
    asked = ("--data", str(data), "--model", "openai/gpt-4.1")
    for _ in range(2):
        failed = cartwright("evaluate", *asked, "--output", "/dev/full")
        assert failed.returncode == 2 and "No space left" in failed.stderr and len(server.requests) == 3
    variables = {**os.environ, "CARTWRIGHT_HOME": str(home)}
    for command in ("evaluate", "predict"):
        with Path("/dev/full").open("w") as full:
            line = [sys.executable, "-m", "flows.cli", command, *asked]
            done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=variables, check=False)
        assert done.returncode and "No space left" in done.stderr and len(server.requests) == 3
    done = cartwright("predict", *asked)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3 == len(server.requests)
    assert not list((home / "api").iterdir())


def asked_of(server: Faults, home: Path, *texts: str) -> Asked:
    """Answers of a model behind an API to texts, as `evaluate` and `predict` get them."""
    spec = load_spec("ecommerce")
    with ask(Found("openai/gpt-4.1", "litellm", spec, spec.path, zero_shot=True, answers=home / "api"), list(texts)) as asked:
        return asked


def test_a_text_that_comes_again_is_bought_once(server: Faults, home: Path) -> None:
    server.always = {"rude": "refuse"}
    asked = asked_of(server, home, *["2 milk", "3 milk"] * 3, "rude", "rude")
    assert asked.answers == [server.answer] * 6 + ["", ""] and len(server.requests) == 3
    assert asked.usd_per_1k_requests == pytest.approx(0.06) and len(asked.failed) == 2  # one for each row that counts as wrong


def test_an_answer_that_is_cut_off_before_it_begins_is_paid_for_and_none(server: Faults, home: Path) -> None:
    server.always = {"2 milk": "cut", "4 milk": "401"}
    with pytest.raises(UserError, match="refuses the key"):
        asked_of(server, home, "2 milk", "3 milk", "4 milk")
    server.always = {}
    asked = asked_of(server, home, "2 milk", "3 milk", "4 milk")
    assert len(server.requests) == 4 and asked.answers == ["", server.answer, server.answer]
    assert asked.usd_per_1k_requests == pytest.approx(0.06)
    (problem,) = asked.failed
    assert "cut off at max_tokens = 96" in problem


def test_an_api_variant_is_asked_as_it_was_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = {"model": "openai/m", "api_base": "http://127.0.0.1:9/v1", "max_tokens": 700}
    variant = {"name": "api-m", "format": "api", "role": "api", "model": "openai/m", "few_shot": 2}
    report = {"stages": [{"name": "synthesize", "key": "k"}], "config": {"api": [api]}, "variants": [variant]}
    (home / "report").mkdir(parents=True)
    (home / "store" / "synthesize").mkdir(parents=True)
    (home / "store" / "synthesize" / "k").symlink_to(load_spec("ecommerce").path)
    (home / "report" / "report.json").write_text(json.dumps(report | {"recommendation": {"cpu": ""}}), encoding="utf-8")
    monkeypatch.setattr("tasks.asking.latest_report", lambda _: home / "report")
    found = find_model(settings.load_settings(), "api-m")
    assert (found.path, found.few_shot, found.api_base, found.max_tokens) == ("openai/m", 2, api["api_base"], 700)
    assert find_model(settings.load_settings(), "openai/m").max_tokens == 700
    assert find_model(settings.load_settings(), "openai/n").max_tokens == 256
    (home / "store" / "synthesize" / "k").unlink()
    assert find_model(settings.load_settings(), "openai/n").dataset == load_spec("ecommerce").path  # it is not that run's
    with pytest.raises(UserError, match="the data of the latest run, which says how models are asked, is no longer in"):
        find_model(settings.load_settings(), "api-m")


def test_answers_before_the_money_was_used_up_are_kept(server: Faults, home: Path) -> None:
    server.always = {"4 milk": "400"}
    assert asked_of(server, home, "2 milk", "3 milk", "4 milk").answers == [server.answer, server.answer, ""]
    server.always = {}
    assert asked_of(server, home, "2 milk", "3 milk", "4 milk").answers == [server.answer] * 3
    assert len(server.requests) == 4 and not list((home / "api").iterdir())


def test_a_text_that_is_always_forbidden_ends_no_later_command(server: Faults, home: Path) -> None:
    server.always = {"19 milk": "moderated"}
    texts = [f"{number} milk" for number in range(20)]
    for requests in (20, 21):  # the key may have been refused; then it was the text
        asked = asked_of(server, home, *texts)
        assert asked.answers == [*[server.answer] * 19, ""] and len(asked.failed) == 1 and len(server.requests) == requests
    assert not list((home / "api").iterdir())


def test_a_text_without_an_answer_is_asked_once_more_at_the_end_and_by_the_next_command(
    server: Faults, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.api.ATTEMPTS", 1)
    server.faults = ["", "500"]
    assert asked_of(server, home, "1 milk", "2 milk", "3 milk").answers == [server.answer] * 3
    assert len(server.requests) == 4 and not list((home / "api").iterdir())
    server.requests.clear()
    server.always = {"2 milk": "500"}
    for requests in (4, 6):
        asked = asked_of(server, home, "1 milk", "2 milk", "3 milk")
        assert asked.answers == [server.answer, "", server.answer] and len(asked.failed) == 1 and len(server.requests) == requests


def test_a_model_that_refuses_all_texts_is_one_message(server: Faults, home: Path) -> None:
    server.always = {"gpt-4.1": "too_long"}
    with pytest.raises(UserError, match=r"answered none of 2 requests.*maximum context length"):
        asked_of(server, home, "2 milk", "3 milk")
    assert not list((home / "api").iterdir())


def test_refusals_are_remembered_with_the_answers(server: Faults, home: Path) -> None:
    server.always = {"rude": "refuse", "long": "too_long", "3 milk": "401"}
    with pytest.raises(UserError, match="refuses the key"):
        asked_of(server, home, "2 milk", "rude", "long", "3 milk")
    assert len(server.requests) == 4
    server.always = {}
    asked = asked_of(server, home, "2 milk", "rude", "long", "3 milk")
    assert asked.answers == [server.answer, "", "", server.answer] and len(server.requests) == 5 and len(asked.failed) == 2
    assert asked.usd_per_1k_requests == pytest.approx(0.06) and not list((home / "api").iterdir())


def test_an_interrupted_command_keeps_the_answers_that_were_on_their_way(server: Faults, home: Path) -> None:
    usual, interrupted = str(server.answer), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if len(server.requests) >= 20 and not interrupted.is_set():  # all threads are there, and each has a request
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
        return usual

    server.answer = answer
    texts = [f"{number} milk" for number in range(60)]
    # A shell starts what it runs in the background with interrupts ignored, and Python leaves them so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            asked_of(server, home, *texts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(server.requests) < 60
    assert asked_of(server, home, *texts).answers == [usual] * 60 and len(server.requests) == 60


def test_a_refused_key_is_one_message(server: Faults, tmp_path: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"text": "2 milk", "gold": {"intent": "view_cart"}}), encoding="utf-8")
    server.faults = ["401"] * 5
    done = cartwright("evaluate", "--data", str(data), "--model", "openai/m")
    assert done.returncode == 2 and "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout
    assert "refuses the key" in done.stderr
