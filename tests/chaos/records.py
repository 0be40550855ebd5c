"""What MLflow must hold after a fault. Each function says what is wrong, and nothing if all is well."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from tests.chaos.command import REPOSITORY
from tests.chaos.world import World


def recorded(world: World, commands: int) -> Iterator[str]:
    """MLflow has one run for each try at most, one child for each stage of it, and none that is said to go on.

    Args:
        commands: how often the command had been given in this home before it was given again.
    """
    with closing(sqlite3.connect(world.home / "mlflow.db")) as database:
        runs = {
            run: (name, status)
            for run, name, status in database.execute("select run_uuid, name, status from runs where lifecycle_stage = 'active'")
        }
        tags = list(database.execute("select run_uuid, key, value from tags"))
        versions = Counter(database.execute("select name, value from model_version_tags where key = 'cartwright.digest'").fetchall())
        pending = database.execute("select count(*) from logged_models where status = 1 and lifecycle_stage = 'active'").fetchone()[0]
    of: dict[str, dict[str, str]] = {run: {} for run in runs}
    for run, key, value in tags:
        if run in of:
            of[run][key] = value
    for name, status in runs.values():
        if status in ("RUNNING", "SCHEDULED"):
            yield f"MLflow's run {name} is left {status}"
    children = Counter(
        (found["mlflow.parentRunId"], found.get("cartwright.kind"), found.get("cartwright.key"))
        for found in of.values()
        if "mlflow.parentRunId" in found
    )
    for (_, kind, key), times in children.items():
        if times > 1:
            yield f"MLflow has {times} runs of the {kind} {key} in one parent"
    parents = sum(found.get("cartwright.kind") == "pipeline" for found in of.values())
    if parents > commands + 1:
        yield f"MLflow has {parents} pipeline runs for {commands + 1} commands"
    for (name, _), times in versions.items():
        if times > 1:
            yield f"{times} versions of {name} have the same content"
    if pending:
        yield f"{pending} logged models are left unfinished"


def aliases(world: World) -> list[tuple[str, str, int]]:
    """Model, alias and version of every alias of a registered model."""
    with closing(sqlite3.connect(world.home / "mlflow.db")) as database:
        return database.execute("select name, alias, version from registered_model_aliases").fetchall()


def registered(world: World, anew: bool) -> Iterator[str]:
    """One version of one model is registered, whole, with the content of the undisturbed run's; it is the champion, and there is no other alias.

    Args:
        anew: there was no champion when the command was given again, so that it promoted one: nobody claims to promote any more.
    """
    with closing(sqlite3.connect(world.home / "mlflow.db")) as database:
        versions = database.execute("select name, version, status from model_versions").fetchall()
        digests = [row for (row,) in database.execute("select value from model_version_tags where key = 'cartwright.digest'")]
        claims = database.execute("select count(*) from registered_model_tags where key = 'cartwright.promoting'").fetchone()[0]
    if len(versions) != 1 or versions[0][2] != "READY":
        yield f"not one whole version is registered, but {versions}"
    elif digests != [world.report["gate"]["challenger_sha256"]]:
        yield f"what is registered is {digests}, not the model of the undisturbed run"
    if (found := aliases(world)) != (wanted := [(name, "champion", version) for name, version, _ in versions]):
        yield f"the registered model's aliases are {found}, not {wanted}"
    if anew and claims:
        yield "the claim to promote is still held"


def champion_loads(world: World, none_yet: bool = False) -> Iterator[str]:
    """Who follows the alias gets a model that answers.

    Args:
        none_yet: there may be no alias, since the command that sets it was disturbed.
    """
    if none_yet and not aliases(world):
        return
    code = "from tasks.core.registry import champion_version; from tasks.core.settings import load_settings; from tasks.registered import problem_of\nname = 'shop-intent'\nfound = champion_version(load_settings(), name)\nprint(problem_of(name, found['version']) if found else 'there is none')"
    variables = {**os.environ, "CARTWRIGHT_HOME": str(world.home)}
    said = subprocess.run([sys.executable, "-c", code], env=variables, cwd=REPOSITORY, capture_output=True, text=True)
    if said.returncode or said.stdout.strip():
        yield f"the champion: {(said.stdout or said.stderr).strip()[-300:]}"
