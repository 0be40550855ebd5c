"""Automations as code: on a real Prefect server, with a real webhook on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import deploying
from flows.automations import AUTOMATIONS, OURS, PAYLOAD, WEBHOOK, install, read
from tasks.domain.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
WITHIN_S = 400  # how long a server may take on a machine that is busy
ENTRIES = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
NAMES = {entry["name"] for entry in ENTRIES}
ALERTS = {entry["name"] for entry in ENTRIES if "alert" in entry}


def until(found: Callable[[], Any], what: str) -> Any:
    """What `found` returns as soon as it is true."""
    deadline = time.monotonic() + WITHIN_S
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return value


class Server(deploying.Server):
    """A Prefect server's API."""

    def automations(self) -> dict[str, dict[str, Any]]:
        return {automation["name"]: automation for automation in self.ask("automations/filter", {})}

    def emit(self, event: str, resource: str, **payload: Any) -> None:
        about = {"prefect.resource.id": resource, "prefect.resource.name": resource.rpartition(".")[2]}
        sent = {"id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": event, "resource": about, "payload": payload}
        self.ask("events", [sent])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A standing server with the deployment that retraining on drift wants, and an automation that somebody made by hand."""
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "CARTWRIGHT_"))}
    env |= {"PREFECT_HOME": str(folder), "PREFECT_UI_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--log-level", "error"], env=env, stdout=log, stderr=log)
    try:
        api = Server(f"http://127.0.0.1:{port}/api", {})
        until(lambda: process.poll() is not None or answers(f"{api.api}/health"), "the server does not answer")
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        flow = api.ask("flows/", {"name": "retrain"})["id"]
        api.ask("deployments/", {"name": "cpu", "flow_id": flow, "entrypoint": "flows.retrain:retrain"})
        trigger = {"type": "event", "posture": "Reactive", "expect": ["x"], "threshold": 1, "within": 0}
        api.ask("automations/", {"name": "by hand", "trigger": trigger, "actions": [{"type": "do-nothing"}]})
        yield api
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What was posted to the address in CARTWRIGHT_ALERT_WEBHOOK."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("CARTWRIGHT_ALERT_WEBHOOK", f"http://127.0.0.1:{listening.server_port}/alerts")
        yield posted
        listening.shutdown()


def changed_file(folder: Path, change: Callable[[dict[str, dict[str, Any]]], Any]) -> Path:
    """The checked-in file with a change to its entries by name."""
    entries = {entry["name"]: entry for entry in yaml.safe_load(AUTOMATIONS.read_text())["automations"]}
    change(entries)
    path = folder / "automations.yaml"
    path.write_text(yaml.safe_dump({"automations": list(entries.values())}))
    return path


def test_without_a_webhook_all_is_installed_and_nobody_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test of the module: the server has no block yet."""
    monkeypatch.delenv("CARTWRIGHT_ALERT_WEBHOOK", raising=False)
    done = install(server.api)
    assert set(done.added) == NAMES and not done.alerts and "set CARTWRIGHT_ALERT_WEBHOOK" in str(done)
    found = server.automations()
    assert set(found) == NAMES | {"by hand"}
    assert {name for name in NAMES if found[name]["enabled"]} == NAMES - {"drift-retrain"}
    assert [action["type"] for action in found["gate-hold"]["actions"]] == ["do-nothing"]
    assert found["zombie-run"]["actions"][0]["state"] == "CRASHED"
    again = install(server.api)
    assert set(again.kept) == NAMES and not (again.added or again.changed or again.removed)
    assert server.automations() == found


def test_a_gate_that_holds_calls_the_webhook_with_the_model_and_the_reason(server: Server, webhook: list[dict[str, Any]]) -> None:
    assert install(server.api).alerts
    before = server.automations()
    assert set(install(server.api).kept) == NAMES and server.automations() == before
    checks = [{"name": "loads", "passed": True}, {"name": 'exact match "at most" 1 point lower', "passed": False}]
    server.emit("cartwright.gate.hold", "cartwright.model.shop-intent", verdict="hold", checks=checks, run="r1")
    (posted,) = until(lambda: webhook, "the webhook was not called")
    assert posted["text"] == 'shop-intent: the gate says hold; not passed: exact match "at most" 1 point lower'
    assert posted["automation"] == "gate-hold" and posted["resource"] == "cartwright.model.shop-intent"
    assert posted["details"] == {"verdict": "hold", "checks": checks, "run": "r1"}


def test_the_webhook_stays_without_the_variable_and_follows_it_when_it_changes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARTWRIGHT_ALERT_WEBHOOK", "http://127.0.0.1:9/other")
    install(server.api)
    monkeypatch.delenv("CARTWRIGHT_ALERT_WEBHOOK")
    assert install(server.api).alerts and set(install(server.api).kept) == NAMES
    block = server.ask(f"block_types/slug/webhook/block_documents/name/{WEBHOOK}?include_secrets=true")
    assert block["data"]["url"] == "http://127.0.0.1:9/other"


def test_what_is_not_in_the_file_is_removed_what_was_switched_off_stays_off_and_others_are_left_alone(
    server: Server, tmp_path: Path
) -> None:
    install(server.api)
    before = server.automations()
    server.ask(f"automations/{before['gate-hold']['id']}", {"enabled": False}, method="PATCH")

    def change(entries: dict[str, dict[str, Any]]) -> None:
        del entries["gate-inconclusive"]
        entries["gate-hold"]["description"] = "Another one."

    done = install(server.api, changed_file(tmp_path, change))
    found = server.automations()
    assert done.removed == ("gate-inconclusive",) and done.changed == ("gate-hold",) and "gate-inconclusive" not in found
    assert found["gate-hold"]["description"] == "Another one." and found["gate-hold"]["enabled"] is False
    assert found["by hand"] == before["by hand"]
    assert {found[name]["id"] for name in found} <= {known["id"] for known in before.values()}
    back = install(server.api)
    assert back.added == ("gate-inconclusive",) and server.automations()["gate-hold"]["enabled"] is False
    server.ask(f"automations/{before['gate-hold']['id']}", {"enabled": True}, method="PATCH")


def test_drift_starts_one_retraining_and_no_second_within_the_cooldown(server: Server, webhook: list[dict[str, Any]]) -> None:
    install(server.api)
    server.ask(f"automations/{server.automations()['drift-retrain']['id']}", {"enabled": True}, method="PATCH")
    for _ in range(3):
        server.emit("cartwright.drift.found", "cartwright.model.shop-intent")
    server.emit("cartwright.teacher.budget", "cartwright.teacher.gpt", stopped="its budget")  # events are judged in their order
    until(lambda: [post for post in webhook if post["automation"] == "teacher-budget"], "the last event was not judged")
    (run,) = until(lambda: server.ask("flow_runs/filter", {}), "nothing was started")
    assert run["parameters"] == {"profile": "standard"} and run["state_type"] == "SCHEDULED"
    assert len([post for post in webhook if post["automation"] == "drift-found"]) == 1


def test_a_running_run_whose_heartbeats_stop_becomes_crashed(server: Server, tmp_path: Path) -> None:
    install(server.api, changed_file(tmp_path, lambda entries: entries["zombie-run"]["trigger"].update(within=10)))
    flow = server.ask("flows/", {"name": "zombie"})["id"]
    run = server.ask("flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
    server.emit("prefect.flow-run.heartbeat", f"prefect.flow-run.{run}")
    state = until(lambda: (s := server.ask(f"flow_runs/{run}")["state"])["type"] == "CRASHED" and s, "it is still running")
    assert "No heartbeat" in state["message"]


def test_a_deployment_that_is_not_there_is_an_error(server: Server, tmp_path: Path) -> None:
    file = changed_file(tmp_path, lambda entries: entries["drift-retrain"]["actions"][0].update(deployment="retrain/moon"))
    before = server.automations()
    with pytest.raises(UserError, match="drift-retrain: deployment = 'retrain/moon'"):
        install(server.api, file)
    assert server.automations() == before


@pytest.mark.fast
@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"name": "a", "description": "", "trigger": {}, "alerts": "x"}, "a: alerts"),
        ({"name": "a", "trigger": {}}, "a: description"),
    ],
)
def test_an_entry_that_is_wrong_is_named(tmp_path: Path, entry: dict[str, Any], field: str) -> None:
    file = tmp_path / "automations.yaml"
    file.write_text(yaml.safe_dump({"automations": [entry]}))
    with pytest.raises(UserError, match=field):
        read(file)
    file.write_text(yaml.safe_dump({"automations": [{"name": "a", "description": "", "trigger": {}}] * 2}))
    with pytest.raises(UserError, match="is there twice"):
        read(file)


@pytest.mark.fast
def test_every_automation_of_the_file_is_one_that_prefect_takes() -> None:
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.server.utilities.user_templates import validate_user_template

    deployments = yaml.safe_load((REPOSITORY / "deployments" / "prefect.yaml").read_text())["deployments"]
    known = {f"{deployment['entrypoint'].partition(':')[2]}/{deployment['name']}" for deployment in deployments}
    entries = {entry.name: entry for entry in read()}
    assert len(entries) == len(NAMES) == 8 and len(ALERTS) == 6
    for entry in entries.values():
        trigger = EventTrigger.model_validate(entry.trigger)
        assert set(entry.trigger) <= set(EventTrigger.model_fields) and trigger.expect and not trigger.match.matches_every_resource()
        assert entry.alert or entry.actions
        if entry.alert:
            validate_user_template(PAYLOAD.format(alert=entry.alert))
        assert {action["deployment"] for action in entry.actions if "deployment" in action} <= known
    zombie = EventTrigger.model_validate(entries["zombie-run"].trigger)
    waiting = {f"prefect.flow-run.{state}" for state in ("Suspended", "Paused", "AwaitingRetry")}  # these send no heartbeats
    assert zombie.expect > waiting and zombie.posture == Posture.Proactive and zombie.within.total_seconds() >= 2 * 30
    assert not entries["drift-retrain"].enabled and OURS.startswith("cartwright")
