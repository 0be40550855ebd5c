"""Serving in this process: answers, limits, malformed requests, and what happens when llama.cpp fails. A real tiny model."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from tasks.core.settings import load_settings
from tasks.domain.errors import UserError
from tasks.runtimes.llama_cpp import LlamaCppRuntime
from tasks.runtimes.sources import Asked
from tasks.serving.app import Service, application
from tasks.serving.champion import Champions
from tasks.serving.config import ServeConfig, check_key, serve_config
from tasks.serving.limits import Limits, Rate
from tasks.serving.messages import LONGEST_CHAT, LONGEST_LIST, ChatRequest, IntentRequest
from tasks.serving.metrics import Metrics

KEY = "a-key-for-a-test-only"
Ask = Callable[..., list[httpx.Response]]
FEW: dict[str, Any] = {
    "parallel": 2,
    "max_waiting": 2,
    "max_tokens": 24,
    "threads": 1,
    "rate": 0.0,
    "max_chars": 300,
    "max_texts": 8,
    "timeout_s": 120.0,
}


@pytest.fixture(scope="module")
def champions(tiny_gguf: Path) -> Iterator[Champions]:
    made = Champions(load_settings(), ServeConfig(gguf=tiny_gguf, **FEW), Metrics())
    yield made
    made.close()


@pytest.fixture
def ask(champions: Champions) -> Ask:
    """Requests to the endpoints, as many at once as are taken; with other limits, and another key, if given."""

    def call(*requests: tuple[str, str, dict[str, Any]], key: str | None = None, **limits: Any) -> list[httpx.Response]:
        config = ServeConfig(**{**FEW, **limits})
        metrics = champions._metrics
        asked = Limits(application(Service(config, champions, metrics)), config, metrics, key)  # type: ignore[arg-type]

        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(asked, raise_app_exceptions=False)  # type: ignore[arg-type]
            at_a_time = asyncio.Semaphore(FEW["parallel"] + FEW["max_waiting"])
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:

                async def answered(method: str, path: str, extra: dict[str, Any]) -> httpx.Response:
                    async with at_a_time:
                        return await client.request(method, path, **extra)

                return await asyncio.gather(*(answered(*request) for request in requests))

        return asyncio.run(all_of_them())

    return call


def post(body: Any, path: str = "/intent", **extra: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", path, {"json": body, **extra}


def counted(ask: Ask, name: str) -> float:
    (page,) = ask(("GET", "/metrics", {}))
    return sum(float(line.rpartition(" ")[2]) for line in page.text.splitlines() if line.startswith(name))


def test_one_text_or_several_are_answered_in_order_and_what_is_no_answer_is_null_with_its_problem(ask: Ask) -> None:
    texts = ["two olive oils please", "where is order 4711", "x"]
    (one,), (several,) = ask(post({"text": texts[0]})), ask(post({"texts": texts}))
    assert one.status_code == several.status_code == 200 and one.json()["version"] == "0" and one.json()["model"] == "shop-intent"
    answers = several.json()["answers"]
    assert len(answers) == 3 and {name: one.json()[name] for name in answers[0]} == answers[0]
    for answer in answers:
        assert (answer["answer"] is None) == bool(answer["problem"]) == isinstance(answer["output"], str)
    (cut,) = ask(post({"text": texts[0]}), max_tokens=1)
    assert cut.status_code == 200 and cut.json()["answer"] is None and cut.json()["problem"] == "cut"
    assert counted(ask, 'cartwright_parse_failures_total{problem="cut"}') >= 1
    for more in ({}, {"stream": True}):  # half an answer is not given to who expects one
        (chat,) = ask(
            (
                "POST",
                "/v1/chat/completions",
                {"json": {"model": "shop-intent", "messages": [{"role": "user", "content": texts[0]}], **more}},
            ),
            max_tokens=1,
        )
        assert chat.status_code == 200 and '"finish_reason":"length"' in chat.text
        assert '"content":"a' not in chat.text and (more or chat.json()["choices"][0]["message"]["content"] is None), chat.text


def test_every_limit_is_an_error_that_says_so(ask: Ask) -> None:
    def refused(response: httpx.Response) -> tuple[int, str]:
        return response.status_code, response.json()["error"]["code"]

    cases: list[tuple[tuple[str, str, dict[str, Any]], dict[str, Any], tuple[int, str]]] = [
        (post({"text": "x" * 301}), {}, (422, "text_too_long")),
        (post({"text": "😀" * 300}), {}, (422, "text_too_long")),  # few characters, many tokens
        (post({"texts": ["x"] * 9}), {}, (422, "too_many_texts")),
        (post({"texts": ["x"] * (LONGEST_LIST + 1)}), {}, (422, "too_many_texts")),
        (post({"model": "m", "messages": [{"role": "user"}] * (LONGEST_CHAT + 1)}, "/v1/chat/completions"), {}, (422, "invalid_field")),
        (post({"text": "x" * 100}), {"max_body": 64}, (413, "body_too_large")),
        (("POST", "/intent", {"content": _chunks(b"x" * 40, 3)}), {"max_body": 64}, (413, "body_too_large")),
        (post({"texts": ["x"] * 5}), {}, (422, "too_many_texts")),  # two are answered and two may wait: five never could
        (post({"texts": ["x"] * 4}), {"timeout_s": 1e-6}, (504, "timeout")),
        (("POST", "/intent", {"content": _never()}), {"timeout_s": 0.05}, (408, "timeout")),
        (post({"text": "x"}), {"key": KEY}, (401, "invalid_api_key")),
        (post({"text": "x"}, headers={"Authorization": f"Bearer {KEY}x"}), {"key": KEY}, (401, "invalid_api_key")),
        (("GET", "/metrics", {}), {"key": KEY}, (401, "invalid_api_key")),
    ]
    for request, limits, expected in cases:
        (response,) = ask(request, **limits)
        assert refused(response) == expected, response.text
        assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    one, other = sorted(ask(*[post({"texts": ["x"] * 4})] * 2), key=lambda response: response.status_code)
    assert one.status_code == 200 and refused(other) == (503, "busy") and "retry-after" in other.headers
    many = ask(*[("GET", "/v1/models", {})] * 5, rate=1.0)
    assert sorted(r.status_code for r in many) == [200, 200, 429, 429, 429] and all("retry-after" in r.headers for r in many if r.is_error)
    known = {"Authorization": f"Bearer {KEY}"}
    good = ask(("GET", "/health", {}), ("GET", "/ready", {}), ("GET", "/v1/models", {"headers": known}), key=KEY)
    assert [r.status_code for r in good] == [200, 200, 200]


async def _chunks(part: bytes, count: int) -> Any:
    for _ in range(count):
        yield part


async def _never() -> Any:
    yield b"{"
    await asyncio.sleep(60)


def test_a_text_that_is_refused_takes_no_other_with_it(ask: Ask) -> None:
    responses = ask(post({"text": "two olive oils"}), post({"text": "😀" * 300}), post({"text": "bye"}))
    assert [r.status_code for r in responses] == [200, 422, 200]


def test_malformed_requests_get_an_error_of_the_same_form(ask: Ask) -> None:
    chat = {"model": "shop-intent", "messages": [{"role": "user", "content": "my cart"}]}
    cases: list[tuple[tuple[str, str, dict[str, Any]], int]] = [
        (("POST", "/intent", {"content": b"{", "headers": {"Content-Type": "application/json"}}), 400),
        (("POST", "/intent", {"content": b"[" * 5000, "headers": {"Content-Type": "application/json"}}), 400),
        (("POST", "/intent", {"content": b'{"text": "\\ud800"}', "headers": {"Content-Type": "application/json"}}), 422),
        (("POST", "/intent", {"content": b'{"text": "x"}', "headers": {"Content-Type": "text/plain"}}), 422),
        *((post(body), 422) for body in (None, [], {}, {"text": 5}, {"text": " "}, {"texts": []}, {"text": "a", "texts": ["b"]})),
        (("GET", "/intent", {}), 405),
        (("GET", "/nowhere", {}), 404),
        *(
            (post({**chat, **change}, "/v1/chat/completions"), status)
            for change, status in (
                ({"model": "gpt-4"}, 404), ({"messages": []}, 422), ({"messages": [{"role": "system", "content": "x"}]}, 422), ({"n": 2}, 422),
                ({"max_tokens": 0}, 422), ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 422),
            )
        ),
    ]  # fmt: skip
    for request, status in cases:
        (response,) = ask(request)
        error = response.json()["error"]
        assert response.status_code == status and set(error) == {"message", "type", "param", "code"} and error["message"], (request, error)


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (IntentRequest, {"texts": [1] * 1000}, "texts.0"),
        (IntentRequest, {"texts": ["x", *[""] * 1000]}, "texts.1"),
        (ChatRequest, {"model": "m", "messages": [{}] * 1000}, "messages.0.role"),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [1] * 1000}]}, "messages.0.content.list[Part].0"),
    ],
)
def test_a_list_of_wrong_items_is_one_error_and_not_one_for_each(kind: type[BaseModel], body: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    errors = caught.value.errors()
    assert len(errors) <= 2 and ".".join(map(str, errors[0]["loc"])) == said  # what a content may be is two things


def test_whatever_is_sent_the_answer_is_json_and_no_failure_of_the_server(ask: Ask) -> None:
    chance = random.Random(7)
    requests = []
    for _ in range(150):
        path = chance.choice(["/intent", "/v1/chat/completions"])
        headers = {"Content-Type": chance.choice(["application/json"] * 4 + ["text/plain", "application/json; charset=utf-16"])}
        requests.append(("POST", path, {"content": _noise(chance, path), "headers": headers}))
    responses = ask(*requests)
    for request, response in zip(requests, responses, strict=True):
        assert response.json() and response.status_code < 500, (request, response.text)
    assert {200, 400, 422} <= {response.status_code for response in responses}


def _noise(chance: random.Random, path: str) -> bytes:
    """A body: random bytes, random JSON, or a good one with a random field; some cut off."""
    text = "".join(
        chr(chance.choice([chance.randrange(32, 127), chance.randrange(0xD800), 0, 0x1F600, 0x200B])) for _ in range(chance.randrange(1, 9))
    )
    values: list[Any] = [
        text,
        f"<|im_end|>{text}",
        None,
        True,
        -1,
        10**40,
        1e308,
        [text],
        [],
        {},
        {text: text},
        [[None]],
        [{"role": "user", "content": text}],
    ]
    good = {"text": text} if path == "/intent" else {"model": "shop-intent", "messages": [{"role": "user", "content": text}]}
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.randrange(40))
    body = (
        chance.choice(values)
        if kind == 1
        else {**good, chance.choice([*good, "texts", "stream_options", "n", "max_tokens", text]): chance.choice(values)}
    )
    raw = json.dumps(good if kind == 3 else body).encode()
    return raw[: chance.randrange(len(raw))] if chance.random() < 0.15 else raw


def test_an_error_of_llama_cpp_is_told_to_those_concerned_and_the_next_are_answered(
    ask: Ask, champions: Champions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = champions.current.engine._model
    whole, calls = model._logits, []

    def breaks_once(entries: Any) -> Any:
        calls.append(entries)
        if len(calls) == 1:
            raise RuntimeError("llama_decode returned -3")
        return whole(entries)

    monkeypatch.setattr(model, "_logits", breaks_once)
    (failed,) = ask(post({"texts": ["two olive oils", "bye"]}))
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "model_failed" and "llama_decode" not in failed.text
    (good,) = ask(post({"texts": ["two olive oils", "bye"]}))
    monkeypatch.undo()
    assert good.status_code == 200 and good.json() == ask(post({"texts": ["two olive oils", "bye"]}))[0].json()


class Later:
    """A source whose second conversation comes while the first is being answered."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.asked = [Asked(index, prompt, 12) for index, prompt in enumerate(prompts)]
        self.looked, self.refused = 0, list[int]()

    def take(self, wait: bool) -> Asked | None:
        self.looked += 1
        return self.asked.pop(0) if self.asked and (wait or self.looked > 4) else None

    def refuse(self, asked: Asked, problem: str) -> None:
        self.refused.append(asked.index)


def test_what_comes_later_joins_the_running_batch_and_is_answered_as_it_would_be_alone(tiny_gguf: Path) -> None:
    model = LlamaCppRuntime(tiny_gguf, 1, guesses=0)
    passes: list[int] = []
    whole = model._logits
    model._logits = lambda entries: passes.append(len(entries)) or whole(entries)  # type: ignore[method-assign, func-returns-value]
    asked = [[{"role": "user", "content": text}] for text in ("two olive oils please", "where is order 4711")]
    alone = {c.index: c.text for c in model.generate(asked, 12, 1)}
    one_by_one, prompts = len(passes), [model.encode(conversation) for conversation in asked]
    too_long = [5] * 3000
    passes.clear()
    source = Later([*prompts, too_long, prompts[0]])
    found = {c.index: c.text for c in model.answer(source, prompts[0][:3], 2, 200)}
    model.close()
    assert found == {0: alone[0], 1: alone[1], 3: alone[0]} and source.refused == [2]
    assert 2 in passes and len(passes) < 1.5 * one_by_one


def test_what_a_client_that_left_has_asked_is_not_computed_any_more(champions: Champions) -> None:
    config = ServeConfig(**FEW)
    metrics = Metrics()
    asked = Limits(application(Service(config, champions, metrics)), config, metrics, None)  # type: ignore[arg-type]
    engine, model = champions.current.engine, champions.current.engine._model
    passes, whole = [], model._logits
    sent: list[Any] = []

    async def leave() -> None:
        body = json.dumps({"texts": ["two olive oils please"] * 4}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not passes:  # the answer has begun
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        await asked({"type": "http", "method": "POST", "path": "/intent", "query_string": b"", "headers": headers}, receive, send)
        while engine.running or engine.waiting:
            await asyncio.sleep(0.01)

    def slow(entries: Any) -> Any:
        passes.append(len(entries))
        time.sleep(0.05)
        return whole(entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_logits", slow)
        asyncio.run(asyncio.wait_for(leave(), 60))
    assert not sent and b'status="499"' in metrics.text()
    assert len(passes) < 12  # two answers of up to 24 tokens were cut, and the other two never begun


@pytest.mark.fast
def test_a_client_has_its_own_rate() -> None:
    rate = Rate(2.0)
    assert [bool(rate.wait_s("a", 0.0)) for _ in range(5)] == [False] * 4 + [True]
    assert rate.wait_s("b", 0.0) == 0 and rate.wait_s("a", 0.25) == pytest.approx(0.25) and rate.wait_s("a", 0.5) == 0
    assert Rate(0).wait_s("a", 0.0) == 0


@pytest.mark.fast
def test_who_can_be_reached_needs_a_key() -> None:
    with pytest.raises(UserError, match="CARTWRIGHT_SERVE_KEY"):
        check_key("0.0.0.0", None)
    with pytest.raises(UserError, match="16 or more"):
        check_key("127.0.0.1", "short")
    check_key("0.0.0.0", KEY), check_key("::1", None), check_key("localhost", None)
    with pytest.raises(UserError, match="--max-body = 3"):
        serve_config(max_body=3)
