"""The whole DAG on the tiny random model: what a run leaves behind, what a second one does, and how it survives a kill."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import flows.releasing
import flows.stages
from tasks.asking import find_model
from tasks.core import hardware
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import FORKS
from tasks.core.ledger import ACCOUNTS
from tasks.core.manifests import Manifest
from tasks.core.settings import load_settings
from tasks.core.stage import Stage
from tests.conftest import REPOSITORY, Finished


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "CARTWRIGHT_HOME": str(home)}


def run(home: Path, *arguments: str, profile: str = "smoke") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "run", "--profile", profile, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(home), cwd=REPOSITORY)


def call(home: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], input=stdin, capture_output=True, text=True, env=environment(home), cwd=REPOSITORY
    )


def latest(home: Path) -> dict[str, Any]:
    return json.loads((home / "reports" / "latest" / "report.json").read_text())


def states(home: Path) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in latest(home)["stages"]}


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A home with the store of a finished run; MLflow and reports begin anew, since they hold absolute paths."""
    home = tmp_path / "copy"
    home.mkdir()
    shutil.copytree(finished.store, home / "store")
    shutil.copytree(finished.home / "prefect", home / "prefect")
    return home


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("CARTWRIGHT_HOME") == str(home):
            found.append(process)
    return found


def test_the_end_says_where_to_look(finished: Finished) -> None:
    home, out = finished.home, finished.output
    page = next(line.removeprefix("Report: ") for line in out.splitlines() if line.startswith("Report: "))
    assert Path(page).is_file() and (home / "reports" / "latest" / "report.html").samefile(page)
    assert re.search(r"^Recommendation: (gguf|gptq)-\S+ answers", out, re.MULTILINE) and "Gate: promote" in out
    assert Path(next(line.removeprefix("Model: ") for line in out.splitlines() if line.startswith("Model: "))).is_file()
    assert f"PREFECT_HOME={home / 'prefect'}" in out and "mlflow ui" in out
    noise = ("Warning", "INFO", "Loading", "torchao", "GPT-QModel", "Traceback")
    assert not [word for word in noise if word in out]


def test_the_report_keeps_its_contract(finished: Finished) -> None:
    report = latest(finished.home)
    assert {
        "run_id",
        "profile",
        "git",
        "started",
        "finished",
        "wall_s",
        "environment",
        "stages",
        "dataset",
        "training",
        "variants",
        "pareto",
        "recommendation",
        "gate",
        "paper",
    } <= set(report)
    assert [v["name"] for v in report["variants"]] == [
        "base-bf16",
        "base-bf16-few-shot",
        "tuned-fp16",
        "gptq-4bit",
        "gguf-F16",
        "gguf-Q8_0",
        "gguf-Q4_0",
    ]
    for variant in report["variants"]:
        assert not variant.get("error")
        assert {"value", "low", "high", "n"} == set(variant["quality"]["exact_match"])
        assert variant["quality"]["exact_match"]["n"] == report["dataset"]["counts"]["test"] == 36
        performance = variant["performance"]
        for figure in ("load_s", "prefill_tok_s", "decode_tok_s", "requests_s", "requests_s_batched", "rss_mb"):
            assert performance[figure] > 0, (variant["name"], figure)
        assert performance["latency_ms"]["p50"] <= performance["latency_ms"]["p95"] <= performance["latency_ms"]["p99"]
        assert performance["energy_j_per_request"] > 0 and performance["energy_source"].startswith(("RAPL", "estimate (CodeCarbon "))
        assert performance["vram_mb"] is None and variant["size_mb"] > 0
        figures = {"mean_kld", "p99_kld", "top1_agreement", "weight_rel_error", "delta_retained", "prompt_ids_match", "verdict", "why"}
        assert figures <= set(variant["fidelity"]) if variant["role"] == "candidate" else variant["fidelity_reason"]
    by_name = {v["name"]: v for v in report["variants"]}
    assert by_name["gguf-F16"]["fidelity"]["verdict"] == "ok" and by_name["gguf-F16"]["fidelity"]["mean_kld"] < 1e-3
    assert by_name["tuned-fp16"]["speedup_vs_fp16"] == 1
    differs = hardware.gpu() is not None or not hardware.native_bf16()
    assert any("which is quickest here" in note for note in by_name["base-bf16"]["notes"]) is differs
    assert by_name["gguf-Q4_0"]["size_mb"] < by_name["gguf-Q8_0"]["size_mb"] < by_name["gguf-F16"]["size_mb"]
    assert by_name["gguf-Q4_0"]["tensor_types"]["Q4_0"] > 0
    assert by_name["gptq-4bit"]["kernel"].endswith("Linear") and by_name["gptq-4bit"]["kernel"] != "Linear"
    assert report["training"]["examples"] == report["dataset"]["counts"]["train"] > 0
    assert {stage["state"] for stage in report["stages"]} == {"computed"}
    assert {path.suffix for path in (finished.home / "reports" / "latest").iterdir()} >= {".json", ".html", ".md", ".png"}
    bill = json.loads((finished.home / "reports" / "latest" / report["sbom"]).read_text())
    assert {variant["sha256"] for variant in report["variants"]} <= {component["version"] for component in bill["components"]}
    assert report["sbom"] in (finished.home / "reports" / "latest" / "report.html").read_text()


def test_the_report_says_where_the_time_went(finished: Finished) -> None:
    report = latest(finished.home)
    spent = report["overhead"]
    parts = {name: spent[name] for name in (f"{account}_s" for account in ACCOUNTS)}
    assert min(parts.values()) >= 0 and set(spent) == {*parts, "wall_s", "total_s", "share"}
    assert sum(parts.values()) == pytest.approx(spent["wall_s"], abs=0.01)
    assert spent["total_s"] == pytest.approx(spent["wall_s"] - spent["stages_s"], abs=0.01)
    assert spent["share"] == pytest.approx(spent["total_s"] / spent["wall_s"], abs=0.001)
    assert all(parts[f"{name}_s"] > 0 for name in ("start", "stages", "processes", "store", "prefect", "mlflow", "report"))
    worked = {stage["name"]: stage["worked_s"] for stage in report["stages"]}
    assert sum(worked.values()) == pytest.approx(spent["stages_s"], abs=0.001 * len(worked) + 0.01)
    for stage in report["stages"]:
        if stage["computed_in_s"]:
            assert 0 < stage["worked_s"] <= stage["computed_in_s"] + 0.002, stage
    assert worked["register"] > 0  # the model that was promoted had to answer
    page = (finished.home / "reports" / "latest" / "report.html").read_text(encoding="utf-8")
    assert "no reason was recorded" not in page  # of what is not measured each says why
    assert "Where the time went" in page and "Prefect: flow runs" in page


def test_what_is_declared_reproducible_is_the_same_bytes_in_another_home(finished: Finished, home: Path) -> None:
    """The artefact of each kind that was made last, and all that it was made from, made once more."""
    there = [Manifest.model_validate_json(path.read_bytes()) for path in finished.store.glob("*/*/manifest.json")]
    stages = {
        found.name: found for module in (flows.stages, flows.releasing) for found in vars(module).values() if isinstance(found, Stage)
    }
    store = Store((home / "store").as_uri(), home)
    source = {m.digest: m for m in there if m.digest not in m.inputs.values()}  # GGUF in 16 bits is the bytes of what it is made from
    made: dict[str, Manifest] = {}

    def again(old: Manifest) -> Manifest:
        if old.key not in made:
            inputs = {name: again(source[digest]) for name, digest in old.inputs.items()}
            stage = stages[old.kind]
            made[old.key] = seam.run(stage, stage.config_type.model_validate(old.config), inputs, store, home / "logs")[0]
        return made[old.key]

    newest = {m.kind: m for m in sorted(there, key=lambda m: m.created) if not stages[m.kind].varies}
    report = latest(finished.home)["reproducibility"]
    assert set(newest) == set(report["same"]) >= {"synthesize", "finetune", "merge", "quantize_gguf", "quantize_gptq", "evaluate"}
    assert {m.kind for m in there} - set(newest) == set(report["varies"]) == {"benchmark", "decide", "report_plots"}
    assert report["spread"] is None and "benchmark.runs" in report["spread_reason"]
    try:
        for kind, manifest in newest.items():
            assert again(manifest).digest == manifest.digest, kind
    finally:
        FORKS.close()


def test_no_artefact_knows_where_it_was_made(finished: Finished) -> None:
    files = [path for path in finished.store.glob("*/*/**/*") if path.is_file()]
    assert files and not [path for path in files if str(finished.home).encode() in path.read_bytes()]


def test_mlflow_holds_every_stage_variant_and_the_champion(finished: Finished) -> None:
    """In a process of its own: MLflow keeps the tracking address for good."""
    code = """
import sys, mlflow, json
from mlflow import MlflowClient
mlflow.set_tracking_uri(sys.argv[1])
client = MlflowClient()
experiment = client.get_experiment_by_name("ecommerce/tiny-random")
runs = client.search_runs([experiment.experiment_id], max_results=1000)
kinds = {}
for run in runs: kinds.setdefault(run.data.tags["cartwright.kind"], []).append(run)
assert {run.info.status for run in runs} == {"FINISHED"}
assert len(kinds["pipeline"]) == 1
parent = kinds["pipeline"][0]
assert parent.data.metrics["overhead.wall_s"] > parent.data.metrics["overhead.stages_s"] > 0
assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for kind in ("stage", "variant") for run in kinds[kind])
names = [set(run.data.metrics) for run in kinds["variant"]]
assert len(names) == 7 and len(set.intersection(*names)) > 30, len(set.intersection(*names))
assert {"by_language.de.value", "exact_match.low"} < set.intersection(*names)
assert not [name for name in set.union(*names, parent.data.metrics) if "confusion." in name or name.endswith(".de.low")]
training = next(run for run in kinds["stage"] if run.info.run_name == "finetune")
assert len(client.get_metric_history(training.info.run_id, "loss")) >= 2
assert {"report/data_card.md", "report/data_card.json"} < {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
(used,) = parent.inputs.dataset_inputs
assert used.dataset.name == "ecommerce" and used.dataset.digest == sys.argv[2][:36] and [tag.value for tag in used.tags] == ["training"]
assert json.loads(used.dataset.profile)["counts"]["train"] == 96
from pathlib import Path
from mlflow.data import get_source
assert (Path(get_source(used.dataset).load()) / "train.jsonl").is_file()
version = client.get_model_version_by_alias("shop-intent", "champion")
assert version.tags["cartwright.variant"] in {run.info.run_name for run in kinds["variant"]}
model = mlflow.pyfunc.load_model("models:/shop-intent@champion")
answers = model.predict(["add two red shoes to my cart", "where is my order?"])
assert len(answers) == 2 and all(isinstance(a, str) for a in answers)
assert len(client.search_logged_models([experiment.experiment_id])) == 4
import pathlib
folder = pathlib.Path(mlflow.artifacts.download_artifacts("models:/shop-intent@champion"))
assert not list(folder.rglob("*.pkl"))
print("fine")
"""
    digest = latest(finished.home)["dataset"]["sha256"]
    result = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{finished.home / 'mlflow.db'}", digest],
        capture_output=True,
        text=True,
        env=environment(finished.home),
    )
    assert result.stdout.strip().endswith("fine"), result.stderr


def test_prefect_and_the_report_show_the_data_card(finished: Finished) -> None:
    with sqlite3.connect(finished.home / "prefect" / "prefect.db") as database:
        query = "select artifact.type, artifact.data, flow.name from artifact join flow_run on flow_run.id = flow_run_id join flow on flow.id = flow_id where key = 'data-card'"
        kind, markdown, flow = database.execute(query).fetchone()
    data = latest(finished.home)["dataset"]
    counts, intents = data["counts"], {intent for found in data["intents"].values() for intent in found}
    assert (kind, flow) == ("markdown", "data")
    assert f"| rows | {counts['test']} | {counts['hard']} | {counts['validation']} | {counts['train']} |" in json.loads(markdown)
    page = (finished.home / "reports" / "latest" / "report.html").read_text(encoding="utf-8")
    assert page.count("<details>") == 1 + len(intents) and "data_card.md" in page


def test_prefect_shows_recommendation_variants_and_pictures(finished: Finished) -> None:
    with sqlite3.connect(finished.home / "prefect" / "prefect.db") as database:
        found = {key: (kind, json.loads(data)) for key, kind, data in database.execute("select key, type, data from artifact")}
    report = latest(finished.home)
    assert found["recommendation"][0] == "markdown" and report["recommendation"]["why"] in found["recommendation"][1]
    kind, rows = found["variants"]
    rows = json.loads(rows) if isinstance(rows, str) else rows
    assert kind == "table" and [row["variant"] for row in rows] == [v["name"] for v in report["variants"]] and rows[-1]["requests/s"] > 0
    kind, tables = found["tables"]
    assert kind == "markdown" and "| PSS, MB |" in tables and "![" not in tables and "Upper left is better" not in tables
    assert "(data_card.md)" not in tables and "](https://arxiv.org/abs/2510.21970)" in tables
    pictures = ("accuracy-memory", "accuracy-speed", "latency", "divergence", "languages")
    assert all(found[key][0] == "image" and found[key][1].startswith("data:image/png;base64,iVBOR") for key in pictures)


def test_the_model_can_be_asked(finished: Finished, tmp_path: Path) -> None:
    home = finished.home
    answers = call(home, "predict", "--model", "champion", stdin='{"text": "two milk"}\n{"txt": 1}\nplain words\n{broken\n')
    lines = [json.loads(line) for line in answers.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["two milk"]
    assert all(said in answers.stderr for said in ("line 2: has no `text`", "line 3: is not JSON", "line 4: is not JSON"))
    (tmp_path / "texts.jsonl").write_text('{"id": 7, "text": "two milk"}\n')
    kept = call(home, "predict", "--data", str(tmp_path / "texts.jsonl"))
    assert json.loads(kept.stdout) == {"id": 7, **lines[0]}
    a_file = call(home, "predict", str(tmp_path / "texts.jsonl"))
    assert a_file.returncode == 2 and f"Read it with --data {tmp_path}/texts.jsonl" in a_file.stderr
    data = tmp_path / "mine.jsonl"
    data.write_text('{"text": "my cart", "gold": {"intent": "view_cart"}}\nnonsense\n{"text": "x", "gold": {"intent": "fly"}}\n')
    scored = call(home, "evaluate", "--data", str(data), "--model", "gguf-F16", "--output", str(tmp_path / "out.json"))
    assert scored.returncode == 0, scored.stderr
    assert "line 2" in scored.stderr and "line 3" in scored.stderr
    assert json.loads((tmp_path / "out.json").read_text())["exact_match"]["n"] == 1
    wrong = call(home, "predict", "--model", "gguf-Q9", "hello")
    assert wrong.returncode == 2 and "gguf-Q8_0" in wrong.stderr
    assert "# " in call(home, "report").stdout
    refused = call(home, "rollback")
    assert refused.returncode == 2 and "no version with the alias previous" in refused.stderr


def test_what_was_promoted_had_to_answer_first(finished: Finished) -> None:
    checks = latest(finished.home)["gate"]["checks"]
    assert checks[-1] == {"name": "loads from the registry and answers", "passed": True}
    with sqlite3.connect(finished.home / "prefect" / "prefect.db") as database:
        assert ("cartwright.gate.promote",) in database.execute("select event from events").fetchall()


def test_the_champion_is_asked_as_it_was_trained_whatever_the_latest_run_asks(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARTWRIGHT_HOME", str(finished.home))
    (specification,) = (finished.home / "store" / "synthesize").glob("*/spec.yaml")
    trained_with = specification.read_text()
    specification.write_text(trained_with.replace("prompt: short", "prompt: chat"))
    try:
        found = {name: find_model(load_settings(), name).spec.prompt for name in ("champion", "recommended")}
    finally:
        specification.write_text(trained_with)
    assert found == {"champion": "short", "recommended": "chat"}


def test_models_whose_specification_is_gone_are_not_asked_by_another(finished: Finished) -> None:
    (dataset,) = (finished.home / "store" / "synthesize").iterdir()
    aside = dataset.rename(finished.home / "aside")
    try:
        refused = call(finished.home, "predict", "two apples", "--model", "recommended")
    finally:
        aside.rename(dataset)
    assert refused.returncode == 2 and "the data of the latest run, which says how models are asked, is no longer in" in refused.stderr


def test_figures_are_not_saved_where_there_is_no_folder(finished: Finished, tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    refused = call(finished.home, "evaluate", "--output", str(nowhere / "out.json"))
    assert refused.returncode == 2 and f"mkdir -p {nowhere}" in refused.stderr and "Traceback" not in refused.stderr


def test_a_second_run_computes_nothing_and_prefect_says_cached(finished: Finished) -> None:
    home = finished.home
    result = run(home)
    assert result.returncode == 0, result.stderr
    assert "Nothing to compute" in result.stdout
    assert set(states(home).values()) == {"cached"}
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        (started,) = database.execute(
            "select max(flow_run.created) from flow_run join flow on flow.id = flow_id where flow.name = 'retrain'"
        ).fetchone()
        query = (
            "select task_run.name, task_run.state_name from task_run join flow_run on flow_run.id = flow_run_id where flow_run.created >= ?"
        )
        found = database.execute(query, [started]).fetchall()
    flows = {
        "data",
        "train",
        "quantize-gptq",
        "quantize-gguf",
        "measure",
        "check",
        "choose",
        "release",
    }  # Prefect shows a flow within a flow as a task too
    stages = {name: state for name, state in found if name.rpartition("-")[0] not in flows}
    assert set(stages) == set(states(home)) | {"report"}
    assert set(stages.values()) == {"Cached"}
    with sqlite3.connect(home / "mlflow.db") as database:
        cached = database.execute("select count(*) from tags where key = 'cartwright.cached' and value = 'true'").fetchone()[0]
        logged = database.execute("select count(*) from logged_models").fetchone()[0]
    assert cached == len([name for name in states(home) if name not in ("register", "report")])
    assert logged == 4  # the same content is not logged twice
    assert "Gate: hold (the challenger is the champion already)" in result.stdout
    spent = latest(home)["overhead"]
    assert spent["stages_s"] == spent["processes_s"] == 0 and spent["total_s"] == spent["wall_s"] > spent["start_s"] > 0


def test_what_is_wrong_with_a_configuration_is_said_while_the_server_starts_and_ends_it(finished: Finished) -> None:
    reports = set((finished.home / "reports").iterdir())
    refused = run(finished.home, "--set", "data.languages=[en,xx]")
    assert refused.returncode == 2 and "data.languages = 'xx': is unknown" in refused.stderr, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr and processes_of(finished.home) == []
    assert set((finished.home / "reports").iterdir()) == reports


def test_changing_one_field_recomputes_exactly_what_depends_on_it(copy: Path) -> None:
    assert run(copy, "--set", "benchmark.requests=6", "--set", "gguf=[Q4_0]", "--set", "gptq=[]").returncode == 0
    computed = {name for name, state in states(copy).items() if state == "computed"}
    assert computed == {f"benchmark {v['name']}" for v in latest(copy)["variants"] if v["role"] != "base"} | {
        "decide",
        "register",
        "report_plots",
    }  # the report does not list itself


def test_deleted_and_corrupted_artefacts_are_rebuilt(copy: Path) -> None:
    (merged,) = (copy / "store" / "merge").iterdir()
    shutil.rmtree(merged)
    (adapter,) = (copy / "store" / "finetune").iterdir()
    weights = adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-10])
    result = run(copy)
    assert result.returncode == 0, result.stderr
    found = states(copy)
    assert found["finetune"] == found["merge"] == "computed"
    assert found["synthesize"] == found["base_model"] == "cached"
    assert "Rebuilding finetune" in result.stdout + result.stderr


def test_a_variant_that_fails_fails_alone(copy: Path) -> None:
    # The keys of the tiny model have too few outputs for AWQ, which its stage finds
    result = run(copy, "--set", "awq=[{}]")
    assert result.returncode == 0, result.stderr
    variants = {v["name"]: v for v in latest(copy)["variants"]}
    assert "has 32 outputs, and AWQ needs a multiple of 64" in variants["awq-4bit"]["error"]
    assert not variants["gptq-4bit"].get("error") and not variants["gguf-Q4_0"].get("error")
    assert "awq-4bit" in (copy / "reports" / "latest" / "report.md").read_text()
    again = run(copy, "--set", "awq=[{}]")
    assert again.returncode == 0 and states(copy)["decide"] == "cached", (
        again.stdout
    )  # what is known to fail is tried, and decides nothing new
    assert "1 failed: quantize awq-4bit" in again.stdout and "Nothing to compute" not in again.stdout
    assert set(states(copy).values()) == {"cached"}


def test_killed_in_training_the_same_command_goes_on(copy: Path) -> None:
    longer = ("--set", "train.epochs=6", "--set", "train.checkpoints=6", "--set", "gguf=[F16]", "--set", "gptq=[]")
    command = [sys.executable, "-m", "flows.cli", "run", "--profile", "smoke", *longer]
    process = subprocess.Popen(command, env=environment(copy), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not list((copy / "store" / ".partial").glob("finetune-*/checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert processes_of(copy) == []

    result = run(copy, *longer)
    assert result.returncode == 0, result.stdout + result.stderr
    found = states(copy)
    assert found["synthesize"] == found["base_model"] == "cached" and found["finetune"] == "computed"
    key = next(stage["key"] for stage in latest(copy)["stages"] if stage["name"] == "finetune")
    manifest = json.loads((copy / "store" / "finetune" / key / "manifest.json").read_text())
    assert manifest["metrics"]["resumed_from_step"] >= 1
    assert not any("checkpoint" in name for name in manifest["files"])
    with sqlite3.connect(copy / "mlflow.db") as database:
        assert database.execute("select count(*) from runs where status != 'FINISHED'").fetchone()[0] == 0
        parents = database.execute("select count(*) from tags where key = 'cartwright.kind' and value = 'pipeline'").fetchone()[0]
    assert parents == 1  # the interrupted run was taken up again
    assert processes_of(copy) == []
    assert list((copy / "store" / ".partial").iterdir()) == []


def test_stopped_by_hand_it_says_how_to_go_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "flows.cli", "run", "--profile", "smoke"]
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores Ctrl-C
    process = subprocess.Popen(
        command, env=environment(home), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=restore
    )
    deadline = time.monotonic() + 300
    while not list((home / "store" / ".partial").glob("base_model-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "The same command goes on where this one ended." in output and "Traceback" not in output
    time.sleep(1)
    assert processes_of(home) == []
    with sqlite3.connect(home / "mlflow.db") as database:
        assert database.execute("select distinct status from runs where status != 'FINISHED'").fetchall() == [("KILLED",)]


def test_a_challenger_is_asked_the_rows_of_the_gate_as_the_champion_is(finished: Finished, tmp_path: Path) -> None:
    """The last test of the module: it changes the champion of the first run's registry."""
    home = finished.home
    champion = latest(home)["gate"]["challenger"]
    other = next(name for name in ("F16", "Q8_0") if f"gguf-{name}" != champion)
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "two crates of Fritz-Kola", "gold": {"intent": "add_to_cart", "product": "Fritz-Kola", "quantity": 2}}\n')
    changes = ["--set", f"gguf=[{other}]", "--set", "gptq=[]", "--set", "base_few_shot=0", "--set", f"registry.own_rows=[{own}]"]
    result = run(home, *changes)
    assert result.returncode == 0, result.stdout + result.stderr
    gate = latest(home)["gate"]
    groups = {check["group"]: check for check in gate["checks"] if "group" in check}
    assert {"test", "hard", "own", "test, en", "test, hr"} <= set(groups) and groups["test"]["n"] == 36
    assert gate["verdict"] == "inconclusive" and gate["champion"] == "version 1"  # 36 rows are too few
    assert {"gate_rows", "evaluate challenger, for the gate", "evaluate champion, for the gate"} <= set(states(home))
    wide = [*changes, "--set", "registry.margin=1", "--set", "registry.group_margin=1"]
    asked = run(home, *wide, "--set", "registry.mode=manual")
    assert "Gate: hold" in asked.stdout and "waits for a person" in asked.stdout
    promoted = call(home, "promote", "--why", "trial")
    assert promoted.returncode == 0 and "version 2" in promoted.stdout and "version 1 is kept as `previous`" in promoted.stdout
    assert "already" in call(home, "promote").stderr
    back = call(home, "rollback")
    assert back.returncode == 0 and "version 1" in back.stdout
    assert "Gate: hold" in run(home, *wide).stdout
    last = latest(home)["gate"]["checks"][-1]
    assert last["name"].startswith("it was rolled back at ") and last["passed"] is False
