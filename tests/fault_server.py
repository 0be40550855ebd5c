"""A real OpenAI-compatible server on loopback that misbehaves on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-planted-0123456789abcdef"


class Faults(ThreadingHTTPServer):
    """First goes through a list of faults, then answers.

    Attributes:
        faults: what the next requests meet: a status such as `429` (with `retry_after`), `drop` (the connection), `half` (an
            answer that breaks off), `torn` (so does the connection), `wrong` (JSON that is no answer), `no_choice` (an answer that says nothing), `nothing` (an empty body), `slow` (silence), `drip` (a byte now
            and then), `refuse` (content policy), `moderated` (so do some, by 403), `too_long`, `cut` (nothing said before the tokens were used up), `no_format_422` (`response_format` is unknown, others are answered), or "".
        always: after these, what every request meets that is for a model of this name, or whose customer says this.
        usage: what answers say of the tokens they took, if anything.
        answer: what is said, a text or made from the request's body.
        open: while it is not set, requests wait; they are in `requests` already.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.always: dict[str, str] = {}
        self.retry_after = "7"
        self.usage: dict[str, Any] | None = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.answer: str | Callable[[dict[str, Any]], str] = '{"intent":"add_to_cart","product":"milk","quantity":2}'
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = threading.Event()
        self.open.set()
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            said = body["messages"][-1]["content"].strip()
            usual = self.server.always.get(body["model"]) or self.server.always.get(said, "")
            fault = self.server.faults.pop(0) if self.server.faults else usual
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.server.open.wait(60)
            self._reply(body, fault)
        except OSError:  # the client is gone
            pass
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _reply(self, body: dict[str, Any], fault: str) -> None:
        if fault == "drop":
            self.connection.close()
        elif fault == "half":
            self._send(200, b'{"choices": [{"mess')
        elif fault == "torn":
            self._send(200, b'{"choices": [{"mess', {"Content-Length": "1000"})
        elif fault == "no_choice":
            self._send(200, json.dumps({"object": "chat.completion", "model": body["model"], "choices": []}).encode())
        elif fault == "wrong":
            self._send(200, b'{"hello": "world"}')
        elif fault == "nothing":
            self._send(200, b"")
        elif fault == "slow":
            time.sleep(30)
        elif fault == "drip":
            self._drip()
        elif fault == "refuse":
            error = {"message": "content_policy_violation", "type": "invalid_request_error", "code": "content_policy_violation"}
            self._send(400, json.dumps({"error": error}).encode())
        elif fault == "moderated":
            self._send(403, json.dumps({"error": {"message": "Input flagged by moderation", "code": 403}}).encode())
        elif fault == "too_long":
            error = {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}
            self._send(400, json.dumps({"error": error}).encode())
        elif fault.startswith("no_format") and "response_format" in body:
            self._send(int(fault[-3:]), json.dumps({"error": {"message": "response_format: Input should be 'text'"}}).encode())
        elif fault.isdigit():
            text = f"Incorrect API key provided: {self.headers['Authorization']}"
            self._send(int(fault), json.dumps({"error": {"message": text}}).encode(), {"Retry-After": self.server.retry_after})
        else:
            answer = self.server.answer if isinstance(self.server.answer, str) else self.server.answer(body)
            message = {"role": "assistant", "content": "" if fault == "cut" else answer}
            choice = {"index": 0, "message": message, "finish_reason": "length" if fault == "cut" else "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            reply |= {"usage": self.server.usage} if self.server.usage else {}
            self._send(200, json.dumps(reply).encode())

    def _drip(self) -> None:
        """Each byte comes before a client's limit for reading one, and the last one never."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.3)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
