"""Where a cycle happens: a home on a disk of its own, which goes back to what an undisturbed run left, servers, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_server import free_port
from tasks.core.manifests import MANIFEST, Manifest
from tests.chaos.command import Command, Imported, start
from tests.chaos.pipelines import Pipeline
from tests.chaos.proxy import Proxy, serving
from tests.fault_server import KEY, Faults
from tests.lessons import lesson

REGISTER = "register"  # no artefact is made in it; what it copies lies in a folder of its own meanwhile
MODELS = ("logged_model", "registered_model", "model_version")  # how MLflow's tables about models begin


def can_mount(folder: Path) -> bool:
    """Whether this user may mount file systems here, by trying."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


class World:
    """One home at a time, for one pipeline.

    Args:
        folder: for the disk and what is copied onto it.
        mounting: whether the home gets a file system of its own.
    """

    def __init__(self, pipeline: Pipeline, folder: Path, mounting: bool, teacher: Faults, proxy: Proxy) -> None:
        self.pipeline, self.mounting, self.teacher, self.proxy = pipeline, mounting, teacher, proxy
        self.folder, self.disk, self.kept = folder, folder / "disk", folder / "kept"
        self.home, self.temporary = self.disk / "home", self.disk / "tmp"
        self.log = folder / "mlflow-server.log"
        self.through_server = False
        self.reference: dict[tuple[str, str], Manifest] = {}
        self.report: dict[str, Any] = {}
        self._imported: list[Imported] = []
        self._under_way: list[Command] = []
        self.second: Command | None = None
        self.damaged: set[Path] = set()
        self.prepared_answers = 0  # wrong ones, of the servers
        self._commands = 0
        self._mlflow: subprocess.Popen[bytes] | None = None

    # The home ----------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Path:
        return self.home / "store"

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The disk, with the home of an undisturbed run on it, which is what every cycle begins from."""
        self.disk.mkdir(parents=True)
        if self.mounting:
            size = f"size={self.pipeline.disk_mb}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(self.disk)], check=True)
        try:
            self.temporary.mkdir()
            first = self.start()
            if not first.wait(self.pipeline.limit_s) or first.exit_code:
                raise RuntimeError(f"the undisturbed run failed:\n{first.output}")
            self.reference = {(m.kind, m.key): m for m in self.artefacts()}
            self.report = self.latest_report()
            shutil.copytree(self.disk, self.kept, symlinks=True)
            yield
        finally:
            try:
                self.end_processes()
                self.end_mlflow()
                for imported in self._imported:
                    imported.close()
            finally:
                if self.mounting:
                    subprocess.run(["umount", "-l", str(self.disk)], check=True)  # whoever has a file open keeps that alone

    def restore(self) -> None:
        """The home as the undisturbed run left it."""
        self.end_processes()
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.kept, self.disk, symlinks=True, dirs_exist_ok=True)
        self.teacher.faults.clear()
        self.teacher.requests.clear()
        self.proxy.faults.clear()
        self.through_server = False
        self.second = None
        self.damaged.clear()
        self.prepared_answers = 0

    @property
    def heard(self) -> bool:
        """Whether a wrong answer was given, where some were prepared."""
        return not self.prepared_answers or len(self.teacher.faults) + len(self.proxy.faults) < self.prepared_answers

    def artefacts(self) -> list[Manifest]:
        """Those that there are, in the order they were made in."""
        found = sorted(self.store.glob(f"*/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
        return [Manifest.model_validate_json(path.read_bytes()) for path in found]

    def latest_report(self) -> dict[str, Any]:
        """What the last run that ended well says of itself; nothing where reports are no part of the pipeline."""
        path = self.home / "reports" / "latest" / "report.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    def forget_models(self) -> None:
        """No model is logged or registered, as if the undisturbed run had ended before: the next has to log, register and promote it."""
        with closing(sqlite3.connect(self.home / "mlflow.db")) as database, database:
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                if table.startswith(MODELS):
                    database.execute(f"delete from {table}")
            database.execute("delete from inputs where source_type = 'RUN_OUTPUT'")
        for folder in (self.home / "mlflow-artifacts").glob("*/models"):
            shutil.rmtree(folder)

    # The command -------------------------------------------------------------------------------------------------

    def start(self, beside: bool = False, other: bool = False) -> Command:
        """Give the command.

        Args:
            beside: while the one before goes on.
            other: with another configuration.
        """
        variables = {
            **os.environ,
            "CARTWRIGHT_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "OPENAI_API_KEY": KEY,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is gone is noticed in seconds
        }
        if self.through_server:
            variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.proxy.server_port}"
        teacher = f"http://127.0.0.1:{self.teacher.server_port}/v1"
        arguments = [part.format(teacher=teacher) for part in self.pipeline.arguments + (self.pipeline.other if other else ())]
        self._commands += 1
        output = self.folder / f"output-{self._commands}"
        if not self.pipeline.imported:
            command = start([sys.executable, *arguments], variables, output)
        else:
            while len(self._imported) <= beside:
                self._imported.append(Imported(self.pipeline.imported))
            command = self._imported[beside].start(arguments, variables, output)
        self._under_way = [given for given in self._under_way if given.runs] + [command]
        return command

    def await_stage(self, command: Command, kind: str) -> bool:
        """Wait until a stage of this kind computes, or models are registered; False if the command ends first."""
        while command.runs:
            if any((self.home / "tmp").glob("*") if kind == REGISTER else (self.store / ".partial").glob(f"{kind}-*")):
                return True
            time.sleep(0.005)
        return False

    def processes(self) -> list[psutil.Process]:
        """All that work for this home."""
        # A command that was forked keeps the environment of another in the kernel's eyes.
        found = []
        for command in self._under_way:
            with suppress(psutil.NoSuchProcess):  # it ends while it is looked at
                found += [psutil.Process(command.pid)] if command.runs else []
        for process in psutil.process_iter(["environ", "status"]):
            here = (process.info["environ"] or {}).get("CARTWRIGHT_HOME") == str(self.home)
            if here and process not in found and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def end_processes(self) -> None:
        """Kill whatever is left of a cycle."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    # MLflow's server ---------------------------------------------------------------------------------------------

    def start_mlflow(self) -> None:
        """A real server of the home's records, behind the proxy; one that runs already is kept, since its start takes long."""
        self.through_server = True
        if self._mlflow and self._mlflow.poll() is None:
            return
        port = free_port()
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
        variables = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.home / 'mlflow.db'}",
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": (self.home / "mlflow-artifacts").as_uri(),
            "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # the database is another file in the next cycle
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with self.log.open("ab") as log:
            self._mlflow = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]], stdout=log, stderr=log, env=variables, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not _answers(port):
            if self._mlflow.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server does not answer; see {self.log}")
            time.sleep(0.1)
        self.proxy.behind = port

    def end_mlflow(self) -> None:
        """Kill the server and what it started."""
        self.proxy.behind = None
        if self._mlflow:
            os.killpg(self._mlflow.pid, signal.SIGKILL)
            self._mlflow.wait()
            self._mlflow = None


def _answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def says(body: dict[str, Any]) -> str:
    """A lesson to `teach`; to others what they asked."""
    asked = str(body["messages"][-1]["content"])
    return lesson(body) if "Language:" in asked else asked.title()


@contextmanager
def a_world(pipeline: Pipeline, folder: Path) -> Iterator[World]:
    """A world with its servers, ready for cycles."""
    teacher, proxy = Faults(), Proxy()
    teacher.answer = says
    with serving(teacher), serving(proxy):
        world = World(pipeline, folder, can_mount(folder / "trial"), teacher, proxy)
        with world.prepared():
            yield world
