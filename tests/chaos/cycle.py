"""One fault from beginning to end, all of it drawn from one seed."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos import invariants, records
from tests.chaos.command import Command
from tests.chaos.faults import ASKS, FAULTS, Fault
from tests.chaos.world import REGISTER, World

CHECKPOINTED = ("stepwise", "finetune")
START_S = 1.0  # of a small pipeline, until it looks for its first stage
START_WITH_PREFECT_S = 12.0


@dataclass(frozen=True)
class Outcome:
    """What came of a fault. `problems` is empty if nothing was lost. It may not have `struck`: what it is about was over, or not there.

    Attributes:
        anew: no model was registered when the command was given.
    """

    seed: int
    fault: str
    moment: str
    removed: list[str]
    anew: bool
    first_exit: int | None
    seconds: float
    problems: list[str]
    output: str
    struck: bool


def usable(world: World) -> list[Fault]:
    return [fault for fault in FAULTS if (world.mounting or not fault.mounts) and (world.pipeline.prefect or not fault.prefect)]


def cycle(world: World, seed: int, only: str = "") -> Outcome:
    """Let one fault strike, give the command again, and look.

    Args:
        only: a word in the fault's name.
    """
    rng = Random(seed)
    world.restore()
    # The one with the highest draw of its own: a kind of fault that is added later takes some seeds, and leaves all others what they were.
    fault = max((fault for fault in usable(world) if only in fault.name), key=lambda fault: Random(f"{seed} {fault.name}").random())
    moment = rng.choice(fault.moments)
    removed = _remove_some(world, rng, CHECKPOINTED if moment == "in checkpoints" else ())
    if anew := registers_anew(world, seed):
        world.forget_models()
    fault.prepare(world)
    struck = moment == "before" and fault.strike(world, None, rng)
    whole = invariants.look(world, commands=1)
    reader = invariants.Reader(world)
    reader.start()
    first = world.start()
    when: str = moment
    if moment != "before":
        when = _await(world, first, rng, moment, removed, anew)
        struck = fault.strike(world, first, rng)
    in_time = first.wait(world.pipeline.limit_s)
    struck = struck and world.heard
    fault.undo(world)
    problems = [] if in_time else ["the command that was disturbed did not end in time"]
    problems += [] if fault.kills else list(invariants.said_plainly(first))
    problems += list(invariants.shared(world, first, world.second)) if world.second else []
    problems += [f"disturbed: {problem}" for problem in invariants.not_again(world, whole, but=world.damaged)]
    if world.pipeline.prefect:
        problems += [f"disturbed: {problem}" for problem in records.champion_loads(world, none_yet=anew is not None)]
    before = invariants.look(world, commands=3 if world.second else 2)  # that of the undisturbed run, and the one that was disturbed
    world.teacher.requests.clear()
    started = time.monotonic()
    again = world.start()
    in_time = again.wait(world.pipeline.limit_s)
    seconds = time.monotonic() - started
    problems += reader.ended()
    problems += invariants.violations(world, before, again, in_time)
    output = f"--- disturbed ({first.exit_code})\n{first.output}--- again ({again.exit_code})\n{again.output}"
    return Outcome(seed, fault.name, when, removed, anew is not None, first.exit_code, round(seconds, 2), problems, output, struck)


def registers_anew(world: World, seed: int) -> Random | None:
    """In about half of the cycles of a pipeline that registers, what draws a moment in that; None in the others.

    It is a generator of its own, so that what the seed draws else stays what it was.
    """
    own = Random(f"{seed} registers")
    return own if world.pipeline.prefect and own.random() < 0.5 else None


def _remove_some(world: World, rng: Random, surely: tuple[str, ...]) -> list[str]:
    """Remove some artefacts, so that there is something to compute: their kinds, in the order they are made in."""
    made = [manifest for manifest in world.artefacts() if manifest.wall_s]
    some = set(rng.sample(range(len(made)), rng.randint(1, max(1, len(made) // 2))))
    removed = [manifest for number, manifest in enumerate(made) if number in some or manifest.kind in surely]
    for manifest in removed:
        shutil.rmtree(world.store / manifest.kind / manifest.key)
    if {manifest.kind for manifest in removed} & set(ASKS) and rng.random() < 0.5:
        shutil.rmtree(world.home / "teacher")
    return [manifest.kind for manifest in removed]


def _await(world: World, command: Command, rng: Random, moment: str, removed: list[str], anew: Random | None) -> str:
    """Wait for the moment, and say which it is: soon after the start, or so long after a stage, or registering, began.

    Args:
        anew: draws whether it is in registering, and then when; None if there is nothing to register.
    """
    if moment == "in checkpoints":
        found = rng.randint(1, 4)
        while command.runs and len(_checkpoints(world)) < found:
            time.sleep(0.01)
        return f"checkpoint {found}"
    stage = rng.choice(["", *removed])
    known = [manifest.wall_s for manifest in world.reference.values() if manifest.kind == stage]
    delay = rng.uniform(0, max(known, default=START_WITH_PREFECT_S if world.pipeline.prefect else START_S))
    if anew and anew.random() < 0.5:
        took = next(found["wall_s"] for found in world.report["stages"] if found["name"] == REGISTER)
        stage, delay = REGISTER, anew.uniform(0, took)
    if stage and not world.await_stage(command, stage):
        return f"{stage} did not begin"
    time.sleep(delay)
    return f"{stage or 'start'} + {delay:.2f} s"


def _checkpoints(world: World) -> list[Path]:
    return list((world.store / ".partial").glob("*/checkpoints/checkpoint-*/*"))
