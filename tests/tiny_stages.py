"""Real stages that do little: what the tests of the seam run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.core import progress
from tasks.core.lifetime import tied
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError


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
    """Say what the process began with."""
    print("said by", os.getpid())
    (out_dir / "0.txt").write_text("0")
    return {
        "trim": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        "secret": os.environ.get("SECRET"),
        "torch": "torch" in sys.modules,
        "supervisor": os.getppid(),
    }


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


class FillConfig(StageConfig):
    megabytes: int


@stage("fill", version=1)
def fill(config: FillConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write so many megabytes."""
    (out_dir / "data").write_bytes(b"0" * config.megabytes * 1_000_000)
    return {}
