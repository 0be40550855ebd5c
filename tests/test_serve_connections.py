"""Connections that are no requests: silent ones, heads that never end, and more than there may be. A real server on loopback."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving import running

TIMEOUT_S, MOST = 1.0, 4


@pytest.fixture(scope="module")
def address(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ("--gguf", str(tiny_gguf), "--timeout-s", str(TIMEOUT_S), "--max-connections", str(MOST), "--max-tokens", "4")
    with running(tmp_path_factory.mktemp("connections"), *options) as (_, at):
        yield at


def connect(address: str) -> socket.socket:
    at = urlsplit(address)
    return socket.create_connection((str(at.hostname), int(at.port or 0)), timeout=30)


def heard(connection: socket.socket) -> tuple[int, str]:
    """Status and code of the error that ends a connection."""
    data = b""
    with suppress(ConnectionResetError):  # what was sent to it after it had gone
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower() and b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def served(connection: socket.socket) -> None:
    """Ask for `/health`, and hear the whole answer."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    data = b""
    while not data.endswith(b"}"):
        part = connection.recv(65536)
        assert part, data
        data += part
    assert data.startswith(b"HTTP/1.1 200")


def works(address: str) -> bool:
    return httpx.get(f"{address}/health", timeout=30).status_code == 200


def test_who_says_nothing_is_told_so_and_left(address: str) -> None:
    with connect(address) as silent:
        assert heard(silent) == (408, "timeout")
    assert works(address)


def test_a_head_that_arrives_byte_by_byte_has_no_more_time_than_others(address: str) -> None:
    with connect(address) as slow:
        began = time.monotonic()
        slow.settimeout(0.1)
        for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"y" * 1000:
            try:
                slow.send(bytes([byte]))
                if slow.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:  # nothing to hear yet
                continue
        slow.settimeout(30)
        assert heard(slow) == (408, "timeout") and time.monotonic() - began < 30
    assert works(address)


def test_the_second_request_of_a_connection_has_as_much_time(address: str) -> None:
    with connect(address) as twice:
        served(twice)
        time.sleep(2 * TIMEOUT_S)  # between requests another time limit holds
        served(twice)
        twice.sendall(b"GET /health HT")
        assert heard(twice) == (408, "timeout")


def test_who_asks_and_never_reads_is_left(address: str) -> None:
    """As many as there may be, each with more answers to get than the kernel keeps for it."""
    with ExitStack() as all_of_them:
        deaf = [all_of_them.enter_context(connect(address)) for _ in range(MOST)]
        left = select.poll()
        for connection in deaf:
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
            left.register(connection, select.POLLHUP)
        deadline = time.monotonic() + 60
        while len(left.poll(100)) < MOST and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(left.poll(0)) == MOST
        assert works(address)


def test_there_are_only_so_many_connections_and_a_closed_one_makes_room(address: str) -> None:
    with ExitStack() as all_of_them:
        held = [all_of_them.enter_context(connect(address)) for _ in range(MOST)]
        for connection in held:  # served, so that the server knows of each
            served(connection)
        with connect(address) as more:
            more.sendall(b"POST /intent HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhello")
            assert heard(more) == (503, "overloaded")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if works(address):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("no room after all had left")
