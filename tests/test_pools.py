"""Stages on the workers of pools: a real Prefect server, a real MLflow server, and a worker in another folder with another home."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from tests.test_team import REPOSITORY, Home, deployment_of

# The whole DAG with as little as possible in it.
SMALL = {"gguf": ["F16"], "gptq": [], "base_few_shot": 0, "data.train_rows": 48, "train.checkpoints": 1}
WAIT_S = 800

pytestmark = pytest.mark.timeout(1800)


def until(found: Callable[[], Any], what: str, every_s: float = 0.5) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(every_s)
    raise TimeoutError(what)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Servers and the workers of `up`, of which the one that runs stages is ended: tests start others."""
    home = Home(tmp_path_factory.mktemp("pools") / "home")
    started = home.up()
    assert started.returncode == 0, started.stdout + started.stderr
    (worker,) = [service for service in home.services() if service["name"] == "worker of cpu-pool"]
    end([psutil.Process(worker["pid"])])
    yield home
    home.command("down")


def end(processes: list[psutil.Process]) -> None:
    """End processes for good: a worker that was started in the background of a script ignores the first signal."""
    for process in processes:
        process.terminate()
    for process in psutil.wait_procs(processes, 10)[1]:
        process.kill()
    psutil.wait_procs(processes, 10)


@contextmanager
def worker(team: Home, folder: Path, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of cpu-pool as on another host: its own home and working directory, the team's servers."""
    folder.mkdir(parents=True)
    variables = {**addresses(team), "CARTWRIGHT_HOME": str(folder / "home"), "CARTWRIGHT_STORE": store.as_uri()}
    command = [str(Path(sys.executable).parent / "cartwright"), "worker", "cpu-pool"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--name", folder.name], cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    until(
        lambda: folder.name in {w["name"] for w in team.ask("work_pools/cpu-pool/workers/filter", {}) if w["status"] == "ONLINE"}, "worker"
    )
    try:
        yield process
    finally:
        end([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])


def addresses(team: Home) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PREFECT_API_URL": f"http://127.0.0.1:{team.prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{team.mlflow}",
    }


def retrain(team: Home, changes: dict[str, Any]) -> subprocess.Popen[str]:
    """The retraining itself, as a person starts it by hand."""
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "flows.cli", "run", "--profile", "smoke", "--execution", "pools", *sets]
    variables = {**addresses(team), "CARTWRIGHT_HOME": str(team.folder)}
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end_of(asked: subprocess.Popen[str]) -> str:
    """What a retraining says until its end; it does not outlive the test."""
    try:
        return asked.communicate(timeout=WAIT_S)[0]
    finally:
        asked.kill()


def runs_of(team: Home, flow: str) -> list[dict[str, Any]]:
    return team.ask("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC"})


def processes_of(home: Path) -> list[psutil.Process]:
    """All that work for a home."""
    found = psutil.process_iter(["environ", "status"])
    here = [process for process in found if (process.info["environ"] or {}).get("CARTWRIGHT_HOME") == str(home)]
    return [process for process in here if process.info["status"] != psutil.STATUS_ZOMBIE]


def left_running(team: Home) -> set[str]:
    """Ids of the runs that go on, as MLflow has it."""
    with closing(sqlite3.connect(f"file:{team.folder / 'mlflow.db'}?mode=ro", uri=True)) as database:
        return {run for (run,) in database.execute("select run_uuid from runs where status = 'RUNNING' and lifecycle_stage = 'active'")}


def running_stages(home: Path) -> list[psutil.Process]:
    """Processes of stages and flows that run in a home, its worker left out."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline"]):
        here = (process.info["environ"] or {}).get("CARTWRIGHT_HOME") == str(home)
        if here and {"tasks.core.child", "prefect.engine", "prefect.flow_engine"} & set(process.info["cmdline"] or []):
            found.append(process)
    return found


def test_without_a_worker_or_a_server_nothing_starts(team: Home) -> None:
    for ended in team.ask("work_pools/cpu-pool/workers/filter", {}):  # Prefect would call it offline in a minute or two
        team.ask(f"work_pools/cpu-pool/workers/{ended['name']}", method="DELETE")
    asked = retrain(team, SMALL)
    out = end_of(asked)
    assert asked.returncode == 2 and "cpu-pool has no worker" in out and "make up" in out
    alone = team.command("run", "--profile", "smoke", "--execution", "pools")
    assert alone.returncode == 2 and "PREFECT_API_URL" in alone.stderr and not runs_of(team, "data")


def test_a_worker_with_another_store_is_found_out_before_any_work_and_fails_the_parent_with_its_reason(team: Home, tmp_path: Path) -> None:
    with worker(team, tmp_path / "elsewhere", tmp_path / "other-store"):
        asked = retrain(team, SMALL)
        out = end_of(asked)
    assert asked.returncode == 1, out
    assert "data on cpu-pool failed: UserError: CARTWRIGHT_STORE" in out and "is not the store of the flow that sent this work" in out
    assert [run["state"]["type"] for run in runs_of(team, "data")] == ["FAILED"] and not (tmp_path / "other-store" / "synthesize").exists()


def test_a_parent_that_was_killed_goes_on_with_the_children_it_had(team: Home, tmp_path: Path) -> None:
    with worker(team, tmp_path / "host", team.folder / "store"):
        first = retrain(team, SMALL)
        until(lambda: [run for run in runs_of(team, "train") if run["state"]["type"] == "RUNNING"], "training")
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert running_stages(tmp_path / "host" / "home")
        again = retrain(team, SMALL)
        out = end_of(again)
        assert again.returncode == 0, out
    for flow in ("train", "quantize-gguf", "measure", "check"):
        assert [run["state"]["type"] for run in runs_of(team, flow)] == ["COMPLETED"], flow
    report = json.loads((team.folder / "reports" / "latest" / "report.json").read_text())
    pools = {stage["name"]: stage["pool"] for stage in report["stages"]}
    assert pools["finetune"] == pools["evaluate gguf-F16"] == "cpu" and pools["register"] == pools["decide"] == "local"
    spent, worked = report["overhead"], {stage["name"]: stage["worked_s"] for stage in report["stages"]}
    assert worked["finetune"] > 0 and spent["stages_s"] > 0 and spent["processes_s"] > 0  # what workers tell, and the rest of the wait
    # Stages ran in the worker's home, artefacts are in the store of both.
    logs = {path.name.split("-")[0] for path in (tmp_path / "host" / "home" / "logs").rglob("*.log")}
    assert {"synthesize", "finetune", "convert_gguf", "evaluate", "benchmark"} <= logs
    assert not (tmp_path / "host" / "home" / "store").exists() and not list((team.folder / "logs").rglob("finetune-*.log"))
    of_it = [run for run in runs_of(team, "retrain") if run["name"] == report["run_id"]]
    assert len(of_it) == 2  # the killed one, and the one that went on


def what_is_there(ask: Callable[[], Any]) -> Any:
    """An answer of a server, or nothing while it has none: Prefect says that a run is suspended before it writes down what for."""
    try:
        return ask()
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None


def test_in_manual_mode_a_person_is_asked_and_the_answer_is_kept(team: Home, tmp_path: Path) -> None:
    """Every stage is cached by now. A registered model of another name has no champion, so that the gate lets pass."""
    deployment = deployment_of(team, "retrain/pools")
    asked = {"profile": "smoke", "promotion": "manual", "overrides": {**SMALL, "registry.name": "asked"}, "execution": "pools"}
    with worker(team, tmp_path / "host", team.folder / "store"):
        run = team.ask(f"deployments/{deployment}/create_flow_run", {"parameters": asked, "state": {"type": "SCHEDULED"}})["id"]
        state = until(lambda: (s := team.ask(f"flow_runs/{run}")["state"])["type"] in ("PAUSED", "FAILED", "CRASHED") and s, "the question")
        assert state["name"] == "Suspended", state
        key = state["state_details"]["run_input_keyset"]
        described = until(lambda: what_is_there(lambda: team.ask(f"flow_runs/{run}/input/{key['description']}")), "the question's words")
        assert "gguf-F16 against no champion: **promote**" in described
        team.ask(f"flow_runs/{run}/resume", {"run_input": {"promote": True, "by": "Ana", "why": "looks right"}})
        state = until(lambda: (s := team.ask(f"flow_runs/{run}")["state"])["type"] in ("COMPLETED", "FAILED", "CRASHED") and s, "the end")
    assert state["type"] == "COMPLETED", state
    report = json.loads((team.folder / "reports" / "latest" / "report.json").read_text())
    assert report["gate"] | {"verdict": "promote", "by": "Ana", "why": "looks right"} == report["gate"] and report["flow_run"] == run
    of_it = [run for run in runs_of(team, "data") if run["name"].startswith(report["run_id"])]
    assert len(of_it) == 1  # an answer starts no stage again


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (Debian's package of that name)")
def test_a_browser_finds_in_both_dashboards_what_a_person_would_look_for(team: Home, tmp_path: Path) -> None:
    report = json.loads((team.folder / "reports" / "latest" / "report.json").read_text())
    prefect, mlflow = f"http://127.0.0.1:{team.prefect}", f"http://127.0.0.1:{team.mlflow}"
    assert {"retrain", "pools"} <= set(page(f"{prefect}/deployments").split())
    shown = page(f"{prefect}/runs/flow-run/{report['flow_run']}")
    assert report["run_id"] in shown and "Completed" in shown
    assert report["run_id"] in page(f"{prefect}/artifacts/key/recommendation")
    experiment = "ecommerce/tiny-random"
    assert experiment in page(f"{mlflow}/#/experiments")
    version = page(f"{mlflow}/#/models/asked/versions/1")
    assert report["mlflow_run"] in version and "champion" in version and "exact match" in version
    assert "Release gate" in page((team.folder / "reports" / "latest" / "report.html").as_uri())


def page(address: str) -> str:
    """The text of a page after its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--dump-dom", address]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", found.stdout, flags=re.DOTALL).split())


def is_benchmark(process: psutil.Process) -> bool:
    """A new interpreter; other stages are forked."""
    return "tasks.core.child" in process.cmdline() and "--fork-server" not in process.cmdline()


@pytest.mark.thorough
def test_when_a_host_dies_the_parent_says_so_and_the_same_command_goes_on_elsewhere(team: Home, tmp_path: Path) -> None:
    changes = {**SMALL, "benchmark.requests": 6}
    with worker(team, tmp_path / "dies", team.folder / "store") as host:
        asked = retrain(team, changes)
        until(lambda: [p for p in running_stages(tmp_path / "dies" / "home") if is_benchmark(p)], "a benchmark")
        for process in [psutil.Process(host.pid), *running_stages(tmp_path / "dies" / "home")]:
            process.kill()
        (lost,) = [run for run in runs_of(team, "measure") if run["state"]["type"] == "RUNNING"]
        # As the automation zombie-run does when five minutes have passed without a heartbeat; tests/test_automations.py waits for one.
        crashed = {"type": "CRASHED", "name": "Crashed", "message": "No heartbeat"}
        team.ask(f"flow_runs/{lost['id']}/set_state", {"state": crashed, "force": True})
        out = end_of(asked)
        assert asked.returncode == 1 and "measure on cpu-pool crashed: No heartbeat" in out, out
    with worker(team, tmp_path / "lives", team.folder / "store"):
        again = retrain(team, changes)
        out = end_of(again)
    assert again.returncode == 0, out
    report = json.loads((team.folder / "reports" / "latest" / "report.json").read_text())
    states = {stage["name"]: stage["state"] for stage in report["stages"]}
    assert states["finetune"] == states["evaluate gguf-F16"] == "cached" and states["benchmark gguf-F16"] == "computed"
    assert not list((team.folder / "store" / ".partial").iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1, 5])
def test_when_a_worker_alone_dies_the_same_command_goes_on_elsewhere(team: Home, tmp_path: Path, seed: int) -> None:
    """What the worker had started outlives it, at least until it has something to say: how the parent ends is not laid down. Nothing is lost."""
    rng, store = Random(seed), team.folder / "store"
    kind, delay_s = rng.choice(("finetune", "evaluate", "benchmark")), rng.uniform(0, 2)
    changes = {**SMALL, "data.seed": 100 + seed}  # nothing of it is cached
    before = left_running(team)
    with worker(team, tmp_path / "dies", store) as host:
        asked = retrain(team, changes)
        until(lambda: any((store / ".partial").glob(f"{kind}-*")) or asked.poll() is not None, f"{kind} to run", every_s=0.02)
        assert asked.poll() is None, asked.communicate()[0]
        time.sleep(delay_s)
        host.kill()
        # A stage flow may end well without its worker; the next one then waits until there is another.
        late = {"flow_runs": {"state": {"name": {"any_": ["Late"]}}}}
        until(lambda: asked.poll() is not None or team.ask("flow_runs/filter", late), "the end, or a flow that waits for a worker")
    with worker(team, tmp_path / "lives", store):
        first = end_of(asked)
        finished = {path: path.stat().st_mtime_ns for path in store.glob("[!.]*/*/manifest.json")}
        again = retrain(team, changes)
        out = end_of(again)
    assert again.returncode == 0, f"seed {seed}, {kind} + {delay_s:.1f} s\n{first}\n{out}"
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    report = json.loads((team.folder / "reports" / "latest" / "report.json").read_text())
    known = {(path.parts[-3], path.parts[-2]) for path in finished}
    cached = {stage["name"]: stage["state"] == "cached" for stage in report["stages"] if (stage["kind"], stage["key"]) in known}
    assert cached["synthesize"] and all(cached.values()), cached
    assert not [variant["error"] for variant in report["variants"] if variant.get("error")]
    until(lambda: not processes_of(tmp_path / "dies" / "home"), "what the dead worker had started to end")
    assert not list((store / ".partial").iterdir())
    assert not left_running(team) - before


def test_cancelling_the_parent_leaves_no_process_behind(team: Home, tmp_path: Path) -> None:
    deployment = deployment_of(team, "retrain/pools")
    with worker(team, tmp_path / "host", team.folder / "store"):
        changes = {"profile": "smoke", "overrides": {**SMALL, "data.train_rows": 20_000, "data.seed": 8}, "execution": "pools"}
        run = team.ask(f"deployments/{deployment}/create_flow_run", {"parameters": changes, "state": {"type": "SCHEDULED"}})["id"]
        until(lambda: [p for p in running_stages(tmp_path / "host" / "home") if "tasks.core.child" in p.cmdline()], "a stage")
        team.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        until(lambda: team.ask(f"flow_runs/{run}")["state"]["type"] == "CANCELLED", "the parent to be cancelled")
        until(lambda: not running_stages(tmp_path / "host" / "home") and not running_stages(team.folder), "processes to end")
        assert runs_of(team, "data")[0]["state"]["type"] == "CANCELLED"


def test_a_missing_deployment_is_named_before_any_work(team: Home) -> None:
    """The last test of the module: nothing deploys it again."""
    team.ask(f"deployments/{deployment_of(team, 'check/cpu')}", method="DELETE")
    asked = retrain(team, SMALL)
    out = end_of(asked)
    assert asked.returncode == 2 and "the deployment check/cpu is missing. `make up` deploys it" in out, out
