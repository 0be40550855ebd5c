"""Models behind an API: a real server on loopback that misbehaves on purpose."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.api import ATTEMPTS, ApiError, complete
from tasks.core import settings
from tasks.domain.errors import UserError

KEY = "sk-planted-0123456789abcdef"
ASK = [{"role": "user", "content": "2 milk"}]


class Faults(ThreadingHTTPServer):
    """An OpenAI-compatible server that first goes through a list of faults, then answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.answer = '{"intent":"add_to_cart","product":"milk","quantity":2}'
        self.requests: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "drop":
            self.connection.close()
        elif fault == "half":
            self._send(200, b'{"choices": [{"mess')
        elif fault.isdigit():
            text = f"Incorrect API key provided: {self.headers['Authorization']}"
            self._send(int(fault), json.dumps({"error": {"message": text}}).encode(), {"Retry-After": "7"})
        else:
            message = {"role": "assistant", "content": self.server.answer}
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}
            self._send(200, json.dumps(reply).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with Faults() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{running.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield running
        running.shutdown()


def test_an_answer_comes_with_what_it_cost(server: Faults) -> None:
    reply = complete("openai/gpt-4.1", ASK, 32)
    assert reply.text == server.answer and (reply.prompt_tokens, reply.completion_tokens) == (10, 5)
    assert reply.usd and reply.usd > 0 and reply.seconds > 0
    assert complete("openai/of-our-own", ASK, 32).usd is None


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "half"])
def test_what_may_pass_is_tried_again(server: Faults, fault: str) -> None:
    server.faults = [fault, fault]
    pauses: list[float] = []
    assert complete("openai/m", ASK, 32, sleep=pauses.append).text == server.answer
    assert len(server.requests) == 3 and len(pauses) == 2
    if fault == "429":
        assert pauses == [7.0, 7.0]  # what the server named


def test_attempts_end(server: Faults) -> None:
    server.faults = ["500"] * 20
    with pytest.raises(ApiError, match=f"no answer in {ATTEMPTS} attempts"):
        complete("openai/m", ASK, 32, sleep=lambda _: None)
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize("status", ["401", "400", "404"])
def test_what_will_not_pass_is_asked_once_and_no_key_is_shown(server: Faults, status: str) -> None:
    server.faults = [status]
    with pytest.raises(UserError) as caught:
        complete("openai/m", ASK, 32)
    assert len(server.requests) == 1
    assert KEY not in str(caught.value) and "planted" not in str(caught.value)
    assert "openai/m" in str(caught.value)


def test_secrets_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefgh12345")
    assert settings.without_secrets("got abcdefgh12345 and the API key sk-abc*****wxyz.") == "got *** and the API key ***."


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
    assert "dollars for 1,000 requests" in done.stdout and "out_of_scope -> add_to_cart" in done.stdout
    assert "Intents and their slots" in server.requests[0]["messages"][0]["content"]  # it was not fine-tuned: the long instructions


def test_a_refused_key_is_one_message(server: Faults, tmp_path: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"text": "2 milk", "gold": {"intent": "view_cart"}}), encoding="utf-8")
    server.faults = ["401"] * 5
    done = cartwright("evaluate", "--data", str(data), "--model", "openai/m")
    assert done.returncode == 2 and "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout
    assert "refuses the key" in done.stderr
