"""What a Prefect server is told of Cartwright: pools, deployments with their schedules, limits. Twice changes nothing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from tasks.core import settings as environment
from tasks.domain.errors import UserError
from tasks.gate import PROMOTION

SOURCE = Path(__file__).resolve().parents[1]
DEPLOYMENTS = SOURCE / "deployments" / "prefect.yaml"
POOLS = SOURCE / "deployments" / "pools.yaml"
ORCHESTRATOR = "orchestrator"  # the pool of retrainings that send their stages to other pools
PoolKind = Literal["process", "docker", "kubernetes"]
BUSY_TRIES = 40  # half a second apart
ANSWER_S = 120  # a server that nobody runs refuses at once; one on a busy machine takes its time


class Server:
    """A Prefect server, as its API answers.

    Args:
        api: its address, which ends in `/api`.
        variables: environment of the commands that talk to it.
    """

    def __init__(self, api: str, variables: Mapping[str, str]) -> None:
        self.api = api.rstrip("/")
        self._variables = dict(variables)

    def ask(self, path: str, body: Any = None, missing_is_none: bool = False, method: str | None = None) -> Any:
        """What the API answers to a request; a POST if it has a body.

        Raises:
            UserError: the server does not answer.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **environment.prefect_authorization()}
        request = urllib.request.Request(f"{self.api}/{path}", data, headers, method=method)
        for left in range(BUSY_TRIES, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code == 404 and missing_is_none:
                    return None
                if error.code == 401:
                    mend = "Set PREFECT_API_AUTH_STRING to user:password"
                    raise UserError("PREFECT_API_URL", self.api, "refuses the credentials", mend=mend) from None
                if error.code != 503 or not left:  # 503: its SQLite is locked by another request for a moment
                    raise
                time.sleep(0.5)
            except (urllib.error.URLError, TimeoutError) as error:  # the latter: it took the request and fell silent
                mend = "Start it with `cartwright up`, or set the address of a server that runs"
                reason = getattr(error, "reason", error)
                raise UserError("PREFECT_API_URL", self.api, f"does not answer ({reason})", mend=mend) from None
        return None

    def deploy(self, kind: PoolKind) -> None:
        """Make pools of a kind, and every deployment of `deployments/prefect.yaml`.

        Raises:
            UserError: a pool is of another kind, a variable is not set, or a deployment is refused.
        """
        for name, job_variables in pools(kind, self._variables).items():
            self._make_pool(name, kind, job_variables)
        if self.ask(f"v2/concurrency_limits/{PROMOTION}", missing_is_none=True) is None:
            self.ask("v2/concurrency_limits/", {"name": PROMOTION, "limit": 1})
        switched_on = {slot for slot, schedule in self._schedules() if schedule["active"]}
        command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS)]
        done = subprocess.run(command, capture_output=True, text=True, env=self._variables, cwd=SOURCE)
        # Deploying switches schedules as the file has them, also where it fails half-way, and leaves those that are not there any more.
        in_file = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))["deployments"]
        known = {(d["entrypoint"], d["name"], schedule["slug"]) for d in in_file for schedule in d.get("schedules", [])}
        for slot, schedule in self._schedules():
            path = f"deployments/{schedule['deployment_id']}/schedules/{schedule['id']}"
            if slot in switched_on and not schedule["active"]:
                self.ask(path, {"active": True}, method="PATCH")
            if schedule["slug"] and slot not in known and not done.returncode:  # those made in the UI have no slug, and are people's
                self.ask(path, method="DELETE")
        if done.returncode:
            raise UserError("deployments/prefect.yaml", DEPLOYMENTS, f"was not deployed: {(done.stdout + done.stderr).strip()[-800:]}")

    def _make_pool(self, name: str, kind: PoolKind, job_variables: Mapping[str, Any]) -> None:
        known = self.ask(f"work_pools/{name}", missing_is_none=True)
        if known and known["type"] != kind:
            mend = f"Delete it first (`prefect work-pool delete {name}`), or deploy with --pools {known['type']}"
            raise UserError(
                "--pools", kind, f"the pool {name} is there and has workers of another kind", allowed=[known["type"]], mend=mend
            )
        template = job_template(self.ask("collections/views/aggregate-worker-metadata"), kind, job_variables)
        if known:
            self.ask(f"work_pools/{name}", {"base_job_template": template}, method="PATCH")
        else:
            made = {"name": name, "type": kind, "description": "Runs Cartwright's flows", "base_job_template": template}
            self.ask("work_pools/", made)

    def _schedules(self) -> list[tuple[tuple[str, str, str | None], dict[str, Any]]]:
        """The schedules of every deployment of ours on the server, by entrypoint, deployment and slug."""
        ours = {"deployments": {"tags": {"all_": ["cartwright"]}}}
        found = self.ask("deployments/filter", ours)
        return [((d["entrypoint"], d["name"], schedule["slug"]), schedule) for d in found for schedule in d["schedules"]]


def worker_command(pool: str, name: str | None = None) -> list[str]:
    """The program that runs a pool's flows as processes of this host; called after both unless it has a name."""
    # Stages measure, so they have the host to themselves; who only waits for them does not disturb.
    alone = [] if pool == ORCHESTRATOR else ["--limit", "1"]
    return ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name or f"{pool}-{socket.gethostname()}", *alone]


def pools(kind: PoolKind, variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Job variables of each pool of a kind.

    Args:
        variables: what is put in for `{{ $NAME }}`.

    Raises:
        UserError: a variable is not set, or holds a password: whoever reads the server reads a pool's job variables.
    """

    def filled(found: re.Match[str]) -> str:
        if found[1] not in variables:
            raise UserError(found[1], None, "is not set, and containers need it", mend="Set it to an address that containers reach")
        if environment.has_password(variables[found[1]]):
            mend = "Set it to an address without one, and give it to the containers by their image or as a secret of their host"
            raise UserError(found[1], None, "holds a password, which everyone could read in the pool's job template", mend=mend)
        return variables[found[1]]

    wanted = yaml.safe_load(POOLS.read_text(encoding="utf-8"))["pools"][kind]
    return json.loads(re.sub(r"\{\{ \$(\w+) \}\}", filled, json.dumps(wanted)))


def job_template(known: Mapping[str, Any], kind: PoolKind, job_variables: Mapping[str, Any]) -> dict[str, Any]:
    """Prefect's own job template of a kind of worker, with other defaults.

    Args:
        known: what the server knows of kinds of workers (`collections/views/aggregate-worker-metadata`).
    """
    (found,) = [workers[kind] for workers in known.values() if kind in workers]
    template: dict[str, Any] = json.loads(json.dumps(found["default_base_job_configuration"]))
    for name, value in job_variables.items():
        template["variables"]["properties"][name]["default"] = value
    return template
