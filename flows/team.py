"""Standing servers for a team on one host: Prefect, MLflow, workers, and what is deployed to them. All of it listens on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock

from flows import automations
from flows.automations import Installed
from flows.deploying import ORCHESTRATOR, SOURCE, Server, worker_command
from tasks.core import hardware
from tasks.core import settings as environment
from tasks.core.settings import Settings
from tasks.core.tracking import write_ahead
from tasks.domain.errors import UserError

HOST = "127.0.0.1"
HEALTHY_WITHIN_S = 120
ENDED_WITHIN_S = 15
CLOCK_S = 3  # the time of a process's start follows the system clock, which may be set


@dataclass(frozen=True)
class Service:
    """A process that `up` started. A process id is used again by the kernel; with the time of its start it is unique."""

    name: str
    pid: int
    started: float
    log: str

    def process(self) -> psutil.Process | None:
        """The process, if it is still the one that was started."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < CLOCK_S
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Team:
    """The services of one home."""

    def __init__(self, settings: Settings, prefect_port: int, mlflow_port: int) -> None:
        self.settings = settings
        self.prefect = f"http://{HOST}:{prefect_port}"
        self.mlflow = f"http://{HOST}:{mlflow_port}"
        self._ports = {"Prefect": prefect_port, "MLflow": mlflow_port}
        self._state = settings.home / "team.json"
        self._server = Server(f"{self.prefect}/api", self._environment())

    def up(self, gpu: bool) -> Installed:
        """Start what is not running yet, wait until it is healthy, and deploy.

        Returns:
            What became of the automations.

        Raises:
            UserError: a port is taken, or a service does not become healthy.
        """
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with FileLock(self.settings.home / "team.lock"):
            running = {service.name: service for service in self.services() if service.process()}
            self._check_ports(running)
            prefect_command = ["prefect", "server", "start", "--host", HOST, "--port", str(self._ports["Prefect"])]
            self._ensure(running, "Prefect", prefect_command)
            write_ahead(environment.mlflow_storage(self.settings)[0])
            self._ensure(running, "MLflow", self._mlflow_command())
            self._wait(running["Prefect"], f"{self.prefect}/api/health")
            pools = [ORCHESTRATOR, "cpu-pool", *(["gpu-pool"] if gpu or hardware.gpu() else [])]
            self._server.deploy("process")
            automated = automations.install(self._server.api)
            for pool in pools:
                self._ensure(running, f"worker of {pool}", worker_command(pool))
            self._wait(running["MLflow"], f"{self.mlflow}/health")
            for pool in pools:
                self._wait_for_worker(running[f"worker of {pool}"], pool)
            return automated

    def down(self) -> list[str]:
        """End exactly what `up` started, and what that started; the names of what was running."""
        ended = []
        with FileLock(self.settings.home / "team.lock"):
            for service in reversed(self.services()):  # workers first: runs they started end with them
                if process := service.process():
                    _end(process)
                    ended.append(service.name)
            self._state.unlink(missing_ok=True)
        return ended

    def services(self) -> list[Service]:
        """What was started and not ended by `down`; some of it may have died."""
        if not self._state.is_file():
            return []
        return [Service(**entry) for entry in json.loads(self._state.read_text(encoding="utf-8"))["services"]]

    def _check_ports(self, running: Mapping[str, Service]) -> None:
        """What runs already keeps its ports; others must be free. Nothing is started if one is not."""
        known = json.loads(self._state.read_text(encoding="utf-8"))["ports"] if running else self._ports
        for name, port in self._ports.items():
            if known[name] != port:
                mend = "`make down` first"
                raise UserError(f"--{name.lower()}-port", port, f"is not where {name} was started", allowed=[known[name]], mend=mend)
            if name not in running and _answers(port):
                mend = "End the program that listens there, or choose another port"
                raise UserError(f"--{name.lower()}-port", port, "is in use by another program", mend=mend)

    def _mlflow_command(self) -> list[str]:
        # Files are written to where they lie and not through the server, so that a run without it finds them too. Where records and files
        # lie is in the environment: a database's address may hold a password, and command lines can be read by everyone.
        return ["mlflow", "server", "--host", HOST, "--port", str(self._ports["MLflow"]), "--workers", "1", "--no-serve-artifacts"]

    def _ensure(self, running: dict[str, Service], name: str, command: list[str]) -> None:
        if name in running:
            return
        log = self.settings.home / "logs" / f"{name.lower().replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=SOURCE,
                start_new_session=True,
            )
        running[name] = Service(name, process.pid, psutil.Process(process.pid).create_time(), str(log))
        kept = {"ports": self._ports, "services": [asdict(service) for service in running.values()]}
        new = self._state.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        new.replace(self._state)

    def _environment(self) -> dict[str, str]:
        """What servers, workers and the runs they start are told: the same home and the same addresses."""
        backend, artifacts = environment.mlflow_storage(self.settings)
        return {
            **environment.team_environment(),
            "MLFLOW_BACKEND_STORE_URI": backend,
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts,
            "CARTWRIGHT_HOME": str(self.settings.home),
            "CARTWRIGHT_SOURCE": str(SOURCE),
            "PREFECT_API_URL": f"{self.prefect}/api",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six more processes, for evaluations that are not ours
        }

    def _wait(self, service: Service, url: str) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        while time.monotonic() < deadline and service.process():
            try:
                with urllib.request.urlopen(url, timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise UserError(service.name, url, "does not answer", mend=f"Its log says why: {service.log}")

    def _wait_for_worker(self, service: Service, pool: str) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        while time.monotonic() < deadline and service.process():
            workers = self._server.ask(f"work_pools/{pool}/workers/filter", {}) or []
            # One of the same name that was ended a moment ago is called online for a while: it must have been heard since.
            if any(_moment(worker["last_heartbeat_time"]) > service.started for worker in workers):
                return
            time.sleep(0.3)
        raise UserError(service.name, pool, "does not come online", mend=f"Its log says why: {service.log}")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _moment(time_: str | None) -> float:
    """Seconds since the epoch of a time as the API writes it; 0 for none."""
    return datetime.fromisoformat(time_).timestamp() if time_ else 0.0


def _end(process: psutil.Process) -> None:
    """End a process and all its descendants: first asked, then killed."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        _signal(member, kill=False)
    _, alive = psutil.wait_procs(family, ENDED_WITHIN_S)
    for member in alive:
        _signal(member, kill=True)
    psutil.wait_procs(alive, ENDED_WITHIN_S)


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
