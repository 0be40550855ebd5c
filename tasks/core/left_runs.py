"""What killed runs of a home left RUNNING in MLflow ends when the home opens its next run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from filelock import FileLock, Timeout

from tasks.core.flat import TAG
from tasks.core.settings import Settings

logger = logging.getLogger("cartwright")


def end_left_runs(client: Any, settings: Settings, kept: str, tags: Mapping[str, str]) -> None:
    """End the parent runs of this home, of whatever configuration, that nobody works on any more, and what goes on below those that have ended.

    A parent run is opened under a lock of the home, which the kernel frees when its process dies: one that is RUNNING while its lock is free,
    or held here, was killed. It ends as that, and the same configuration takes it up again.

    Args:
        kept: id of the parent run that was just opened.
        tags: those of `kept`, see `flows.session.opened`. Without `cartwright.opened_by` it is of no home, and nothing is ended.
    """
    from mlflow.exceptions import MlflowException

    if not (home := tags.get(TAG + "opened_by")):
        return
    running = _running(client)
    opened = client.get_run(kept)
    ours = tags.get(TAG + "lock") or _lock(opened)
    for run in running:
        if run.info.run_id == kept or run.data.tags.get(TAG + "opened_by") != home:
            continue
        try:
            if _lock(run) != ours:
                _end_if_free(client, settings, run)
            elif _which(run) == _which(opened):
                client.delete_run(run.info.run_id)  # MLflow's client sent a request twice, since the first answer was lost
            else:
                _end(client, run)
        except MlflowException as error:  # such as of one that was deleted meanwhile
            logger.warning("The run %s, which was killed, could not be ended in MLflow: %s", run.info.run_id, error)
    _end_orphans(client, home, running)


def _running(client: Any) -> list[Any]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: list[Any] = []
    token = None
    while page := client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token):
        found += page
        if not (token := page.token):
            break
    return found


def _lock(run: Any) -> str:
    return str(run.data.tags.get(TAG + "lock") or f"run-{run.data.tags.get(TAG + 'pipeline_key', '')}")


def _which(run: Any) -> tuple[str, str, str]:
    return run.info.experiment_id, run.info.run_name, run.data.tags.get(TAG + "pipeline_key", "")


def _end_if_free(client: Any, settings: Settings, run: Any) -> None:
    path = settings.home / "locks" / f"{_lock(run)}.lock"
    if not re.fullmatch(r"[\w.+-]+", _lock(run)) or not path.is_file():  # who can write to MLflow chooses a tag
        return
    try:
        with FileLock(path, timeout=0):
            _end(client, run)
    except Timeout:  # it goes on
        return


def _end(client: Any, run: Any) -> None:
    """End a parent run whose lock is held here, and its children, unless it has ended since it was looked for."""
    parent = run.info.run_id
    if client.get_run(parent).info.status != "RUNNING":
        return
    below = f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'"
    for child in client.search_runs([run.info.experiment_id], below):
        client.set_terminated(child.info.run_id, "KILLED")
    client.set_tag(parent, TAG + "left", "yes")
    client.set_terminated(parent, "KILLED")


def _end_orphans(client: Any, home: str, running: list[Any]) -> None:
    """End children of ours that go on, as MLflow has it, below a parent run of this home that has ended: that they ended was said, and not
    heard."""
    from mlflow.exceptions import MlflowException

    at_work = {run.info.run_id for run in running}  # or ended just now, with their children
    children: dict[str, list[str]] = {}
    for run in running:
        parent = run.data.tags.get("mlflow.parentRunId", "")
        if parent and parent not in at_work and TAG + "kind" in run.data.tags:
            children.setdefault(parent, []).append(run.info.run_id)
    for parent, ids in children.items():
        try:
            found = client.get_run(parent)
        except MlflowException:  # deleted for good, or none
            continue
        if found.info.status == "RUNNING" or found.data.tags.get(TAG + "opened_by") != home:
            continue
        for child in ids:
            try:
                if client.get_run(child).info.status == "RUNNING":  # it may have ended, and its parent after it, since they were looked for
                    client.set_terminated(child, found.info.status)
            except MlflowException as error:  # such as of one that was made twice, and deleted meanwhile
                logger.warning("The run %s, whose parent has ended, could not be ended in MLflow: %s", child, error)
