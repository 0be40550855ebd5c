"""The HTTP application: `/intent`, OpenAI's chat completions, health and metrics."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from tasks.domain.errors import UserError
from tasks.domain.scoring import compact_json, parse_answer
from tasks.runtimes import Completion
from tasks.serving.champion import Champion, Champions
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Busy, Closing
from tasks.serving.limits import Refused
from tasks.serving.messages import Chat, ChatRequest, Error, Health, IntentAnswer, IntentRequest, Models, Ready, Text
from tasks.serving.metrics import Metrics

API = "1"
CUT = "cut"  # the problem of an answer that was longer than allowed, beside those of `parse_answer`
TEXT = TypeAdapter(Text)

# What the OpenAPI document says that an endpoint may answer beside 200. Any request may have a body that is slow or large.
ERRORS = {
    400: "no JSON", 401: "no key", 404: "no such model", 408: "slow body", 413: "large body", 422: "wrong field", 429: "rate", 500: "failed",
    503: "busy", 504: "slow",
}  # fmt: skip
ASKED = (400, 401, 408, 413, 422, 429, 500, 503, 504)
READ = (401, 408, 413, 429, 500)
PROBED = (408, 413, 500)
# With `stream`. OpenAPI 3.1 cannot describe the events of a stream.
EVENTS = {"text/event-stream": {"example": 'data: {"object": "chat.completion.chunk", ...}\n\ndata: [DONE]\n\n'}}
PLAIN = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """What the endpoints share."""

    def __init__(self, config: ServeConfig, champions: Champions, metrics: Metrics) -> None:
        self.config, self.champions, self.metrics = config, champions, metrics
        self.numbers = itertools.count(1)
        self.ending = False

    async def answer(self, texts: list[str], max_tokens: int, field: str) -> tuple[Champion, list[Completion]]:
        """The champion's answers in the order of the texts, all of one version.

        Raises:
            Refused: a limit, or an error of llama.cpp.
        """
        self._check(texts, field)
        try:
            champion, asked = self.champions.submit(texts, max_tokens)
        except UserError as error:
            raise Refused(422, "text_too_long", str(error), field) from None
        except Busy:
            most = self.config.max_waiting
            raise Refused(503, "busy", f"{most} texts are waiting, which is as many as may", retry_after_s=1) from None
        except Closing:
            raise Refused(503, "ending", "The server is about to end", retry_after_s=5) from None
        try:
            async with asyncio.timeout(self.config.timeout_s):
                done = await asyncio.gather(*map(asyncio.wrap_future, asked), return_exceptions=True)
        except TimeoutError:
            raise Refused(504, "timeout", f"There was no answer within {self.config.timeout_s:g} s") from None
        completions = [completion for completion in done if isinstance(completion, Completion)]
        if len(completions) < len(done):
            raise Refused(500, "model_failed", "llama.cpp failed; the log says why")
        self.metrics.tokens.labels("prompt").inc(sum(completion.prompt_tokens for completion in completions))
        self.metrics.tokens.labels("completion").inc(sum(completion.completion_tokens for completion in completions))
        return champion, completions

    def _check(self, texts: list[str], field: str) -> None:
        most = min(self.config.max_texts, self.config.parallel + self.config.max_waiting)  # more could never be taken at once
        if len(texts) > most:
            raise Refused(422, "too_many_texts", f"{field} has {len(texts)} texts; allowed: {most}", field)
        longest = max(map(len, texts))
        if longest > self.config.max_chars:
            raise Refused(422, "text_too_long", f"{field} has {longest} characters; allowed: {self.config.max_chars}", field)

    def parsed(self, champion: Champion, completion: Completion) -> tuple[dict[str, Any] | None, str | None]:
        """The answer and None, or None and why it is none."""
        parsed = parse_answer(completion.text, champion.spec)
        problem = parsed.problem if completion.ended else CUT
        if problem:
            self.metrics.no_answer.labels(problem).inc()
            return None, problem
        return parsed.answer, None


def application(service: Service) -> FastAPI:
    """The endpoints of a service."""
    app = FastAPI(title="Cartwright", version=API, docs_url=None, redoc_url=None)
    for kind in (Refused, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error)
    config, champions = service.config, service.champions

    @app.post("/intent", response_model=IntentAnswer, responses=_errors(*ASKED))
    async def intent(asked: IntentRequest) -> Response:
        """What a customer wants: the parsed answer, and the version of the model that gave it."""
        texts = [asked.text] if asked.text is not None else asked.texts or []
        champion, completions = await service.answer(texts, config.max_tokens, "text" if asked.texts is None else "texts")
        answers = [_answer(service, champion, completion) for completion in completions]
        given = answers[0] if asked.texts is None else {"answers": answers}
        return JSONResponse({"model": config.name, "version": champion.version, **given})

    @app.post("/v1/chat/completions", response_model=Chat, responses={200: {"content": EVENTS}, **_errors(404, *ASKED)})
    async def chat(asked: ChatRequest) -> Response:
        """OpenAI's chat completions; the answer is a compact JSON object. Where it is none, because it was cut off, the content is null; without
        a grammar it is what the model wrote."""
        names = _names(config, champions.current)
        if asked.model not in names:
            raise Refused(404, "model_not_found", f"There is no model {asked.model[:100]!r}; there is {', '.join(names)}", "model")
        try:
            text = TEXT.validate_python(asked.customer())
        except ValidationError as error:
            raise Refused(422, "no_text", f"messages: the last message of the user {_said(error.errors()[0])}", "messages") from None
        longest = min(asked.max_completion_tokens or asked.max_tokens or config.max_tokens, config.max_tokens)
        champion, (completion,) = await service.answer([text], longest, "messages")
        head = {"id": f"chatcmpl-{next(service.numbers)}", "created": int(time.time()), "model": asked.model}
        head["system_fingerprint"] = f"{config.name}/{champion.version}"
        answer, _ = service.parsed(champion, completion)
        content = compact_json(answer) if answer else None if config.constrained else completion.text
        reason = "stop" if completion.ended else "length"
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = _events(head, content, reason, _usage(completion), with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "logprobs": None, "finish_reason": reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(completion)})

    @app.get("/v1/models", response_model=Models, responses=_errors(*READ))
    async def models() -> Response:
        """The champion, by its name and by its version."""
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "cartwright"} for name in _names(config, champions.current)]
        return JSONResponse({"object": "list", "data": listed})

    @app.get("/health", response_model=Health, responses=_errors(*PROBED))
    async def health() -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=Ready, responses=_errors(*PROBED, 503))
    async def ready() -> Response:
        """Whether a champion takes questions."""
        current = champions.current
        if service.ending or not current.engine.thread.is_alive():
            raise Refused(503, "not_ready", "No champion takes questions", retry_after_s=5)
        return JSONResponse({"status": "ready", "model": config.name, "version": current.version, "variant": current.variant})

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(*READ))
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=PLAIN)

    return app


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Error, "description": ERRORS[code]} for code in codes}


def _names(config: ServeConfig, champion: Champion) -> list[str]:
    return [config.name, f"{config.name}@champion", f"{config.name}/{champion.version}"]


def _answer(service: Service, champion: Champion, completion: Completion) -> dict[str, Any]:
    answer, problem = service.parsed(champion, completion)
    return {"answer": answer, "problem": problem, "output": completion.text if problem else None}


def _usage(completion: Completion) -> dict[str, int]:
    read, written = completion.prompt_tokens, completion.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _events(head: dict[str, Any], content: str | None, reason: str, usage: dict[str, int], with_usage: bool) -> Iterator[str]:
    """Server-sent events. The answer comes whole, in one: it is JSON made of what the model wrote, and that is only read at its end."""
    pieces: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        *([] if content is None else [({"content": content}, None)]),
        ({}, reason),
    ]
    for delta, finish in pieces:
        chunk = {**head, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        yield _event({**chunk, "usage": None} if with_usage else chunk)
    if with_usage:
        yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _error(request: Request, error: Exception) -> Response:
    """Any error in one format."""
    refused = _refused(error)
    theirs = (error.headers or {}) if isinstance(error, HTTPException) else {}  # which methods are allowed
    return JSONResponse(refused.body(), refused.status, {**theirs, **refused.headers()})


def _refused(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return Refused(error.status_code, "http_error", str(error.detail))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return Refused(400, "invalid_json", "The body is not JSON")
        field = ".".join(str(part) for part in first["loc"][1:])
        code = "too_many_texts" if (field, first["type"]) == ("texts", "too_long") else "invalid_field"
        return Refused(422, code, f"{field or 'body'}: {_said(first)}", field or None)
    return Refused(500, "internal_error", "Something is wrong in this server; its log says what")


def _said(problem: Any) -> str:
    return str(problem["msg"]).removeprefix("Value error, ")
