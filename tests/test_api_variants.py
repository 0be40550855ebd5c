"""Models behind an API as variants of a run: what is asked, paid, kept and reported."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import api
from tasks.api import complete
from tasks.config import load_config
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.manifests import Manifest, checksum
from tasks.core.stage import Stage, StageConfig
from tasks.domain.errors import UserError
from tasks.domain.scoring import compact_json
from tasks.evaluate_api import ANSWERS, EvaluateApiConfig, _read_answers, api_variants, evaluate_api
from tasks.runtimes.litellm import GIVE_UP, LiteLlmRuntime
from tasks.synthesize import read_rows, synthesize
from tests.conftest import Finished
from tests.fault_server import KEY, Faults
from tests.lessons import holding

ASK = [{"role": "user", "content": "2 milk"}]
SPLITS = ("test", "hard")


def answer_rightly(server: Faults, dataset: Path) -> dict[str, list[dict[str, Any]]]:
    """Let the server know the answer to every row that is evaluated; returns the rows by split."""
    rows = {split: read_rows(dataset / f"{split}.jsonl") for split in SPLITS}
    right = {row["text"].strip(): compact_json(row["gold"]) for found in rows.values() for row in found}
    other = str(server.answer)
    server.answer = lambda body: right.get(body["messages"][-1]["content"].strip(), other)
    return rows


def test_a_request_that_content_policy_forbids_fails_alone(server: Faults) -> None:
    server.always = {"rude": "refuse"}
    model = LiteLlmRuntime("openai/gpt-4.1")
    found = {c.index: c for c in model.generate([ASK, [{"role": "user", "content": "rude"}], ASK], 32, 2)}
    assert [found[i].text for i in range(3)] == [server.answer, "", server.answer]
    assert "content_policy_violation" in found[1].problem and len(model.failed) == 1 and len(server.requests) == 3
    assert found[1].refused and not found[0].refused
    assert model.usd == pytest.approx(found[0].usd + found[2].usd)


@pytest.mark.parametrize("fault", ["too_long", "400", "422"])
def test_a_request_that_is_too_long_fails_alone(server: Faults, fault: str) -> None:
    server.always = {"long": fault}
    model = LiteLlmRuntime("openai/gpt-4.1")
    long = [{"role": "user", "content": "long"}]
    found = {c.index: c for c in model.generate([ASK, *[long] * 3, ASK], 32, 2)}
    assert [found[i].text for i in range(5)] == [server.answer, "", "", "", server.answer]
    assert len(model.failed) == 3 and all(found[i].refused and found[i].problem for i in (1, 2, 3))
    assert not model.in_doubt and not any("Correct the model's name" in problem for problem in model.failed)


def test_an_api_that_refuses_whatever_is_asked_is_no_fault_of_the_texts(server: Faults) -> None:
    server.faults = ["400"] * 50
    with pytest.raises(UserError, match=r"refuses the request.*Correct the model's name"):
        list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 4))
    assert len(server.requests) == 2  # the first may have been its text
    server.faults = ["400", *[""] * 3]
    assert [done.text for done in LiteLlmRuntime("openai/m").generate([ASK] * 4, 32, 4)] == ["", *[server.answer] * 3]
    server.faults = ["", *["400"] * 50]  # as where the money is used up
    with pytest.raises(UserError, match=r"no answer to \d+ requests in a row .*refuses the request"):
        list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 1))


def test_a_text_that_is_forbidden_by_status_403_fails_alone_and_a_key_that_is_fails_all(server: Faults) -> None:
    server.always = {"rude": "moderated"}
    rude = [{"role": "user", "content": "rude"}]
    model = LiteLlmRuntime("openai/gpt-4.1")
    found = {done.index: done for done in model.generate([ASK, rude, ASK], 32, 2)}
    assert [found[i].text for i in range(3)] == [server.answer, "", server.answer] and found[1].refused and not model.in_doubt
    assert "flagged by moderation" in found[1].problem
    kept: list[int] = []
    model = LiteLlmRuntime("openai/gpt-4.1", answered=1, keep=lambda done: kept.append(done.index))  # others were answered earlier
    assert [done.text for done in model.generate([rude, ASK, rude], 32, 1)] == ["", server.answer, ""]
    assert kept == [1, 0] and [done.index for done in model.in_doubt] == [2]  # the key may have been taken back before the last
    with pytest.raises(UserError, match="refuses the key"):
        list(LiteLlmRuntime("openai/gpt-4.1").generate([rude, ASK], 32, 1))
    for faults, answered in ((["", *["moderated"] * 50], 0), (["moderated"] * 50, 1)):  # the key was taken back
        server.faults = faults
        with pytest.raises(UserError, match=rf"no answer to {GIVE_UP} requests in a row .*refuses the key.*OPENAI_API_KEY"):
            list(LiteLlmRuntime("openai/gpt-4.1", answered=answered).generate([ASK] * 50, 32, 1))


def test_texts_that_are_forbidden_or_too_long_are_no_sign_that_nothing_answers(server: Faults) -> None:
    server.faults = ["refuse", "too_long"] * GIVE_UP
    model = LiteLlmRuntime("openai/m")
    found = list(model.generate([ASK] * (2 * GIVE_UP + 1), 32, 1))
    assert len(found) == 2 * GIVE_UP + 1 and len(model.failed) == 2 * GIVE_UP and found[-1].text == server.answer


def test_a_refused_key_does_not_wait_for_requests_that_were_told_to_come_again_later(server: Faults) -> None:
    server.faults, server.retry_after = ["", "429", "401"], "600"
    model = LiteLlmRuntime("openai/gpt-4.1")
    with pytest.raises(UserError, match="refuses the key"):
        list(model.generate([ASK] * 3, 32, 2))
    assert len(server.requests) == 3  # the other was not asked again


def test_the_budget_ends_the_asking_and_what_was_paid_for_is_kept(server: Faults) -> None:
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


@pytest.mark.slow
def test_an_attempt_whose_time_ran_out_counts_in_the_budget(server: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    price = complete("openai/gpt-4.1", ASK, 32).usd
    assert price
    monkeypatch.setattr("tasks.runtimes.litellm.complete", functools.partial(complete, timeout_s=1))
    server.faults = ["", "slow"]
    found = []
    with pytest.raises(UserError, match="is used up"):
        for completion in LiteLlmRuntime("openai/gpt-4.1", max_usd=4.5 * price).generate([ASK] * 20, 32, 1):
            found.append(completion.text)
    assert found == [server.answer] * 3 and len(server.requests) == 1 + 4


def test_where_nothing_answers_the_rest_is_not_asked(server: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    server.faults = ["500"] * 100
    with pytest.raises(UserError, match=r"no answer to \d+ requests in a row.*Check the network"):
        list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 2))
    assert len(server.requests) <= GIVE_UP + 2
    server.faults = ["500"] * (GIVE_UP - 1)
    server.requests.clear()
    found = list(LiteLlmRuntime("openai/m").generate([ASK] * 50, 32, 1))
    assert {done.text for done in found} == {server.answer} and len(found) == 50  # an answer begins the count anew
    assert len(server.requests) == 50 + GIVE_UP - 1  # those without one are asked once more


@pytest.mark.slow
def test_requests_that_never_get_an_answer_are_no_sign_that_nothing_answers_where_others_do_meanwhile(
    server: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 2)
    bad = [[{"role": "user", "content": f"bad {number}"}] for number in range(GIVE_UP)]
    server.always, server.retry_after = {asked[0]["content"]: "500" for asked in bad}, "1"
    model = LiteLlmRuntime("openai/m")
    answered = [done.index for done in model.generate([ASK, *bad, *[ASK] * 20], 32, GIVE_UP + 1) if done.text]
    assert len(answered) == 21 and len(model.failed) == GIVE_UP and not model.in_doubt


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The rows of the profile `smoke`."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    synthesize.function(load_config("smoke").data, {}, folder)
    return folder


def test_no_answer_is_bought_twice(server: Faults, dataset: Path, tmp_path: Path) -> None:
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
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
    metrics = evaluate_api.function(config.model_copy(update={"max_usd": None, "parallel": 4}), {"dataset": dataset}, tmp_path)
    assert len(server.requests) == total + 1
    assert metrics["performance"]["parallel"] is None and "4 or 8 requests at a time" in metrics["performance"]["parallel_reason"]
    assert metrics["test"]["exact_match"]["value"] == metrics["hard"]["exact_match"]["value"] == 1.0
    performance = metrics["performance"]
    assert performance["requests"] == total == len(log.read_text().splitlines())
    assert performance["usd"] == pytest.approx(total * price) and performance["usd_per_1k_requests"] == pytest.approx(1000 * price)
    assert performance["requests_s_batched"] is None and "interrupted" in performance["requests_s_batched_reason"]


def test_what_was_refused_is_not_asked_again(server: Faults, dataset: Path, tmp_path: Path) -> None:
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
    forbidden, long, pondered = (row["text"].strip() for row in rows["test"][1:4])
    failing = {forbidden: "refuse", long: "too_long", pondered: "cut"}
    server.always = {**failing, rows["hard"][-1]["text"].strip(): "401"}
    config = EvaluateApiConfig(model="openai/gpt-4.1", parallel=1)
    with pytest.raises(UserError, match="refuses the key"):
        evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    assert len(server.requests) == total
    server.always = failing
    metrics = evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    performance = metrics["performance"]
    assert len(server.requests) == total + 1 and performance["requests_failed"] == 3 and performance["requests"] == total - 3
    assert "content_policy_violation" in performance["first_failure"]
    assert metrics["test"]["exact_match"]["value"] == pytest.approx(1 - 3 / len(rows["test"]))
    assert performance["usd"] == pytest.approx((total - 2) * 60e-6) and performance["usd_per_1k_requests"] == pytest.approx(0.06)


def test_a_model_that_refuses_everything_is_one_message(server: Faults, dataset: Path, tmp_path: Path) -> None:
    server.always = {"m": "too_long"}
    with pytest.raises(UserError, match=r"answered none of \d+ requests.*maximum context length"):
        evaluate_api.function(EvaluateApiConfig(model="openai/m"), {"dataset": dataset}, tmp_path)
    server.always = {}  # with more room
    assert evaluate_api.function(EvaluateApiConfig(model="openai/m"), {"dataset": dataset}, tmp_path)["performance"]["requests_failed"] == 0


def test_an_evaluation_whose_last_requests_were_refused_goes_on_with_them(server: Faults, dataset: Path, tmp_path: Path) -> None:
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
    config = EvaluateApiConfig(model="openai/gpt-4.1", parallel=1)
    server.faults = [""] * (total - 2) + ["400"] * 3  # the money is used up, and for one of them it was the text
    with pytest.raises(UserError, match=rf"no answer to the last 2 of {total} requests.*Run again.*are kept"):
        evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    metrics = evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    assert len(server.requests) == total + 2 and metrics["performance"]["requests_failed"] == 1


def test_rows_without_an_answer_are_asked_once_more_at_the_end_and_what_gets_none_again_counts_as_wrong(
    server: Faults, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
    lasting = {row["text"].strip() for row in rows["test"][1 : 2 * GIVE_UP + 3 : 2]}  # at the end they are more than give up at the start
    server.always, server.faults = dict.fromkeys(lasting, "500"), ["500"]
    metrics = evaluate_api.function(EvaluateApiConfig(model="openai/gpt-4.1", parallel=1), {"dataset": dataset}, tmp_path)
    assert len(lasting) > GIVE_UP and len(server.requests) == total + len(lasting) + 1
    assert metrics["performance"]["requests_failed"] == len(lasting) and metrics["performance"]["requests"] == total - len(lasting)
    assert metrics["test"]["exact_match"]["value"] == pytest.approx(1 - len(lasting) / len(rows["test"]))
    assert metrics["hard"]["exact_match"]["value"] == 1.0


def test_a_request_that_is_forbidden_by_status_403_holds_up_no_other(
    server: Faults, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
    forbidden = {row["text"].strip() for row in [*rows["test"][1 : 2 * GIVE_UP + 3 : 2], rows["hard"][-1]]}
    server.always, server.faults = dict.fromkeys(forbidden, "moderated"), ["500"]
    config = EvaluateApiConfig(model="openai/gpt-4.1", parallel=1, splits=("hard", "test"))
    metrics = evaluate_api.function(config, {"dataset": dataset}, made(tmp_path, "at once"))
    assert len(server.requests) == total + 1 and metrics["performance"]["requests_failed"] == len(forbidden)
    config = config.model_copy(update={"splits": SPLITS})  # the last is forbidden: it may be the key
    folder = made(tmp_path, "later")
    with pytest.raises(UserError, match=rf"no answer to the last 1 of {total} requests.*flagged by moderation"):
        evaluate_api.function(config, {"dataset": dataset}, folder)
    server.requests.clear()
    metrics = evaluate_api.function(config, {"dataset": dataset}, folder)
    assert len(server.requests) == 1 and metrics["performance"]["requests_failed"] == len(forbidden)


def made(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_of_an_api_that_is_gone_before_the_end_no_row_counts_as_wrong(
    server: Faults, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ATTEMPTS", 1)
    rows = answer_rightly(server, dataset)
    total = sum(map(len, rows.values()))
    config = EvaluateApiConfig(model="openai/gpt-4.1", parallel=1)
    server.faults = [*[""] * (total - 20), *["500"] * 100]
    with pytest.raises(UserError, match=rf"no answer to {GIVE_UP} requests in a row"):
        evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    server.faults = [*[""] * 17, "401"]
    with pytest.raises(UserError, match="refuses the key"):  # as after a kill: nothing is known of those that are left
        evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    server.faults = ["500"] * 100
    with pytest.raises(UserError, match=r"no answer to the last 3 of 3 requests"):
        evaluate_api.function(config, {"dataset": dataset}, tmp_path)
    server.requests.clear()
    server.faults = ["", "", "500", "500"]
    metrics = evaluate_api.function(config, {"dataset": dataset}, tmp_path)  # and one that never gets an answer ends here
    assert len(server.requests) == 4 and metrics["performance"]["requests_failed"] == 1


def test_an_answer_that_does_not_say_what_was_asked_is_bought_again(server: Faults, dataset: Path, tmp_path: Path) -> None:
    rows = answer_rightly(server, dataset)
    row = rows["test"][0]
    answer = {"split": "test", "id": row["id"], "output": "{}", "seconds": 1.0, "prompt_tokens": 1, "completion_tokens": 1, "usd": 0.0}
    (tmp_path / ANSWERS).write_text(json.dumps({**answer, "sha256": checksum(answer)}) + "\n")
    metrics = evaluate_api.function(EvaluateApiConfig(model="openai/gpt-4.1"), {"dataset": dataset}, tmp_path)
    assert len(server.requests) == sum(map(len, rows.values())) and metrics["test"]["exact_match"]["value"] == 1.0


def test_answers_outlive_damage_to_the_rows_and_are_bought_again_where_another_text_was_asked(server: Faults, home: Path) -> None:
    store = Store((home / "store").as_uri(), home)

    def run(stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return seam.run(replace(stage, isolated=False), config, inputs, store, home / "logs")[0]

    data, config = load_config("smoke").data, EvaluateApiConfig(model="openai/gpt-4.1")
    made = run(synthesize, data)
    folder = store.path("synthesize", made.key)
    rows = answer_rightly(server, folder)
    file = folder / "test.jsonl"
    damaged = [{**rows["test"][0], "text": "another text"}, *rows["test"][1:]]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in damaged), encoding="utf-8")
    with pytest.raises(StageError, match="damaged meanwhile"):
        run(evaluate_api, config, dataset=made)
    assert [path.name for path in store.partial("evaluate_api", evaluate_api.key(config, {"dataset": made})).iterdir()] == [ANSWERS]
    server.requests.clear()
    made = run(synthesize, data)
    total = sum(map(len, rows.values()))
    with pytest.raises(UserError, match="is used up"):  # what was bought of the damaged row was paid for too
        run(evaluate_api, config.model_copy(update={"max_usd": (total + 0.5) * 60e-6}), dataset=made)
    assert not server.requests
    metrics = run(evaluate_api, config, dataset=made).metrics
    assert [body["messages"][-1]["content"].strip() for body in server.requests] == [rows["test"][0]["text"].strip()]
    assert metrics["test"]["exact_match"]["value"] == metrics["hard"]["exact_match"]["value"] == 1.0
    performance = metrics["performance"]
    assert performance["usd"] == pytest.approx((total + 1) * 60e-6) and performance["usd_per_1k_requests"] == pytest.approx(0.06)


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


@pytest.mark.slow
def test_api_models_are_variants_of_a_run(
    server: Faults, finished: Finished, home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """All but them is of a finished run."""
    shutil.copytree(finished.store, home / "store")
    (dataset,) = (home / "store" / "synthesize").iterdir()
    rows = answer_rightly(server, dataset)
    forbidden = rows["test"][0]["text"].strip()
    server.always = {"no-key": "401", forbidden: "refuse"}
    where = f"http://127.0.0.1:{server.server_port}/v1"
    apis = [
        {"model": "openai/gpt-4.1", "few_shot": 2, "api_base": where, "max_usd": 5},
        {"model": "openai/of-our-own", "api_base": where},
        {"model": "openai/no-key", "api_base": where},
        {"model": "openai/gpt-4.1-mini", "api_base": where, "max_usd": 1e-9},
    ]
    arguments = ("run", "--profile", "smoke", "--set", f"api={json.dumps(apis)}")
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
    assert report["recommendation"]["cpu"].startswith("gguf-") and not set(report["pareto"]) & set(variants)
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


@pytest.mark.fast
def test_an_answer_that_a_kill_cut_short_or_a_disk_changed_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS
    answers = [{"split": "test", "id": name, "output": "ž"} for name in "abcdef"]
    lines = [json.dumps({**answer, "sha256": checksum(answer)}, ensure_ascii=False).encode() + b"\n" for answer in answers]
    lines[1] = lines[1].replace(b'"id"', b'"i\xff')
    lines[3] = lines[3].replace(b"output", b"outqut")
    lines[4] = lines[4].replace("ž".encode(), b"z")
    lines[5] = b"[" * 100_000 + b"\n"
    path.write_bytes(b"".join(lines) + '{"split": "te\u017e'.encode()[:-1])
    assert [name for _, name in _read_answers(path)[0]] == ["a", "c"]
    assert path.read_bytes() == lines[0] + lines[2] and list(tmp_path.iterdir()) == [path]
