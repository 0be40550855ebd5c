"""What must hold after a fault, once the same command was given again. Each function says what is wrong, and nothing if all is well."""

from __future__ import annotations

import fcntl
import functools
import json
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tasks.core.artifacts import Store
from tasks.core.manifests import MANIFEST
from tasks.core.stage import Stage
from tasks.teaching.log import AnswerLog
from tests.chaos.command import Command
from tests.chaos.figures import metrics_like, reported
from tests.chaos.records import aliases, champion_loads, recorded, registered
from tests.chaos.world import World

GONE_WITHIN_S = 5
TORCH = "torchinductor_"  # a folder that torch keeps for all programs of a user


@dataclass
class Before:
    """What there was when the command was given again.

    Attributes:
        whole: artefacts that could be used, with the time their manifest was written.
        answers: requests whose answers are in the teacher's log.
        commands: how often the command had been given in this home.
        champion: whether a registered model had one.
    """

    whole: dict[Path, int] = field(default_factory=dict)
    answers: frozenset[str] = frozenset()
    commands: int = 0
    champion: bool = True


def look(world: World, commands: int) -> Before:
    whole = {}
    store = Store(world.store.as_uri(), world.home)
    for path in world.store.glob(f"*/*/{MANIFEST}"):
        kind, key = path.parts[-3:-1]
        if store.find(kind, key)[0]:
            whole[path] = path.stat().st_mtime_ns
    return Before(whole, frozenset(logged(world)), commands, bool(aliases(world)))


class Reader(threading.Thread):
    """Who reads every artefact, over and over, while commands run and faults strike."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world, self._end = world, threading.Event()
        self._seen: dict[Path, str] = {}

    def run(self) -> None:
        store = Store(self._world.store.as_uri(), self._world.home)
        while not self._end.wait(0.05):
            for path in self._world.store.glob(f"[!.]*/*/{MANIFEST}"):  # ".partial" is not read by anyone
                try:
                    written, (_, damage) = path.stat().st_mtime_ns, store.find(*path.parts[-3:-1])
                    if damage and path.stat().st_mtime_ns == written:  # and not taken away, or made anew, meanwhile
                        self._seen.setdefault(path, damage)
                except OSError:
                    continue
                except Exception as error:
                    self._seen[path] = f"{type(error).__name__}: {error}"

    def ended(self) -> Iterator[str]:
        """What was there and not whole, but for what was damaged on purpose."""
        self._end.set()
        self.join()
        for path, damage in self._seen.items():
            if not any(found.is_relative_to(path.parent) for found in self._world.damaged):
                yield f"{path.parts[-3]} {path.parts[-2]} could be read half-written: {damage}"


def logged(world: World) -> list[str]:
    """The hashes of the teacher's log whose answers can be used, as the pipeline reads them."""
    path = world.home / "teacher" / "answers.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found.append(str(json.loads(line)["hash"]))
        except (ValueError, KeyError, TypeError):
            continue
    with tempfile.TemporaryDirectory() as folder:  # a log that is opened is mended
        copy = Path(shutil.copy(path, folder))
        with AnswerLog(copy, found) as log:
            return [name for name in found if log.get(name)]


def violations(world: World, before: Before, again: Command, in_time: bool) -> list[str]:
    """All that is wrong after the command was given again."""
    checks = [
        completed(again, in_time),
        same(world),
        not_again(world, before),
        recorded(world, before.commands),
        not_bought_twice(world, before),
        left_behind(world),
    ]
    if world.pipeline.prefect:
        checks += [reported(world), registered(world, anew=not before.champion), champion_loads(world)]
    return [problem for check in checks for problem in check]


def said_plainly(first: Command) -> Iterator[str]:
    """What stops a command is one message, not a traceback."""
    if "Traceback" in first.output:
        yield "the command that was disturbed ended with a traceback"


def shared(world: World, first: Command, second: Command) -> Iterator[str]:
    """Two runs at once: both end well, or one says that the other is running; what both need was made once."""
    refused = "running already" in second.output
    if first.exit_code:
        yield f"the first of two runs at once ended with exit code {first.exit_code}: {first.output[-300:]}"
    if second.exit_code and not refused:
        yield f"the second of two runs at once ended with exit code {second.exit_code}: {second.output[-300:]}"
    made = Counter(line.split("  ")[0] for run in (first, second) for line in re.findall(r"^done +(.*)$", run.output, re.MULTILINE))
    for label, times in made.items():
        if times > 1 and label.split()[0] not in world.pipeline.own:
            yield f"two runs at once both made {label}"


def completed(again: Command, in_time: bool) -> Iterator[str]:
    if not in_time:
        yield "the same command did not end in time"
    elif again.exit_code:
        yield f"the same command ended with exit code {again.exit_code}"


@functools.cache
def varying() -> frozenset[str]:
    """Kinds of artefacts whose stages declare that they are not the same bytes twice."""
    from flows import releasing, stages

    return frozenset(
        stage.name for module in (stages, releasing) for stage in vars(module).values() if isinstance(stage, Stage) and stage.varies
    )


def settled(world: World) -> set[tuple[str, str]]:
    """Kind and key of the undisturbed run's artefacts that every run has: nothing that they are made from varies."""
    varies, fed = varying() - world.pipeline.steady, set[tuple[str, str]]()
    while True:
        digests = {made.digest for found, made in world.reference.items() if made.kind in varies or found in fed}
        more = {found for found, made in world.reference.items() if digests & set(made.inputs.values())}
        if more == fed:
            return world.reference.keys() - fed
        fed = more


def same(world: World) -> Iterator[str]:
    """Every artefact of the undisturbed run is there, whole, and holds the same; so is every other one. Of one that is made from what varies,
    which has another key each time, there is one of its kind."""
    store, varies = Store(world.store.as_uri(), world.home), varying() - world.pipeline.steady
    there = {(path.parts[-3], path.parts[-2]) for path in world.store.glob(f"*/*/{MANIFEST}")}
    for kind, key in sorted(there):
        manifest, damage = store.find(kind, key)
        expected = world.reference.get((kind, key))
        if damage:
            yield f"damaged: {damage}"
        elif manifest and expected:
            if kind not in varies and manifest.digest != expected.digest:
                yield f"{kind} {key} holds something else than without the fault"
            yield from metrics_like(manifest, expected, kind in varies)
    for kind in sorted({kind for kind, _ in world.reference} - {kind for kind, _ in there}):
        yield f"there is no {kind}"
    for kind, key in sorted(settled(world) - there):
        yield f"{kind} {key} is missing"


def not_again(world: World, before: Before, but: Collection[Path] = ()) -> Iterator[str]:
    """No stage that had finished was computed again, but where one of these files was damaged meanwhile."""
    damaged = {path for path in before.whole if any(found.is_relative_to(path.parent) for found in but)}
    for path, written in before.whole.items():
        if path not in damaged and (not path.exists() or path.stat().st_mtime_ns != written):
            yield f"{path.parts[-3]} {path.parts[-2]} was whole and was made again"


def not_bought_twice(world: World, before: Before) -> Iterator[str]:
    """Each answer is in the log once, and none that was there was asked for again."""
    now = logged(world)
    for name, times in Counter(now).items():
        if times > 1:
            yield f"the teacher's answer {name[:8]} was bought {times} times"
    new = len(set(now) - before.answers)
    if (asked := len(world.teacher.requests)) > new:
        yield f"the teacher was asked {asked} times for {new} answers"


def left_behind(world: World) -> Iterator[str]:
    """No process, lock or temporary file."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (alive := world.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive:
        yield f"a process is left: {process.pid}"
    for path in world.home.rglob("*.lock"):
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield f"{path.name} is still held"
    partial = world.store / ".partial"
    unfinished = list(partial.iterdir()) if partial.is_dir() else []
    names = [path for path in world.home.rglob("*") if path.name.endswith(".new") or path.name.startswith(".latest-")]
    temporary = [path for path in world.temporary.iterdir() if not path.name.startswith(TORCH)]
    logged = list(folder.rglob("*")) if (folder := world.home / "tmp").is_dir() else []
    for path in [*unfinished, *names, *temporary, *logged]:
        yield f"a temporary file is left: {path.relative_to(world.disk)}"
