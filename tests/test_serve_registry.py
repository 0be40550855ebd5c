"""`cartwright serve` as a process: the registered champion, OpenAI's client, an alias that moves, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from openai import APIStatusError, OpenAI

from tasks.domain.errors import UserError
from tasks.serving.champion import Champions
from tasks.serving.config import ServeConfig
from tasks.serving.metrics import Metrics
from tests.serving import BROKEN, GOOD, NAME, OTHER, REPOSITORY, TRANSFORMERS, Registry, running

WITHIN_S = 120


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Registry:
    return Registry(tmp_path_factory.mktemp("serve"), tiny_gguf)


@pytest.fixture(scope="module")
def served(registry: Registry) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One server for all tests; the last of them ends it."""
    with running(registry.settings.home, "--reload-s", "0.2", "--parallel", "4", "--max-tokens", "24", "--timeout-s", "100") as both:
        yield both


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for(address: str, line: str, but: str = "\0") -> None:
    """Until the metrics have a line, and not another one."""
    until(lambda: line in (metrics := httpx.get(f"{address}/metrics").text) and but not in metrics)


def nobody_there() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_openai_s_client_is_answered(served: tuple[subprocess.Popen[str], str]) -> None:
    client = OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0)
    assert NAME in [model.id for model in client.models.list()]
    asked: list[dict[str, str]] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two olive oils please"}]
    whole = client.chat.completions.create(model=NAME, messages=asked)  # type: ignore[arg-type]
    assert whole.choices[0].message.content and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 2
    chunks = list(client.chat.completions.create(model=NAME, messages=asked, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage
    cut = client.chat.completions.create(model=NAME, messages=asked, max_tokens=2)  # type: ignore[arg-type]
    assert cut.choices[0].finish_reason == "length" and cut.usage and cut.usage.completion_tokens == 2
    with pytest.raises(APIStatusError, match="There is no model 'gpt-4'") as error:
        client.chat.completions.create(model="gpt-4", messages=asked)  # type: ignore[arg-type]
    assert (error.value.status_code, error.value.code, error.value.param) == (404, "model_not_found", "model")


def test_when_the_alias_moves_no_request_is_dropped(served: tuple[subprocess.Popen[str], str], registry: Registry) -> None:
    _, address = served

    async def load() -> list[httpx.Response]:
        done: list[httpx.Response] = []
        async with httpx.AsyncClient(base_url=address, timeout=WITHIN_S) as client:

            async def ask_on() -> None:
                end = time.monotonic() + WITHIN_S
                while not [r for r in done if r.is_error or r.json()["version"] == OTHER] and time.monotonic() < end:
                    done.append(await client.post("/intent", json={"texts": ["two olive oils", "my cart"]}))

            await client.post("/intent", json={"text": "warm"})
            asking = [asyncio.create_task(ask_on()) for _ in range(6)]
            await asyncio.sleep(0.5)
            registry.move(OTHER)
            await asyncio.gather(*asking)
        return done

    done = asyncio.run(load())
    assert {response.status_code for response in done} == {200}
    assert {response.json()["version"] for response in done} == {GOOD, OTHER}
    metrics = httpx.get(f"{address}/metrics").text
    assert 'cartwright_reloads_total{result="ok"} 1.0' in metrics
    assert f'cartwright_champion_info{{name="{NAME}",variant="gguf-1",version="{OTHER}"}} 1.0' in metrics and 'version="1"' not in metrics


def test_a_champion_that_does_not_load_or_is_gone_leaves_the_one_before_it(
    served: tuple[subprocess.Popen[str], str], registry: Registry
) -> None:
    _, address = served
    registry.move(BROKEN)
    wait_for(address, 'cartwright_reloads_total{result="failed"} ', but='cartwright_reloads_total{result="failed"} 0.0')
    assert httpx.post(f"{address}/intent", json={"text": "bye"}).json()["version"] == OTHER
    registry.remove()
    assert httpx.post(f"{address}/intent", json={"text": "bye"}).json()["version"] == OTHER
    registry.move(GOOD)
    wait_for(address, f'version="{GOOD}"')
    log = (registry.settings.home / "serve.log").read_text()
    assert "Version 3 was not taken up" in log and "does not load" in log and "Traceback" not in log


def test_while_the_registry_does_not_answer_serving_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metrics = Metrics()
    champions = Champions(registry.settings, ServeConfig(threads=1, reload_s=0.05), metrics)
    champions._settings = replace(registry.settings, mlflow_uri=nobody_there())
    until(lambda: b"cartwright_registry_errors_total 0.0" not in metrics.text())
    (answered,) = champions.submit(["bye"], 4)[1]
    assert answered.result(WITHIN_S).completion_tokens and champions.current.version == GOOD
    champions._settings = registry.settings
    registry.move(OTHER)
    until(lambda: champions.current.version == OTHER)
    registry.move(GOOD)
    champions.close()


def test_sigterm_lets_running_requests_end(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served

    async def ask_and_end() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=address, timeout=WITHIN_S) as client:
            asking = [asyncio.create_task(client.post("/intent", json={"texts": ["two olive oils"] * 16})) for _ in range(4)]
            while "cartwright_running 4.0" not in (await client.get("/metrics")).text:
                assert not all(request.done() for request in asking)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asking)

    assert [len(response.json()["answers"]) for response in asyncio.run(ask_and_end())] == [16] * 4
    assert process.wait(WITHIN_S) == 0


def test_mlflow_loads_the_champion_and_it_answers(registry: Registry) -> None:
    registry.move(GOOD)
    code = "import sys, mlflow; mlflow.set_tracking_uri(sys.argv[1]); print(len(mlflow.pyfunc.load_model('models:/shop-intent@champion').predict(['two milk', 'bye'])))"
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, registry.settings.mlflow_uri]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=registry.settings.home)
    assert done.stdout.strip().endswith("2"), done.stderr


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("", "no version with the alias champion.*cartwright run"),
        (BROKEN, "version 3 .*does not load.*cartwright rollback"),
        (TRANSFORMERS, r"version 4 .*runs in transformers.*PATH=\S+:\$PATH MLFLOW_TRACKING_URI=sqlite:////\S+ mlflow models serve"),
    ],
)
def test_without_a_champion_that_can_be_served_there_is_one_message_with_the_mend(registry: Registry, version: str, said: str) -> None:
    registry.move(version) if version else registry.remove()
    with pytest.raises(UserError, match=said):
        Champions(registry.settings, ServeConfig(threads=1), Metrics())
    registry.move(GOOD)


def test_a_port_in_use_or_no_registry_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    def ends(*options: str, **extra: str) -> str:
        variables = {**os.environ, "CARTWRIGHT_HOME": str(tmp_path), **extra}
        command = [sys.executable, "-m", "flows.cli", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=REPOSITORY)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
        return done.stderr

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"--port = {port}: is in use" in ends("--port", port)
    assert "no version with the alias champion" in ends("--port", "0")
    assert not (tmp_path / "mlflow.db").exists()
    unreachable = {"MLFLOW_TRACKING_URI": nobody_there(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    assert "the registry does not answer" in ends("--port", "0", **unreachable)
