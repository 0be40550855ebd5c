"""The real server under a fuzzer made from its own OpenAPI document, and under many clients of which most misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import BaseModel

from tasks.serving.messages import Chat, Error, IntentAnswer
from tests.serving import NAME, running

pytestmark = pytest.mark.slow
TIMEOUT_S = 2.0
MAX_BODY = 200_000
FILL = "x" * 150_000  # a field that is ignored: whoever keeps bodies of requests grows by this much with each
CLIENTS, ROUNDS = 16, 3
Response = tuple[str, str, int, bytes, str]  # method, path, status, body, content type


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Iterator[tuple[psutil.Process, str, Path]]:
    """A server with little room and little patience: its process, address and log."""
    home = tmp_path_factory.mktemp("fuzzed")
    options = [
        "--gguf",
        str(tiny_gguf),
        "--parallel",
        "4",
        "--max-waiting",
        "8",
        "--max-tokens",
        "8",
        "--max-texts",
        "8",
        "--max-chars",
        "300",
    ]
    options += ["--timeout-s", str(TIMEOUT_S), "--max-body", str(MAX_BODY)]
    with running(home, *options) as (process, address):
        yield psutil.Process(process.pid), address, home / "serve.log"


# The fuzzer. Its check that valid requests are accepted is left out, since limits, and that there is one of `text` and `texts`, are in
# words; and the one that invalid ones are refused, since numbers as text and fields that nobody knows are taken, as by OpenAI.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
CHECKS += ",unsupported_method,allow_header_conformance"


def schemathesis(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from schemathesis.cli import schemathesis; schemathesis()",
        "run",
        "--no-color",
        "--generation-deterministic",
    ]
    return subprocess.run([*command, "--checks", CHECKS, *arguments], capture_output=True, text=True, cwd=folder)


def counted(address: str, *of: str) -> float:
    """The sum of the metrics whose line has all of these."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line[0] != "#" and all(part in line for part in of))


def test_a_fuzzer_finds_only_answers_that_the_document_describes(served: tuple[psutil.Process, str, Path], tmp_path: Path) -> None:
    _, address, log = served
    phases = ["--phases", "examples,coverage,fuzzing", "--mode", "all", "--max-examples", "25", "--continue-on-failure"]
    done = schemathesis(tmp_path, *phases, f"{address}/openapi.json")
    assert done.returncode == 0, done.stdout + done.stderr
    operations = httpx.get(f"{address}/openapi.json").json()["paths"]
    assert f"Tested: {len(operations)}\n" in done.stdout
    for path in operations:
        assert counted(address, "cartwright_requests_total", f'endpoint="{path}"', 'status="200"'), path
    for path in ("/intent", "/v1/chat/completions"):  # invalid ones were among them
        assert counted(address, "cartwright_requests_total", f'endpoint="{path}"', 'status="422"') > 10
    assert not counted(address, "cartwright_requests_total", 'status="5')
    assert "Traceback" not in log.read_text()


def test_the_fuzzer_would_notice(served: tuple[psutil.Process, str, Path], tmp_path: Path) -> None:
    """Documents that say something else of the same server are refuted."""
    _, address, _ = served
    for change in ("status", "content type", "schema"):
        document = httpx.get(f"{address}/openapi.json").json()
        whole = document["paths"]["/health"]["get"]["responses"]
        if change == "status":
            whole["201"] = whole.pop("200")
        elif change == "content type":
            whole["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
        else:
            document["components"]["schemas"]["Health"]["properties"]["status"] = {"const": "unwell"}
        (tmp_path / "other.json").write_text(json.dumps(document))
        arguments = ["--phases", "fuzzing", "--max-examples", "1", "--include-path", "/health", "--url", address]
        done = schemathesis(tmp_path, *arguments, "other.json")
        assert done.returncode == 1 and "1 failure" in done.stdout.lower(), done.stdout + done.stderr


# The load.

TEXTS = ["two olive oils please", "where is order 4711", "bye", "add 3 of the red ones", "¿cuánto cuesta?", "😀"]


class Client:
    """One client after another on one connection pool, each of a kind drawn from a seed; keeps every response that arrives."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self.http, self.chance, self.seen, self.cut = http, random.Random(seed), list[Response](), Counter[str]()

    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.valid, self.chat, self.streamed, self.invalid, self.oversized, self.slow, self.leaving, self.no_http]

    async def post(self, path: str, content: Any, kind: str = "", **headers: str) -> None:
        try:
            response = await self.http.post(path, content=content, headers={"content-type": "application/json", **headers})
        except httpx.TransportError:  # a server that refuses a body does not read the rest of it
            self.cut[kind] += 1
            return
        self.seen.append(("POST", path, response.status_code, response.content, response.headers["content-type"]))

    async def valid(self) -> None:
        texts = self.chance.choices(TEXTS, k=self.chance.randrange(1, 5))
        await self.post("/intent", json.dumps({"texts": texts, "fill": FILL}))

    def asked(self, **more: Any) -> str:
        return json.dumps({"model": NAME, "messages": [{"role": "user", "content": self.chance.choice(TEXTS)}], "fill": FILL, **more})

    async def chat(self) -> None:
        await self.post("/v1/chat/completions", self.asked(model=self.chance.choice([NAME, "gpt-4"])))

    async def streamed(self) -> None:
        await self.post("/v1/chat/completions", self.asked(stream=True))

    async def invalid(self) -> None:
        wrong = [
            "{",
            "",
            "null",
            '{"text": 5}',
            '{"text": "\\ud800"}',
            '{"texts": []}',
            '{"text": "%s"}' % ("y" * 301),
            "[" * 9000,
            '{"texts": ["a"]' + ' ,"b": 1' * 9,
        ]
        await self.post(self.chance.choice(["/intent", "/v1/chat/completions"]), self.chance.choice(wrong))

    async def oversized(self) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield b" " * (MAX_BODY // 4)

        declared = self.chance.random() < 0.5
        await self.post("/intent", b" " * (MAX_BODY + 1) if declared else parts(), "oversized")

    async def slow(self) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b'{"text": '
            await asyncio.sleep(TIMEOUT_S + 5)

        await self.post("/intent", parts(), "slow")

    async def leaving(self) -> None:
        """Go away in the midst of the head, of the body, or of the answer."""
        body = json.dumps({"texts": TEXTS}).encode()
        whole = b"POST /intent HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        _, writer = await asyncio.open_connection(self.http.base_url.host, self.http.base_url.port)
        writer.write(whole[: self.chance.choice([20, len(whole) - 9, len(whole)])])
        await writer.drain()
        await asyncio.sleep(self.chance.random() / 20)
        writer.transport.abort()

    async def no_http(self) -> None:
        wrong = [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
            b"POST /intent HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /intent HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,  # without an end
        ]
        reader, writer = await asyncio.open_connection(self.http.base_url.host, self.http.base_url.port)
        try:
            writer.write(self.chance.choice(wrong))
            answer = await reader.read()
        except ConnectionError:
            self.cut["no_http"] += 1
            return
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.splitlines()[1:])
        assert int(fields[b"content-length"]) == len(body)
        self.seen.append(("POST", "/intent", int(head.split()[1]), body, fields[b"content-type"].decode()))


async def rounds(address: str, first: int, count: int) -> list[Client]:
    """Rounds in which `CLIENTS` clients at once are of each kind, in an order of their own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        clients = [Client(http, seed) for seed in range(first, first + CLIENTS)]

        async def one(client: Client) -> None:
            for _ in range(count):
                kinds = client.kinds()
                client.chance.shuffle(kinds)
                for kind in kinds:
                    await kind()

        await asyncio.gather(*map(one, clients))
    return clients


def well_formed(response: Response, document: dict[str, Any]) -> None:
    method, path, status, body, kind = response
    assert str(status) in document["paths"][path][method.lower()]["responses"], response
    if kind.startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
        assert status == 200 and events[-1] == "[DONE]" and all(json.loads(event)["choices"] for event in events[:-1])
        return
    assert kind == "application/json", response
    form: type[BaseModel] = Error if status >= 400 else Chat if "chat" in path else IntentAnswer
    form.model_validate_json(body, strict=True)


def test_under_load_of_clients_that_misbehave_every_response_is_well_formed_and_memory_stays(
    served: tuple[psutil.Process, str, Path],
) -> None:
    process, address, log = served
    asyncio.run(rounds(address, 0, 1))  # until caches and pools have their size
    before = process.memory_info().rss
    clients = asyncio.run(rounds(address, 1000, ROUNDS))
    grown = process.memory_info().rss - before

    document = httpx.get(f"{address}/openapi.json").json()
    responses = [response for client in clients for response in client.seen]
    for response in responses:
        well_formed(response, document)
    seen = Counter(status for _, _, status, _, _ in responses)
    assert {200, 400, 404, 408, 413, 422} <= set(seen), seen
    assert not seen[500] and set(seen) <= {200, 400, 404, 408, 413, 422, 503, 504}, seen
    cut = sum((client.cut for client in clients), Counter[str]())
    assert set(cut) <= {"oversized", "no_http", "slow"}, cut  # whoever sends a right request hears an answer
    assert len(responses) + cut.total() == 7 * CLIENTS * ROUNDS  # all kinds but those that leave

    assert httpx.get(f"{address}/ready").status_code == 200
    assert httpx.post(f"{address}/intent", json={"text": TEXTS[0]}, timeout=60).status_code == 200
    end = time.monotonic() + 60
    while counted(address, "cartwright_running ") or counted(address, "cartwright_waiting "):  # of clients that have left
        assert time.monotonic() < end
    assert "Traceback" not in log.read_text()
    bodies = 3 * CLIENTS * ROUNDS * len(FILL)  # were each right request kept
    assert grown < bodies / 3, f"{grown / 1e6:.1f} MB"
