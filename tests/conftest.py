"""Every test has a home of its own; nothing is read from or written to the user's."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from filelock import FileLock

from tasks.core import hardware
from tests.fault_server import KEY, Faults
from tests.lessons import ask  # noqa: F401 - a fixture
from tests.places import forget_places

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Workers of pytest-xdist share the cores out: threads of OpenMP that have to wait for a core cost more than they bring. They are
    not bound to a core each, since much of a test is waiting, when the other may have both."""
    forget_places()  # nothing of the user's is taken over
    gc.disable()  # until all is imported, next to nothing of which is garbage
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        os.environ["OMP_NUM_THREADS"] = str(max(hardware.cores() // int(workers), 1))


# Files that take minutes, the longest first: begun last, one of them would keep one worker busy while the other has nothing left to do.
LONG = (
    "pipeline",
    "gptqmodel",
    "pools",
    "fidelity",
    "real_model",
    "docker",
    "teach_runs",
    "api_variants",
    "team",
    "serve_registry",
    "drift",
    "ablation",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "fast and ..."`, files in which nothing is fast are not even imported, which takes as long as some of the tests."""
    only_fast = str(config.option.markexpr).startswith("fast") and collection_path.name.startswith("test_")
    return True if only_fast and "mark.fast" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in which everything is fast come first, then the long ones; within a file nothing moves."""
    fast = {item.path: True for item in items}
    for item in items:
        fast[item.path] &= item.get_closest_marker("fast") is not None

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return -1 if fast[item.path] else LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary Cartwright home."""
    folder = tmp_path / "home"
    forget_places()  # of a fixture that is older than this test
    monkeypatch.setenv("CARTWRIGHT_HOME", str(folder))
    yield folder
    monkeypatch.undo()  # before the places are forgotten, or it would bring some of them back
    forget_places()  # what a test or MLflow itself set does not reach the next one


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model as an F16 GGUF file."""
    from tasks.base_model import TINY, BaseModelConfig, base_model
    from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, convert_gguf

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("hf", "gguf"):
        (folder / name).mkdir()
    base_model.function(BaseModelConfig(source=TINY), {}, folder / "hf")
    convert_gguf.function(ConvertGgufConfig(), {"model": folder / "hf"}, folder / "gguf")
    return folder / "gguf" / MODEL_FILE


@dataclass(frozen=True)
class Finished:
    """A run of `smoke` that ended well.

    Attributes:
        home: where it ran. A test that changes it works on a copy.
        store: its artefacts as they were at its end, for other homes to begin with.
        output: what it printed.
    """

    home: Path
    store: Path
    output: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Made once, for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = Finished(folder / "smoke" / "home", folder / "smoke" / "store", "")
    output = folder / "smoke" / "output"
    with FileLock(folder / "smoke.lock"):
        if not output.exists():
            command = [sys.executable, "-m", "flows.cli", "run", "--profile", "smoke"]
            variables = {**os.environ, "CARTWRIGHT_HOME": str(made.home)}
            done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=REPOSITORY)
            assert done.returncode == 0, done.stdout + done.stderr
            shutil.copytree(made.home / "store", made.store)
            output.write_text(done.stdout + done.stderr)
    return replace(made, output=output.read_text())


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment by which a server that speaks S3 is reached. It has a bucket `shop` and keeps all in memory."""
    import boto3
    from botocore.config import Config

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path_factory.mktemp("s3") / "log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    reached = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "shop",
        "AWS_SECRET_ACCESS_KEY": "shop-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        for name, value in reached.items():
            os.environ[name] = value
        boto3.client("s3", config=Config(retries={"total_max_attempts": 12, "mode": "standard"})).create_bucket(Bucket="shop")
        for name in reached:
            del os.environ[name]
        yield reached
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def cartwright(home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the console command in a process of its own."""

    def call(*arguments: str, stdin: str = "", check: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "CARTWRIGHT_HOME": str(home), **extra}
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env=variables, check=check, cwd=REPOSITORY)

    return call


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A provider on loopback that misbehaves on purpose, and the key for it in the environment."""
    with Faults() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{running.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        monkeypatch.setattr("tasks.runtimes.litellm.SECOND_PASS_AFTER_S", 0.0)
        yield running
        running.shutdown()
