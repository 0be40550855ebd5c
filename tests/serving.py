"""What tests of serving share: a registry with real versions of a tiny model, and a server in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.core import registry
from tasks.core.settings import Settings, load_settings
from tasks.core.tracking import open_parent

NAME = "shop-intent"
REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = REPOSITORY / "tasks" / "domain" / "ecommerce" / "spec.yaml"
GOOD, OTHER, BROKEN, TRANSFORMERS = "1", "2", "3", "4"  # versions


class Registry:
    """A registry in a file: versions 1 and 2 of a model that work, 3 whose file is broken, 4 for another runtime."""

    def __init__(self, home: Path, gguf: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CARTWRIGHT_HOME", str(home))
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            self.settings: Settings = load_settings()
        self.tracker = open_parent(self.settings, "domain/tiny", "key", "run", {})
        self.models = registry.Registry(self.settings)
        broken = home / "broken.gguf"
        broken.write_bytes(gguf.read_bytes()[:5000])
        for file, runtime in ((gguf, "llama_cpp"), (gguf, "llama_cpp"), (broken, "llama_cpp"), (gguf, "transformers")):
            self._add(file, runtime)
        self.move(GOOD)

    def _add(self, file: Path, runtime: str) -> None:
        number = len(self.tracker.client.search_model_versions(f"name = '{NAME}'")) if self._known() else 0
        run = self.tracker.child(f"v{number}", f"v{number}", "variant")
        model = self.tracker.log_model(run, f"v{number}", f"digest{number}", {"model": file, "spec": SPEC}, runtime)
        self.models.register(NAME, model, f"digest{number}", {"cartwright.variant": f"gguf-{number}"}, "a model")

    def _known(self) -> bool:
        return bool(self.tracker.client.search_registered_models(filter_string=f"name = '{NAME}'"))

    def move(self, version: str) -> None:
        """Let the alias point at a version."""
        self.tracker.client.set_registered_model_alias(NAME, "champion", version)

    def remove(self) -> None:
        self.tracker.client.delete_registered_model_alias(NAME, "champion")


@contextmanager
def running(home: Path, *options: str, **extra: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`cartwright serve` on a free port: the process, and its address."""
    variables = {**os.environ, "CARTWRIGHT_HOME": str(home), **extra}
    command = [sys.executable, "-m", "flows.cli", "serve", "--port", "0", "--threads", "1", "--rate", "0", *options]
    with (
        (home / "serve.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables, cwd=REPOSITORY) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("Serving "), (home / "serve.log").read_text()
            yield process, line.split()[-1]
        finally:
            process.kill()
