"""What a teacher's lessons become: training data, whole runs, and a real model as the teacher."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_server import free_port
from tasks import api
from tasks.base_model import offline_gguf
from tasks.core.manifests import Manifest
from tasks.domain.bank import load_bank
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.domain.utterances import SPLITS, split_catalogs
from tasks.synthesize import SynthesizeConfig, make_generator, read_rows, synthesize
from tasks.teaching.joining import join_banks
from tests.conftest import REPOSITORY
from tests.fault_server import KEY, Faults
from tests.lessons import DATA, holding, lesson, log_of, watched


def made(folder: Path, inputs: dict[str, Path], data: SynthesizeConfig = DATA) -> dict[str, Any]:
    folder.mkdir()
    return synthesize.function(data, inputs, folder)


def test_lessons_join_training_and_leave_evaluation_alone(server: Faults, ask: Callable[..., Manifest], home: Path, tmp_path: Path) -> None:
    server.answer = lesson
    taught = ask(requests=24)
    lessons = home / "store" / "teach" / taught.key
    few = DATA.model_copy(update={"patterns_per_intent": 2})  # so that a teacher's patterns surely have their turn
    alone = made(tmp_path / "alone", {}, few)
    joined = made(tmp_path / "joined", {"teacher": lessons}, few)
    for split in set(SPLITS) - {"train"}:
        assert (tmp_path / "alone" / f"{split}.jsonl").read_bytes() == (tmp_path / "joined" / f"{split}.jsonl").read_bytes()
    rows = read_rows(tmp_path / "joined" / "train.jsonl")
    whole = [row for row in rows if row["origin"].startswith("teacher:")]
    asked = {entry["hash"] for entry in log_of(home)}
    assert whole and {row["origin"].removeprefix("teacher:") for row in whole} <= asked
    assert {row["gold"]["intent"] for row in whole} == set(DATA.intents)
    from_patterns = {row["origin"] for row in rows if row["origin"].startswith("teacher.")}
    assert len(from_patterns) >= 2
    generator = make_generator(few)
    join_banks(generator, lessons)
    catalogs = [{product.name for product in products["train"]} for products in generator._products.values()]
    assert {"brass kettle", "Messingkessel"} & set.union(*catalogs)
    assert alone["teacher"] is None
    figures = joined["teacher"]
    assert figures["accepted"]["utterances"] == joined["origins"]["train"]["teacher"] == len(whole)
    assert {name: figures[name] for name in ("model", "requests", "tokens")} == {"model": "openai/m", "requests": 24, "tokens": 360}


def test_an_utterance_that_is_nearly_an_evaluation_row_does_not_join(
    server: Faults, ask: Callable[..., Manifest], home: Path, tmp_path: Path
) -> None:
    made(tmp_path / "alone", {})
    leak = next(
        row for row in read_rows(tmp_path / "alone" / "test.jsonl") if row["gold"] == {"intent": "view_cart"} and row["language"] == "en"
    )
    server.answer = lambda body: json.dumps({"items": [{"text": leak["text"]}]})
    taught = ask(requests=40)
    lessons = home / "store" / "teach" / taught.key
    assert taught.metrics["accepted"]["utterances"] == 1  # nothing tells the teacher's stage what is in `test`
    figures = made(tmp_path / "joined", {"teacher": lessons})["teacher"]
    assert figures["accepted"]["utterances"] == 0
    assert figures["rejected"]["near_duplicate_of_evaluation"] == 1


def test_no_product_of_evaluation_is_learnt(server: Faults, ask: Callable[..., Manifest], home: Path) -> None:
    spec = load_spec("ecommerce")
    parts = split_catalogs({"en": load_bank(spec, "en")}, spec)["en"]
    names = [product.name for split in ("test", "hard", "validation") for product in parts[split]][:6]
    server.answer = lambda body: json.dumps({"items": [{"class": "sc", "one": name, "pl": "", "measure": ""} for name in names]})
    taught = ask(DATA.model_copy(update={"languages": ("en",)}), requests=4)
    assert taught.metrics["accepted"]["products"] == 0 and taught.metrics["rejected"]["product_of_evaluation"] == 6


# --- whole runs --------------------------------------------------------------------------------------------------

SMALL = ("data.languages=[en,de]", "data.intents=[add_to_cart,view_cart]", "gguf=[F16]", "gptq=[]", "base_few_shot=0")
SAVE_SECRET = """
import sys
from tasks.core.settings import load_settings, prepare_environment
settings = load_settings()
prepare_environment(settings)
from flows.prefect_server import prefect_api
with prefect_api(settings):
    from prefect.blocks.system import Secret
    Secret(value=sys.argv[1]).save("teacher")
"""


def run_arguments(*changes: str) -> list[str]:
    return ["run", "--profile", "smoke", *(part for change in (*SMALL, *changes) for part in ("--set", change))]


PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted-s3-0123456789",
    "HF_TOKEN": "hf_planted0123456789",
    "CARTWRIGHT_SERVE_KEY": "planted-serve-0123456789",
    "CARTWRIGHT_ALERT_WEBHOOK": "https://hooks.test/planted-hook-0123456789",
    "PREFECT_API_AUTH_STRING": "ana:planted-prefect-0123456789",
}


@pytest.mark.fast
def test_what_is_planted_is_what_the_code_reads() -> None:
    source = (REPOSITORY / "tasks" / "core" / "settings.py").read_text(encoding="utf-8")
    ours = {name for name in PLANTED if not name.startswith(("AWS_", "HF_"))}  # the others are read by libraries
    assert ours == {name for name in ours if f'"{name}"' in source}


def test_a_teacher_that_refuses_stops_a_run_before_any_training_and_no_secret_is_left_anywhere(
    server: Faults, home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Not in a file, Prefect's and MLflow's databases and all logs included, in no output, and in no process's arguments."""
    server.faults = ["401"] * 20
    with watched() as lines:
        done = cartwright(*run_arguments("data.teacher=openai/m"), **PLANTED)
    assert done.returncode == 2 and "refuses the key" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(server.requests) == 1 and not list((home / "store").glob("*/*/manifest.json"))
    assert server.keys[0] == f"Bearer {KEY}" and (home / "mlflow.db").is_file() and list((home / "prefect").glob("*.db"))
    assert any("flows.cli" in line for line in lines) and any("tasks.core" in line for line in lines)
    for secret in (KEY, *PLANTED.values()):
        assert secret not in done.stdout + done.stderr and not holding(home, secret)
        assert not [line for line in lines if secret in line]


@pytest.mark.slow
def test_the_password_in_an_address_is_nowhere_when_nobody_is_there(
    home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Prefect keeps what a flow failed of, for everyone to read."""
    address = {"MLFLOW_TRACKING_URI": "http://me:planted-address-0123456789@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = cartwright(*run_arguments(), **address)
    assert done.returncode == 2 and "MLflow" in done.stderr, done.stdout + done.stderr
    assert "planted-address" not in done.stdout + done.stderr
    assert list((home / "prefect").glob("*.db")) and not holding(home, "planted-address-0123456789")


@pytest.mark.slow
def test_a_run_with_a_teacher_whose_key_is_in_a_secret_block(
    server: Faults, home: Path, cartwright: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    missing = cartwright(*run_arguments("data.teacher=openai/m", "teacher.secret_block=nowhere"))
    assert missing.returncode == 2 and "teacher.secret_block = 'nowhere': is no Secret block" in missing.stderr, missing.stderr
    secret = "planted-in-a-block-0123456789"
    subprocess.run([sys.executable, "-c", SAVE_SECRET, secret + "\n"], check=True, cwd=REPOSITORY)
    server.answer = lesson
    arguments = run_arguments("data.teacher=openai/m", "teacher.secret_block=teacher", "teacher.requests=20", "teacher.max_requests=12")
    with watched() as lines:  # of a whole run: training, models, registry, report
        done = cartwright(*arguments, **PLANTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(server.keys) == {f"Bearer {secret}"} and len(server.requests) == 12
    assert "The teacher was asked less than planned: budget teacher.max_requests = 12" in done.stdout
    for planted in (secret, *PLANTED.values()):
        assert planted not in done.stdout + done.stderr and not holding(home, planted)
        assert not [line for line in lines if planted in line]
    report = json.loads((home / "reports" / "latest" / "report.json").read_text())
    taught = report["dataset"]["teacher"]
    assert (taught["model"], taught["requests"], taught["requests_from_log"], taught["tokens"]) == ("openai/m", 12, 0, 180)
    assert taught["accepted"]["utterances"] > 0 and taught["accepted"]["patterns"] > 0 and taught["rejected"]["refusal"] > 0
    assert next(stage for stage in report["stages"] if stage["name"] == "teach")["state"] == "computed"
    page = (home / "reports" / "latest" / "report.md").read_text()
    assert "### Teacher" in page and "Stopped early: budget teacher.max\\_requests" in page.replace("max_requests", "max\\_requests")
    with sqlite3.connect(home / "mlflow.db") as database:
        query = "select m.key, m.value from metrics m join tags t on t.run_uuid = m.run_uuid where t.key = 'mlflow.runName' and t.value = 'teach'"
        logged = {key: value for key, value in database.execute(query) if key in ("tokens", "prompt_version", "requests")}
        named = database.execute("select count(*) from params where key = 'model' and value = 'openai/m'").fetchone()[0]
    assert logged == {"tokens": 180, "prompt_version": 1, "requests": 12} and named
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        told = database.execute("select resource_id from events where event = 'cartwright.teacher.budget'").fetchall()
    assert told == [("cartwright.teacher.openai/m",)]
    again = cartwright(*arguments)
    assert again.returncode == 0 and len(server.requests) == 12, again.stderr
    report = json.loads((home / "reports" / "latest" / "report.json").read_text())
    states = {stage["name"]: stage["state"] for stage in report["stages"]}
    assert states["teach"] == states["synthesize"] == states["finetune"] == "cached" and report["dataset"]["teacher"] == taught


@pytest.mark.slow
def test_a_real_model_behind_a_real_server_is_a_teacher(
    ask: Callable[..., Manifest], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offline model is too small to teach much; its answers are real, and none of them is believed unchecked."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    port = free_port()
    command = [
        "-m",
        "llama_cpp.server",
        "--model",
        str(offline_gguf()),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--n_ctx",
        "4096",
        "--n_threads",
        "1",
        "--n_threads_batch",
        "1",
    ]
    with (tmp_path / "server.log").open("wb") as log:
        llama = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(port, llama)
        data = DATA.model_copy(update={"teacher": "openai/smollm2", "languages": ("en",)})
        how = {"api_base": f"http://127.0.0.1:{port}/v1", "requests": 3, "items_per_request": 2, "timeout_s": 600}
        figures = ask(data, **how).metrics
    finally:
        llama.kill()
        llama.wait()
    entries = log_of(home)
    assert figures["requests"] == len(entries) == 3 and all(entry["completion_tokens"] > 0 for entry in entries)
    assert figures["tokens"] == sum(entry["prompt_tokens"] + entry["completion_tokens"] for entry in entries)
    assert sum(figures["accepted"].values()) + sum(figures["rejected"].values()) > 0
    with pytest.raises(UserError, match="does not answer"):
        monkeypatch.setattr(api, "FIRST_WAIT_S", 0.01)
        ask(data, **{**how, "requests": 4})
    assert len(log_of(home)) == 3  # the first three were not asked again, the fourth could not be


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
