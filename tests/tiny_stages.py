"""Real stages that do little: what the tests of the seam run."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.checkpoints import newest_whole, seal
from tasks.core import progress
from tasks.core.lifetime import tied
from tasks.core.manifests import CHECKPOINTS, checksum
from tasks.core.settings import load_settings
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.teaching.log import Answer, AnswerLog


class CountConfig(StageConfig):
    numbers: int = 3
    fail: str = ""
    seconds: float = 0.0


@stage("count", version=1)
def count(config: CountConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write numbers, one file each, and say so."""
    if config.fail == "user":
        raise UserError("count.numbers", config.numbers, "is unlucky", allowed=[1, 2])
    if config.fail == "error":
        raise RuntimeError("broken on purpose")
    if config.fail == "killed":
        os.kill(os.getpid(), 9)
    if config.fail == "outcome":
        return {"numbers": object()}
    for number in progress.track(range(config.numbers), config.numbers, "numbers"):
        (out_dir / f"{number}.txt").write_text(str(number))
        progress.metrics({"number": float(number)}, number)
        time.sleep(config.seconds)
    return {"numbers": config.numbers, "pid": os.getpid()}


@stage("forked", version=1, preloaded=True)
def forked(config: CountConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Say what the process began with, and compute for a moment."""
    print("said by", os.getpid())
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    (out_dir / "0.txt").write_text("0")
    return {
        "trim": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        "secret": os.environ.get("SECRET"),
        "torch": "torch" in sys.modules,
        "supervisor": os.getppid(),
    }


@stage("stepwise", version=1, resumable=True)
def stepwise(config: CountConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Add up numbers with a checkpoint after each, as training does."""
    checkpoints = out_dir / CHECKPOINTS
    begun = newest_whole(checkpoints)
    state = json.loads((begun / "state.json").read_text()) if begun else {"number": 0, "total": 0}
    for number in range(state["number"] + 1, config.numbers + 1):
        time.sleep(config.seconds)
        state = {"number": number, "total": state["total"] + number}
        folder = checkpoints / f"checkpoint-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps(state))
        seal(folder)
        progress.advance(number, config.numbers)
    (out_dir / "total.txt").write_text(str(state["total"]))
    return {"begun": int(begun.name.split("-")[1]) if begun else None}


class AddConfig(StageConfig):
    offset: int = 0


@stage("add", version=1, isolated=False)
def add(config: AddConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Add up the numbers of the input."""
    total = config.offset + sum(int(path.read_text()) for path in inputs["numbers"].glob("*.txt"))
    (out_dir / "total.txt").write_text(str(total))
    return {"total": total}


@stage("resumed", version=1, resumable=True)
def resumed(config: CountConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write what is not yet there: a stage that goes on where it was killed."""
    made = 0
    for number in range(config.numbers):
        path = out_dir / f"{number}.txt"
        if not path.exists():
            path.write_text(str(number))
            made += 1
            progress.advance(number + 1, config.numbers)
            time.sleep(config.seconds)
    return {"made": made}


@stage("parent", version=1)
def parent(config: CountConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Start a process of its own, say its pid, and wait: nothing of it may outlive the run."""
    grandchild = subprocess.Popen(tied("python", "-c", "import time; time.sleep(600)"))
    progress.metrics({"grandchild": float(grandchild.pid), "pid": float(os.getpid())}, 0)
    grandchild.wait()
    return {}


forked_parent = replace(parent, preloaded=True)
forked_count = replace(count, preloaded=True)


class BuyConfig(StageConfig):
    not_in_key = frozenset({"address"})
    address: str
    answers: int = 6


@stage("buy", version=1)
def buy(config: BuyConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Ask over HTTP what the teacher's log does not hold, as `teach` does, without LiteLLM, whose import takes seconds."""
    plan = {checksum({"n": number}): f"question {number}" for number in range(config.answers)}
    bought = 0
    with AnswerLog(load_settings().home / "teacher" / "answers.jsonl", plan) as log:
        for name, question in progress.track(plan.items(), len(plan), "answers"):
            if not log.get(name):
                log.add(name, Answer(_ask(config.address, question), 10, 5, None, 0.1), {"request": question})
                bought += 1
            (out_dir / f"{question}.txt").write_text(log.get(name).text)  # type: ignore[union-attr]
    return {"bought": bought}


def _ask(address: str, question: str) -> str:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": question}]}).encode()
    try:
        with urllib.request.urlopen(f"{address}/chat/completions", body, timeout=5) as reply:
            return str(json.load(reply)["choices"][0]["message"]["content"])
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        raise UserError("teacher", address, f"does not answer ({type(error).__name__})") from None


class FillConfig(StageConfig):
    megabytes: int
    said: bool = True


@stage("fill", version=1)
def fill(config: FillConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write so many megabytes. What is not written in Python may not say why it cannot."""
    try:
        (out_dir / "data").write_bytes(b"0" * config.megabytes * 1_000_000)
    except OSError:
        if config.said:
            raise
        raise RuntimeError("llama.cpp cannot quantize to Q4_0: it does not say why") from None
    return {}
