"""Every test has a home of its own; nothing is read from or written to the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary Cartwright home."""
    folder = tmp_path / "home"
    monkeypatch.setenv("CARTWRIGHT_HOME", str(folder))
    for name in ("CARTWRIGHT_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield folder


@pytest.fixture
def cartwright(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the console command in a process of its own."""

    def call(*arguments: str, stdin: str = "", check: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "CARTWRIGHT_HOME": str(home), **extra}
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=variables, check=check, cwd=REPOSITORY)

    return call
