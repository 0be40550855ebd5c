"""A team's servers on one host: real Prefect and MLflow servers and a worker, in a home and on ports of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import prefect
import psutil
import pytest
import yaml

from flows.deploying import DEPLOYMENTS, POOLS, Server, job_template, pools
from flows.placement import stage_flows_on
from flows.team import Service
from tasks.config import load_config, profiles
from tasks.domain.errors import UserError
from tests.places import is_place

REPOSITORY = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Home:
    """A home, its two ports, and the commands a person would give."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefect, self.mlflow = folder, free_port(), free_port()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not is_place(name)}
        variables |= {"CARTWRIGHT_HOME": str(self.folder), "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True, env=variables, cwd=REPOSITORY
        )

    def up(self) -> subprocess.CompletedProcess[str]:
        return self.command("up", "--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow))

    def services(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "team.json").read_text())["services"]

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        return Server(f"http://127.0.0.1:{self.prefect}/api", {}).ask(path, body, method=method)


def name_of(deployment: dict[str, Any]) -> str:
    """`<flow>/<name>` of a deployment in the file."""
    module, _, attribute = deployment["entrypoint"].partition(":")
    return f"{getattr(import_module(module), attribute).name}/{deployment['name']}"


def deployment_of(home: Home, name: str) -> str:
    """The id of the deployment `<flow>/<name>` on the server."""
    flow, _, deployment = name.partition("/")
    return str(home.ask(f"deployments/name/{flow}/{deployment}")["id"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("team") / "home")
    started = home.up()
    assert started.returncode == 0, started.stdout + started.stderr
    assert f"http://127.0.0.1:{home.prefect}" in started.stdout and f"http://127.0.0.1:{home.mlflow}" in started.stdout
    yield home
    home.command("down")


def test_servers_answer_pools_and_deployments_are_there_and_schedules_wait_to_be_switched_on(team: Home) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{team.mlflow}/health", timeout=10) as answer:
        assert answer.read() == b"OK"
    flows = {flow["id"]: flow["name"] for flow in team.ask("flows/filter", {})}
    deployments = {f"{flows[d['flow_id']]}/{d['name']}": d for d in team.ask("deployments/filter", {})}
    wanted = {name_of(d): d for d in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]}
    assert set(deployments) == set(wanted)
    for name, found in deployments.items():
        assert found["work_pool_name"] == wanted[name]["work_pool"]["name"] and found["description"] == wanted[name]["description"]
        assert ("concurrency_limit" in wanted[name]) == bool(found["global_concurrency_limit"])
        assert [s["active"] for s in found["schedules"]] == [False] * len(wanted[name].get("schedules", []))
    assert {pool["name"] for pool in team.ask("work_pools/filter", {})} == {"orchestrator", "cpu-pool", "gpu-pool"}
    for pool in ("orchestrator", "cpu-pool"):
        assert [w["status"] for w in team.ask(f"work_pools/{pool}/workers/filter", {})] == ["ONLINE"]


def test_up_twice_is_harmless_keeps_a_schedule_that_was_switched_on_and_removes_one_that_is_not_in_the_file(team: Home) -> None:
    def deployed() -> dict[str, Any]:
        return {(d["flow_id"], d["name"]): (d["id"], d["parameters"]) for d in team.ask("deployments/filter", {})}

    def schedules() -> dict[str, tuple[str, bool]]:
        found = [s for d in team.ask("deployments/filter", {}) for s in d["schedules"]]
        return {s["slug"]: (s["id"], s["active"]) for s in found}

    before, known, retrain = team.services(), deployed(), deployment_of(team, "retrain/cpu")
    (weekly, _), nightly = schedules()["weekly"], schedules()["nightly"]
    team.ask(f"deployments/{retrain}/schedules/{weekly}", {"active": True}, "PATCH")
    extra = {"schedule": {"cron": "0 1 * * *", "timezone": "UTC"}, "active": False, "slug": "of-yesterday"}
    team.ask(f"deployments/{retrain}/schedules", [extra])
    assert set(schedules()) == {"weekly", "nightly", "of-yesterday"}
    again = team.up()
    assert again.returncode == 0, again.stderr
    assert team.services() == before and deployed() == known and schedules() == {"weekly": (weekly, True), "nightly": nightly}
    moved = team.command("up", "--prefect-port", str(free_port()), "--mlflow-port", str(team.mlflow))
    assert moved.returncode == 2 and f"Allowed: {team.prefect}" in moved.stderr and "make down" in moved.stderr


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"profile": "huge"}, "profile"),
        ({"max_accuracy_loss": 3}, "max_accuracy_loss"),
        ({"formats": ["Q9_0"]}, "formats"),
    ],
)
def test_the_form_refuses_what_is_not_allowed(team: Home, parameters: dict[str, Any], field: str) -> None:
    deployment = deployment_of(team, "retrain/cpu")
    with pytest.raises(urllib.error.HTTPError) as refused:
        team.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters, "enforce_parameter_schema": True})
    assert refused.value.code in (409, 422) and field in refused.value.read().decode()


def test_a_run_that_is_asked_for_is_taken_up_by_the_worker_and_says_what_is_wrong_with_it(team: Home) -> None:
    deployment = deployment_of(team, "retrain/cpu")
    asked = {"parameters": {"profile": "smoke", "overrides": {"train.epochs": -1}}, "state": {"type": "SCHEDULED"}}
    run = team.ask(f"deployments/{deployment}/create_flow_run", asked)["id"]
    deadline = time.monotonic() + 120
    while (state := team.ask(f"flow_runs/{run}")["state"])["type"] not in (
        "FAILED",
        "CRASHED",
        "COMPLETED",
    ) and time.monotonic() < deadline:
        time.sleep(1)
    assert state["type"] == "FAILED" and "train.epochs = -1" in state["message"]


def test_a_port_that_is_taken_is_an_error_and_starts_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with socket.socket() as other:
        other.bind(("127.0.0.1", home.prefect))
        other.listen()
        refused = home.up()
    assert (
        refused.returncode == 2
        and f"--prefect-port = {home.prefect}: is in use" in refused.stderr
        and not (home.folder / "team.json").exists()
    )


@pytest.mark.fast
def test_a_process_id_that_the_kernel_has_used_again_is_not_ours() -> None:
    me = psutil.Process()
    assert Service("x", me.pid, me.create_time(), "").process() == me
    assert Service("x", me.pid, me.create_time() - 5, "").process() is None
    assert Service("x", 2**22 + 1, 0.0, "").process() is None


@pytest.mark.fast
def test_every_deployment_points_at_a_flow_and_has_parameters_that_it_takes() -> None:
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    assert len({name_of(d) for d in deployments}) == len(deployments)
    for_people = [d for d in deployments if "stage" not in d["tags"]]
    checked = 0
    for deployment in for_people:
        module, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(import_module(module), name)
        for parameters in (deployment["parameters"], *(s.get("parameters", {}) for s in deployment.get("schedules", []))):
            valid = flow.validate_parameters(deployment["parameters"] | parameters)
            if flow.name == "retrain":
                load_config(valid["profile"])
                assert valid["profile"] in flow.parameters.properties["profile"]["enum"] == profiles()
            checked += 1
    assert (len(deployments), len(for_people), checked) == (16, 4, 6)


@pytest.mark.fast
def test_every_stage_flow_is_deployed_where_a_retraining_looks_for_it() -> None:
    deployed = {name_of(d) for d in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]}
    for machine in ("cpu", "gpu"):
        wanted = {f"{flow}/{machine}" for flow in stage_flows_on(machine)}
        assert wanted and wanted <= deployed
    stages = {name for name in deployed if not name.startswith(("retrain/", "drift/"))}
    assert stages == {f"{flow}/{machine}" for machine in ("cpu", "gpu") for flow in stage_flows_on(machine)}


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_every_pool_has_job_variables_that_its_kind_of_worker_takes(kind: Any) -> None:
    known = json.loads(next((Path(prefect.__file__).parent / "server").rglob("aggregate-worker-metadata.json")).read_text())
    variables = {"PREFECT_API_URL": "http://p/api", "MLFLOW_TRACKING_URI": "http://m", "CARTWRIGHT_STORE": "s3://b/store"}
    used = {d["work_pool"]["name"] for d in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]}
    found = pools(kind, variables)
    assert set(found) == used and set(yaml.safe_load(POOLS.read_text())["pools"]) == {"process", "docker", "kubernetes"}
    for job_variables in found.values():
        properties = job_template(known, kind, job_variables)["variables"]["properties"]
        assert {name: properties[name]["default"] for name in job_variables} == job_variables
    if kind != "process":
        assert found["cpu-pool"]["env"]["CARTWRIGHT_STORE"] == "s3://b/store" and found["gpu-pool"]["image"] != found["cpu-pool"]["image"]
        with pytest.raises(UserError, match="CARTWRIGHT_STORE: is not set, and containers need it"):
            pools(kind, {name: value for name, value in variables.items() if name != "CARTWRIGHT_STORE"})


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("MLFLOW_TRACKING_URI", "postgresql://mlflow:planted-pw@db/mlflow"),
        ("MLFLOW_TRACKING_URI", "postgresql://mlflow:planted/pw#1@db/mlflow"),
        ("MLFLOW_TRACKING_URI", "postgresql://db/mlflow?user=mlflow&password=planted-pw"),
        ("CARTWRIGHT_STORE", "s3://AKIAPLANTED:planted/pw@bucket"),
        ("PREFECT_API_URL", "https://ana:planted-pw@prefect/api"),
        ("MLFLOW_TRACKING_URI", "https://planted-token@mlflow/api"),
    ],
)
def test_no_password_of_an_address_gets_into_a_job_template(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, address: str) -> None:
    variables = {"PREFECT_API_URL": "http://p:4200/api", "MLFLOW_TRACKING_URI": "http://m:5000/@team", "CARTWRIGHT_STORE": "s3://b/store"}
    told: list[Any] = []
    known = json.loads(next((Path(prefect.__file__).parent / "server").rglob("aggregate-worker-metadata.json")).read_text())

    def ask(self: Server, path: str, body: Any = None, *_: Any, **__: Any) -> Any:
        told.append(body)
        return known if "metadata" in path else [] if path == "deployments/filter" else None

    monkeypatch.setattr(Server, "ask", ask)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    Server("http://p/api", variables).deploy(kind)
    assert "s3://b/store" in json.dumps(told) and "http://m:5000" in json.dumps(told)
    with pytest.raises(UserError, match=f"{name}: holds a password") as refused:
        Server("http://p/api", {**variables, name: address}).deploy(kind)
    assert "planted" not in str(refused.value).lower() and "planted" not in json.dumps(told).lower()


@pytest.mark.fast
@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_clear_message(cartwright: Any) -> None:
    refused = cartwright("deploy", PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")
    assert refused.returncode == 2 and "does not answer" in refused.stderr and "cartwright up" in refused.stderr
    for command in (("deploy",), ("worker", "cpu-pool")):
        unknown = cartwright(*command)
        assert unknown.returncode == 2 and "PREFECT_API_URL: is not set" in unknown.stderr


def test_pools_of_another_kind_are_not_overwritten(team: Home, cartwright: Any) -> None:
    addresses = {"MLFLOW_TRACKING_URI": "http://m", "CARTWRIGHT_STORE": "s3://b/store"}
    refused = cartwright("deploy", "--pools", "docker", PREFECT_API_URL=f"http://127.0.0.1:{team.prefect}/api", **addresses)
    assert refused.returncode == 2 and "--pools = 'docker'" in refused.stderr and "Allowed: process" in refused.stderr


def test_a_worker_of_a_pool_that_is_not_there_is_refused(team: Home, cartwright: Any) -> None:
    refused = cartwright("worker", "cpu", PREFECT_API_URL=f"http://127.0.0.1:{team.prefect}/api")
    assert (
        refused.returncode == 2 and "pool = 'cpu'" in refused.stderr and "cpu-pool" in refused.stderr and "orchestrator" in refused.stderr
    )


def test_down_ends_what_up_started_and_nothing_else(team: Home) -> None:
    """The last test of the module: afterwards nothing runs."""
    pids = [service["pid"] for service in team.services()]
    family = [member for pid in pids for member in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    ended = team.command("down")
    assert ended.returncode == 0 and "Prefect" in ended.stdout and "MLflow" in ended.stdout and "worker of cpu-pool" in ended.stdout
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert "Nothing that `up` started is running" in team.command("down").stdout
