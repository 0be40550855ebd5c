"""What a run needs around it: a parent run in MLflow, a store, a display; and its tidy end."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast
from uuid import UUID

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from tasks.config import RUN_KEY, RunConfig
from tasks.core import hardware, ledger
from tasks.core import settings as environment
from tasks.core.artifacts import Store
from tasks.core.display import Display
from tasks.core.manifests import Name
from tasks.core.runner import Runner
from tasks.core.settings import Settings
from tasks.core.source import git_state
from tasks.core.tracking import Tracker, open_parent
from tasks.domain.errors import UserError
from tasks.report import latest_artefacts


class Run(BaseModel):
    """A pipeline run as it passes between flows: small, and the same on every machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: Name  # folders are called after it, on every machine
    mlflow_run: Name
    config: RunConfig
    started: str
    resumed: bool

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """Prefect draws up a form for every flow when it is imported. Nobody fills this one in, and all fields of a config take a second."""
        return {"title": cls.__name__, "type": "object"}


LOCK_S = 3  # who only looks whether a run was killed holds its lock for as long as MLflow takes to note that
_runners: dict[str, Runner] = {}


def teacher_secret(block: str) -> dict[str, str]:
    """The teacher's key as an environment variable for its process, from a Prefect Secret block; nothing without a block.

    Raises:
        UserError: there is no such block, or it is empty.
    """
    if not block:
        return {}
    from prefect.blocks.system import Secret

    try:
        loaded: Any = Secret.load(block)
        key = str(loaded.get()).strip()
    except ValueError:  # also when the block is of another type
        mend = "Make it in the Prefect UI (Blocks, Secret), or give the key by the environment and leave teacher.secret_block empty"
        raise UserError("teacher.secret_block", block, "is no Secret block of this Prefect API", mend=mend) from None
    if not key:
        raise UserError("teacher.secret_block", block, "is empty", mend="Put the teacher's key into it")
    return {environment.TEACHER_KEY: key}


def tell(what: str, name: str, facts: Mapping[str, Any], kind: str = "model") -> None:
    """A Prefect event about a registered model, or another kind of thing of ours, for automations."""
    from prefect.events import emit_event

    about = {"prefect.resource.id": f"cartwright.{kind}.{name}", "prefect.resource.name": name}
    emit_event(f"cartwright.{what}", about, payload=dict(facts))


def runner(run: Run) -> Runner:
    """The runner of an open run."""
    return _runners[run.run_id]


def experiment_name(config: RunConfig) -> str:
    """One MLflow experiment for each domain and base model."""
    base = config.base_model.source.rstrip("/").split("/")[-1]
    return f"{Path(config.data.domain).name}/{base}"


@contextmanager
def open_run(config: RunConfig, settings: Settings, display: Display, here: bool = True) -> Iterator[Run]:
    """Open a run of a resolved configuration, or take one up again that was interrupted.

    Args:
        here: its stages run in this process, and not on workers.

    Raises:
        UserError: the home cannot be written, the same configuration is running already, or somebody renamed its run to what is no name.
    """
    store = Store(settings.store_uri, settings.home)
    store.check_writable()
    if here:
        store.read_ahead(latest_artefacts(settings, config.profile))  # while MLflow and Prefect are waited for
    running = UserError("run", config.profile, "the same configuration is running already", mend="Wait for it, or stop it first")
    with alone(settings, f"run-{config.key()}", running):
        now = datetime.now(UTC)
        git = git_state()
        name = f"{now:%Y%m%d-%H%M%S}-{config.profile}-{config.key()[:RUN_KEY]}"
        tags = {
            "cartwright.profile": config.profile,
            "mlflow.source.git.commit": str(git["commit"] or ""),
            "cartwright.git_dirty": str(git["dirty"]).lower(),
            "cartwright.hardware": hardware.hardware_class(),
        }
        tags |= {f"cartwright.{name}": value for name, value in _flow_run().items()}
        tags |= opened(settings, f"run-{config.key()}")
        tracker = open_parent(settings, experiment_name(config), config.key(), name, tags, mine=lambda left: _mine(left, tags, config))
        with ending(tracker):
            run = _run_of(tracker, config, now)
            _name_flow_run(run.run_id)
            ledger.begin()
            with _known(run, Runner(run.run_id, settings, store, tracker, display)):
                yield run


def _run_of(tracker: Tracker, config: RunConfig, now: datetime) -> Run:
    started = now.isoformat(timespec="seconds")
    try:
        return Run(run_id=tracker.run_name, mlflow_run=tracker.parent, config=config, started=started, resumed=tracker.resumed)
    except ValidationError:
        mend = "Rename it there with letters, digits, spaces and . + = @ - only, and run the same command again"
        raise UserError("run", tracker.run_name, "has a name in MLflow that no folder can have", mend=mend) from None


def _name_flow_run(name: str) -> None:
    """Let the flow run have the name of the run, which it has in MLflow and in the reports."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    if flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run.id), name=name)


def _mine(left: Mapping[str, str], tags: Mapping[str, str], config: RunConfig) -> bool:
    """Whether a run of the same configuration in MLflow may be taken up: one that this home was killed in, or this very flow run.

    Args:
        left: its tags; `tags`: those of this run.

    Raises:
        UserError: another home's flow run is working on it.
    """
    if left.get("cartwright.flow_run") and left.get("cartwright.flow_run") == tags.get("cartwright.flow_run"):
        return True
    if left.get("mlflow.source.git.commit") != tags["mlflow.source.git.commit"]:
        return False  # other code made what is in it
    if left.get("cartwright.opened_by") in (None, tags["cartwright.opened_by"]):
        return True  # a lock of this home says that nobody works on it
    return _has_ended(left.get("cartwright.flow_run"), config)


def _has_ended(flow_run: str | None, config: RunConfig) -> bool:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    if not flow_run:
        return True
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run)).state
        except ObjectNotFound:  # of another Prefect server
            return False
    if state and not state.is_final():
        mend = f"Wait for the flow run {flow_run}, or cancel it first"
        raise UserError("run", config.profile, "the same configuration is running already, from another home", mend=mend)
    return True


def _flow_run() -> dict[str, str]:
    """Id of the Prefect flow run, and its address where the server has pages."""
    from prefect.runtime import flow_run
    from prefect.utilities.urls import url_for

    if not flow_run.id:
        return {}
    address = url_for("flow-run", obj_id=flow_run.id)
    return {"flow_run": str(flow_run.id), **({"flow_run_url": address} if address else {})}


@contextmanager
def join_run(run: Run, settings: Settings, display: Display, pool: str) -> Iterator[Runner]:
    """Take part in a run that another process opened, on a worker of `pool`.

    Raises:
        UserError: this machine has another MLflow than that process.
    """
    tracker = Tracker(settings, run.mlflow_run)
    joined = Runner(run.run_id, settings, Store(settings.store_uri, settings.home), tracker, display, pool)
    ledger.begin()
    with _known(run, joined):
        yield joined


@contextmanager
def _known(run: Run, opened: Runner) -> Iterator[None]:
    """Let `runner` find the runner of a run."""
    _runners[run.run_id] = opened
    try:
        yield
    finally:
        del _runners[run.run_id]


def run_log() -> Console:
    """A console whose lines are log lines of the flow run, which the Prefect UI shows while it goes on."""
    from prefect import get_run_logger

    logger = get_run_logger()

    class Lines(io.TextIOBase):
        def write(self, text: str) -> int:
            for line in text.splitlines():
                if line.strip():
                    logger.info(line.strip())
            return len(text)

    return Console(file=cast(IO[str], Lines()), highlight=False, soft_wrap=True, force_terminal=False)


def opened(settings: Settings, lock: str) -> dict[str, str]:
    """Tags of a parent run that this home opens under a lock of `alone`: what tells, later, that nobody works on it any more."""
    return {"cartwright.opened_by": f"{socket.gethostname()}:{settings.home}", "cartwright.lock": lock}


@contextmanager
def alone(settings: Settings, name: str, running: UserError) -> Iterator[None]:
    """Hold the lock of a name, which the kernel frees on death; `running` is raised if another process holds it."""
    (settings.home / "locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home / "locks" / f"{name}.lock")
    try:
        lock.acquire(timeout=LOCK_S)
    except Timeout:
        raise running from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def ending(tracker: Tracker) -> Iterator[None]:
    """End the run in MLflow as what happens within ends: finished, failed or killed."""
    from prefect.exceptions import Pause, TerminationSignal

    try:
        yield
    except Pause:  # a person is asked; the run is taken up again with the answer
        tracker.end("FINISHED")
        raise
    except (KeyboardInterrupt, TerminationSignal):
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise
    else:
        tracker.end("FINISHED")
