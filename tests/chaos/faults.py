"""What goes wrong. A fault is prepared before the command is given, strikes at its moment, and is undone before the command is given again."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import psutil

from tasks.core.manifests import MANIFEST
from tests.chaos.command import Command
from tests.chaos.world import World

Moment = Literal["before", "during", "in checkpoints"]
Strike = Callable[[World, Command | None, Random], bool]  # whether there was something to strike
DAY_S = 86_400
ASKS = ("teach", "buy")  # kinds of artefacts that are made from a teacher's answers


def nothing(world: World) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        moments: when it may strike: before the command is given, while a stage computes, or while one that keeps checkpoints does.
        kills: the command may end as it likes. Else it says in one message why it ends, if it ends.
        mounts: it needs a file system of its own.
        prefect: it needs a pipeline with a Prefect server.
    """

    name: str
    strike: Strike
    moments: tuple[Moment, ...] = ("during",)
    prepare: Callable[[World], None] = nothing
    undo: Callable[[World], None] = nothing
    kills: bool = False
    mounts: bool = False
    prefect: bool = False


# Processes -------------------------------------------------------------------------------------------------------


def kill_parent(world: World, command: Command | None, rng: Random) -> bool:
    assert command
    return command.signal(signal.SIGKILL)


def stop_by_hand(world: World, command: Command | None, rng: Random) -> bool:
    assert command
    return command.signal(signal.SIGINT)


def kill_running(word: str) -> Strike:
    """Kill a process below the command that has this word in its command line."""

    def strike(world: World, command: Command | None, rng: Random) -> bool:
        assert command
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and command.runs:
            for process in world.processes():
                try:
                    if process.pid != command.pid and any(word in part for part in process.cmdline()):
                        process.kill()
                        return True
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.01)
        return False

    return strike


def kill_mlflow(world: World, command: Command | None, rng: Random) -> bool:
    assert command
    world.end_mlflow()
    return command.runs


def run_beside(other: bool) -> Strike:
    """Give the command a second time while it goes on."""

    def strike(world: World, command: Command | None, rng: Random) -> bool:
        assert command
        goes_on = command.runs
        world.second = world.start(beside=True, other=other)
        return goes_on

    return strike


def await_second(world: World) -> None:
    assert world.second
    world.second.wait(world.pipeline.limit_s)


# Disks -----------------------------------------------------------------------------------------------------------


def fill_disk(world: World, command: Command | None, rng: Random) -> bool:
    """Leave some kilobytes at most. Without a disk of its own, no process may write a file larger than that."""
    left = rng.randrange(0, 65_536)
    if not world.mounting:
        for process in world.processes():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (left, left))
        return bool(command and command.runs)
    with (world.disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            size = file.tell()
        file.truncate(max(0, size - left))
    return bool(command and command.runs)


def free_disk(world: World) -> None:
    (world.disk / "ballast").unlink(missing_ok=True)


def read_only_store(world: World, command: Command | None, rng: Random) -> bool:
    """The store seen through a read-only mount: what is open already can still be written, as on a real disk it could not."""
    subprocess.run(["mount", "--bind", str(world.store), str(world.store)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(world.store)], check=True)
    return command is None or command.runs


def writable_store(world: World) -> None:
    subprocess.run(["umount", "-l", str(world.store)], check=True)


# Files -----------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: Random) -> None:
    """Truncate a file, flip a bit of it, or delete it."""
    size = path.stat().st_size
    how = rng.choice(("truncate", "flip", "delete") if size else ("delete",))
    if how == "truncate":
        os.truncate(path, rng.randrange(size))
    elif how == "flip":
        with path.open("r+b") as file:
            file.seek(at := rng.randrange(size))
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    else:
        path.unlink()


def damage_one(choose: Callable[[World], list[Path]]) -> Strike:
    def strike(world: World, command: Command | None, rng: Random) -> bool:
        found = sorted(choose(world))
        if found:
            damage(path := rng.choice(found), rng)
            world.damaged.add(path)
        return bool(found)

    return strike


def files_of_artefacts(world: World) -> list[Path]:
    folders = [path.parent for path in world.store.glob(f"*/*/{MANIFEST}")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]


def manifests(world: World) -> list[Path]:
    return list(world.store.glob(f"*/*/{MANIFEST}"))


def teachers_log(world: World) -> list[Path]:
    return list((world.home / "teacher").glob("*.jsonl"))


def damage_checkpoint(world: World, command: Command | None, rng: Random) -> bool:
    """Kill the command while a stage keeps checkpoints, and damage one."""
    kill_parent(world, command, rng)
    assert command
    command.wait(60)
    deadline = time.monotonic() + 10
    while len(world.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    checkpoints = damage_one(lambda world: [path for path in (world.store / ".partial").rglob("checkpoint-*/*") if path.is_file()])
    return checkpoints(world, command, rng)


def step_clock_back(world: World, command: Command | None, rng: Random) -> bool:
    """All that there is comes from tomorrow."""
    for path in world.home.rglob("*"):
        if not path.is_symlink():
            found = path.stat()
            os.utime(path, ns=(found.st_atime_ns + DAY_S * 10**9, found.st_mtime_ns + DAY_S * 10**9))
    with closing(sqlite3.connect(world.home / "mlflow.db")) as database, database:
        for column in ("start_time", "end_time"):
            database.execute(f"update runs set {column} = {column} + {DAY_S * 1000}")
    return True


# Servers ---------------------------------------------------------------------------------------------------------


def answers_of_mlflow(*kinds: str) -> Strike:
    def strike(world: World, command: Command | None, rng: Random) -> bool:
        world.proxy.faults[:] = [rng.choice(kinds) for _ in range(rng.randint(1, 6))]
        world.prepared_answers = len(world.proxy.faults)
        return True

    return strike


def calm_teacher(world: World) -> None:
    world.teacher.faults.clear()


def calm_mlflow(world: World) -> None:
    world.proxy.faults.clear()


def restart_mlflow(world: World) -> None:
    world.start_mlflow()


def teacher_misbehaves(*kinds: str) -> Strike:
    def strike(world: World, command: Command | None, rng: Random) -> bool:
        world.teacher.retry_after = "1"
        world.teacher.faults[:] = [rng.choice(kinds) for _ in range(rng.randint(1, 8))]
        if rng.random() < 0.7:  # what it is about to be asked; else it may have been asked everything
            for kind in ASKS:
                shutil.rmtree(world.store / kind, ignore_errors=True)
            for path in teachers_log(world):
                path.unlink()
        world.prepared_answers = len(world.teacher.faults)
        return True

    return strike


FAULTS = (
    Fault("kill the parent", kill_parent, kills=True),
    Fault("stop it by hand", stop_by_hand),
    Fault("kill a stage's process", kill_running("tasks.core.child")),
    Fault("kill the Prefect server", kill_running("flows.prefect_server"), prefect=True),
    Fault("kill the MLflow server", kill_mlflow, prepare=restart_mlflow, undo=restart_mlflow),
    Fault("MLflow is slow", answers_of_mlflow("late"), prepare=restart_mlflow, undo=calm_mlflow),
    Fault("MLflow answers 500", answers_of_mlflow("500"), prepare=restart_mlflow, undo=calm_mlflow),
    Fault("MLflow answers something else", answers_of_mlflow("page", "nothing"), prepare=restart_mlflow, undo=calm_mlflow),
    Fault("MLflow loses requests or answers", answers_of_mlflow("drop", "lost"), prepare=restart_mlflow, undo=calm_mlflow),
    Fault("the same run beside it", run_beside(other=False), undo=await_second),
    Fault("another run beside it", run_beside(other=True), undo=await_second),
    Fault("the disk is full", fill_disk, undo=free_disk),
    Fault("the store is read-only", read_only_store, ("before", "during"), undo=writable_store, mounts=True),
    Fault("an artefact's file is damaged", damage_one(files_of_artefacts), ("before", "during")),
    Fault("a manifest is damaged", damage_one(manifests), ("before", "during")),
    Fault("a checkpoint is damaged", damage_checkpoint, ("in checkpoints",), kills=True),
    Fault("the teacher's log is damaged", damage_one(teachers_log), ("before",)),
    Fault("the clock steps back", step_clock_back, ("before",)),
    Fault(
        "the teacher is wrong or slow", teacher_misbehaves("429", "500", "half", "wrong", "nothing", "drop"), ("before",), undo=calm_teacher
    ),
    Fault("the teacher is absent", teacher_misbehaves("503"), ("before",), undo=calm_teacher),
)
