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

from tasks import api
from tasks.api import ATTEMPTS, ApiError, complete
from tasks.config import load_config
from tasks.core import settings
from tasks.domain.errors import UserError
from tasks.domain.scoring import answer_text
from tasks.evaluate_api import ANSWERS, EvaluateApiConfig, api_variants, evaluate_api
from tasks.runtimes.litellm import GIVE_UP, LiteLlmRuntime
from tasks.synthesize import read_rows, synthesize

KEY = "sk-planted-0123456789abcdef"
ASK = [{"role": "user", "content": "2 milk"}]


class Faults(ThreadingHTTPServer):
    """An OpenAI-compatible server that first goes through a list of faults, then answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.answer = '{"intent":"add_to_cart","product":"milk","quantity":2}'
        self.answers: dict[str, str] = {}  # by what the customer says, where it is not `answer`
        self.always: dict[str, str] = {}  # faults by the model's name or by what the customer says
        self.requests: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Faults

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        said = body["messages"][-1]["content"].strip()
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always.get(body["model"], self.server.always.get(said, ""))
        if fault == "drop":
            self.connection.close()
        elif fault == "half":
            self._send(200, b'{"choices": [{"mess')
        elif fault == "refuse":
            error = {"message": "content_policy_violation", "type": "invalid_request_error", "code": "content_policy_violation"}
            self._send(400, json.dumps({"error": error}).encode())
        elif fault.isdigit():
            text = f"Incorrect API key provided: {self.headers['Authorization']}"
            self._send(int(fault), json.dumps({"error": {"message": text}}).encode(), {"Retry-After": "7"})
        else:
            message = {"role": "assistant", "content": self.server.answers.get(said, self.server.answer)}
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


def test_a_request_that_content_policy_forbids_fails_alone(server: Faults) -> None:
    server.always = {"rude": "refuse"}
    model = LiteLlmRuntime("openai/gpt-4.1")
    found = {c.index: c for c in model.generate([ASK, [{"role": "user", "content": "rude"}], ASK], 32, 2)}
    assert [found[i].text for i in range(3)] == [server.answer, "", server.answer]
    assert "content_policy_violation" in found[1].problem and len(model.failed) == 1 and len(server.requests) == 3
    assert model.usd_per_1k_requests == pytest.approx(found[0].usd * 1000)  # type: ignore[operator]


def test_the_budget_is_never_exceeded_and_what_was_paid_for_is_kept(server: Faults) -> None:
    price = complete("openai/gpt-4.1", ASK, 32).usd
    assert price
    server.requests.clear()
    model = LiteLlmRuntime("openai/gpt-4.1", max_usd=5.5 * price)
    found = []
    with pytest.raises(UserError, match=r"is used up.*Raise it"):
        for completion in model.generate([ASK] * 20, 32, 4):
            found.append(completion.text)
    assert found == [server.answer] * 5 and len(server.requests) == 5
    assert model.usd == pytest.approx(5 * price)


def test_where_nothing_answers_the_rest_is_not_asked(server: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    server.faults = ["500"] * 100
    with pytest.raises(UserError, match=f"no answer to {GIVE_UP} requests in a row.*Check the network"):
        list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 2))
    assert len(server.requests) <= GIVE_UP + 2
    server.faults = ["500"] * (GIVE_UP - 1)
    assert len(list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 1))) == 50  # an answer begins the count anew


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The rows of the profile `smoke`."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    synthesize.function(load_config("smoke").data, {}, folder)
    return folder


def test_no_answer_is_bought_twice(server: Faults, dataset: Path, tmp_path: Path) -> None:
    rows = {split: read_rows(dataset / f"{split}.jsonl") for split in ("test", "hard")}
    total = sum(map(len, rows.values()))
    server.answers = {row["text"].strip(): answer_text(row["gold"]) for found in rows.values() for row in found}
    price = complete("openai/gpt-4.1", ASK, 32).usd
    assert price
    server.requests.clear()
    config = EvaluateApiConfig(model="openai/gpt-4.1", max_usd=10.5 * price)
    for bought in (10, 10):
        with pytest.raises(UserError, match="max_usd"):
            evaluate_api.function(config, {"dataset": dataset}, tmp_path)
        assert len(server.requests) == bought
    log = tmp_path / ANSWERS
    log.write_bytes(log.read_bytes()[:-5])  # a kill in the middle of a line
    metrics = evaluate_api.function(config.model_copy(update={"max_usd": None}), {"dataset": dataset}, tmp_path)
    assert len(server.requests) == total + 1
    assert metrics["test"]["exact_match"]["value"] == metrics["hard"]["exact_match"]["value"] == 1.0
    performance = metrics["performance"]
    assert performance["requests"] == total == len(log.read_text().splitlines())
    assert performance["usd"] == pytest.approx(total * price) and performance["usd_per_1k_requests"] == pytest.approx(1000 * price)
    assert performance["requests_s_batched"] is None and "interrupted" in performance["requests_s_batched_reason"]


def test_the_key_of_an_evaluation_has_the_model_and_not_the_address() -> None:
    config = EvaluateApiConfig(model="openai/gpt-4.1")
    elsewhere = config.model_copy(update={"api_base": "http://127.0.0.1:9/v1", "max_usd": 3.0})
    assert evaluate_api.key(config, {}) == evaluate_api.key(elsewhere, {})
    assert evaluate_api.key(config, {}) != evaluate_api.key(config.model_copy(update={"model": "openai/gpt-4.1-mini"}), {})


def test_variants_are_named_by_their_model() -> None:
    ids = ("openai/gpt-4.1", "azure/gpt-4.1", "openrouter/meta/llama:free")
    named = api_variants([EvaluateApiConfig(model=ids[0], few_shot=12), *(EvaluateApiConfig(model=name) for name in ids[1:])])
    names = ["api-openai-gpt-4.1", "api-openai-gpt-4.1-12-shot", "api-azure-gpt-4.1", "api-llama-free"]
    assert [variant.name for variant, _ in named] == names
    assert [config.few_shot for _, config in named] == [0, 12, 0, 0]


def holding(folder: Path, text: str) -> list[Path]:
    """Files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_api_models_are_variants_of_a_run(
    server: Faults, dataset: Path, home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rows = {split: read_rows(dataset / f"{split}.jsonl") for split in ("test", "hard")}
    server.answers = {row["text"].strip(): answer_text(row["gold"]) for found in rows.values() for row in found}
    forbidden = rows["test"][0]["text"].strip()
    server.always = {"no-key": "401", forbidden: "refuse"}
    where = f"http://127.0.0.1:{server.server_port}/v1"
    apis = [
        {"model": "openai/gpt-4.1", "few_shot": 2, "api_base": where, "max_usd": 5},
        {"model": "openai/of-our-own", "api_base": where},
        {"model": "openai/no-key", "api_base": where},
        {"model": "openai/gpt-4.1-mini", "api_base": where, "max_usd": 1e-9},
    ]
    arguments = ("run", "--profile", "smoke", "--set", f"api={json.dumps(apis)}", "--set", "gguf=[Q4_0]", "--set", "gptq=[]")
    done = cartwright(*arguments, OPENAI_API_BASE="http://127.0.0.1:9/v1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((home / "reports" / "latest" / "report.json").read_text())
    variants = {v["name"]: v for v in report["variants"] if v["role"] == "api"}
    assert list(variants) == ["api-gpt-4.1", "api-gpt-4.1-2-shot", "api-of-our-own", "api-no-key", "api-gpt-4.1-mini"]

    total = len(rows["test"]) + len(rows["hard"])
    right = (len(rows["test"]) - 1) / len(rows["test"])
    for name in ("api-gpt-4.1", "api-gpt-4.1-2-shot", "api-of-our-own"):
        row, performance = variants[name], variants[name]["performance"]
        assert row["quality"]["exact_match"]["value"] == pytest.approx(right, abs=1e-4) and row["quality"]["vs_reference"]["delta"] > 0.5
        assert f"1 of {total} requests got no answer and count as wrong" in " ".join(row["notes"])
        assert 0 < performance["latency_ms"]["p50"] <= performance["latency_ms"]["p95"] <= performance["latency_ms"]["p99"]
        assert performance["requests_s"] > 0 and performance["requests_s_batched"] > 0
        for place, figure in ((row, "size_mb"), (row, "speedup_vs_fp16"), (performance, "rss_mb"), (performance, "load_s")):
            assert place[figure] is None and "provider" in place[f"{figure}_reason"]
    assert variants["api-gpt-4.1"]["performance"]["usd_per_1k_requests"] > 0
    unpriced = variants["api-of-our-own"]["performance"]
    assert unpriced["usd_per_1k_requests"] is None and "no price" in unpriced["usd_per_1k_requests_reason"]
    assert "OPENAI_API_KEY" in variants["api-no-key"]["error"] and "Raise it" in variants["api-gpt-4.1-mini"]["error"]
    assert not [
        name for name in (report["recommendation"]["cpu"], report["recommendation"]["gpu"], *report["pareto"]) if "api" in str(name)
    ]
    claim = next(claim for claim in report["paper"] if "GPT-4.1" in claim["claim"])
    assert claim["ours"] == f"{right:.1%} with no examples, {right:.1%} with 2 examples"
    page = (home / "reports" / "latest" / "report.md").read_text()
    assert "api-gpt-4.1 (API baseline)" in page and "USD per 1,000 requests" in page
    assert not holding(home, KEY) and KEY not in done.stdout + done.stderr

    asked = [body for body in server.requests if body["model"] == "gpt-4.1"]
    assert len(asked) == 2 * total and {len(body["messages"]) for body in asked} == {2, 6}  # each row once for both, two examples
    server.requests.clear()
    server.always["no-key"] = ""  # the key was set meanwhile
    again = cartwright(*arguments)
    assert again.returncode == 0, again.stderr
    assert {body["model"] for body in server.requests} == {"no-key"} and len(server.requests) == total
    report = json.loads((home / "reports" / "latest" / "report.json").read_text())
    assert not next(v for v in report["variants"] if v["name"] == "api-no-key").get("error")

    server.requests.clear()
    mine = home.parent / "mine.jsonl"
    mine.write_text(json.dumps({"text": "2 milk", "gold": {"intent": "add_to_cart", "product": "milk", "quantity": 2}}), encoding="utf-8")
    scored = cartwright("evaluate", "--data", str(mine), "--model", "api-gpt-4.1-2-shot", OPENAI_API_BASE="http://127.0.0.1:9/v1")
    assert scored.returncode == 0 and "exact match 100.0%" in scored.stdout, scored.stderr
    assert len(server.requests[0]["messages"]) == 6
