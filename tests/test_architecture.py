"""The import rules, and how fast and light the packages load."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import KEPT, forget_places

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "mlflow", "litellm", "llama_cpp"}


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of the modules a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("tasks/domain"), ids=lambda p: p.name)
def test_domain_imports_nothing_else_of_ours(path: Path) -> None:
    ours = {name for name in imported(path) if name.split(".")[0] in ("tasks", "flows")}
    assert all(name.startswith("tasks.domain") for name in ours), ours


@pytest.mark.parametrize("path", files("tasks/core"), ids=lambda p: p.name)
def test_core_imports_no_stage(path: Path) -> None:
    ours = {name for name in imported(path) if name.split(".")[0] in ("tasks", "flows") and name != "tasks"}
    assert all(name.startswith(("tasks.core", "tasks.domain")) for name in ours), ours


@pytest.mark.parametrize("path", files("tasks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tasks_import_no_flow_and_only_records_import_mlflow(path: Path) -> None:
    names = imported(path)
    assert not {name for name in names if name.split(".")[0] == "flows"}
    if path.name not in ("tracking.py", "left_runs.py", "registry.py", "pyfunc_model.py"):
        assert not {name for name in names if name.split(".")[0] == "mlflow"}


def test_only_settings_reads_the_environment() -> None:
    readers = [
        p.name for folder in ("flows", "tasks") for p in files(folder) if "os.environ" in p.read_text() or "os.getenv" in p.read_text()
    ]
    assert readers == ["settings.py"]


def test_nothing_that_the_environment_says_of_a_team_s_places_reaches_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [ROOT / "tasks" / "core" / "settings.py", *(ROOT / "docker").glob("*.*"), *(ROOT / "deployments").glob("*.yaml")]
    named = {name for path in sources for name in re.findall(r"\b(?:CARTWRIGHT|MLFLOW|PREFECT)_[A-Z_]+[A-Z]\b", path.read_text())}
    assert len(named) > 20 and {"CARTWRIGHT_MLFLOW_BACKEND", "PREFECT_API_DATABASE_CONNECTION_URL", "MLFLOW_TRACKING_TOKEN"} < named
    for name in named:
        monkeypatch.setenv(name, "a team's")
    forget_places()
    assert named & set(os.environ) <= KEPT


@pytest.mark.slow
def test_importing_flows_loads_nothing_heavy() -> None:
    code = "import sys, flows, flows.cli, flows.retrain, flows.stages, flows.ablate, flows.drift; print(' '.join(m for m in sys.modules if '.' not in m))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    assert not loaded & HEAVY


def test_no_module_shadows_a_library() -> None:
    names = {path.stem for path in files("flows")}
    assert not names & {"datasets", "mlflow", "prefect", "torch", "transformers", "optimum", "evaluate"}
    assert not (ROOT / "docker" / "__init__.py").exists()
