"""Ablations: the file is checked before any work, every arm is trained with every seed once, and the table says what came out."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.ablation import Outcome, load_ablation, table
from tasks.config import PROFILES
from tasks.core.manifests import FileEntry, Manifest
from tasks.domain.errors import UserError

ABLATIONS = PROFILES.parent / "ablations"
Cartwright = Callable[..., subprocess.CompletedProcess[str]]
GOOD = """
profile: smoke
base: {data.train_rows: 24}
seeds: [7, 8]
arms:
  baseline:
  rank 8: {train.rank: 8}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.fast
@pytest.mark.slow
def test_every_ablation_is_valid() -> None:
    arms = {path.stem: len(load_ablation(path).arms) for path in ABLATIONS.iterdir()}
    assert arms == {"quick": 3, "recipe": 16}


@pytest.mark.fast
def test_an_arm_is_the_base_and_its_changes(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path, GOOD))
    baseline, rank = ablation.arms
    assert (ablation.name, ablation.seeds) == ("tiny", (7, 8)) and baseline.changes == {}
    assert baseline.config.data.train_rows == rank.config.data.train_rows == 24
    assert (baseline.config.train.rank, rank.config.train.rank) == (4, 8)
    assert baseline.config.data.domain_sha256 and baseline.config.data == rank.config.data
    assert baseline.config.base_model.revision and baseline.config.base_model == rank.config.base_model


@pytest.mark.fast
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("profile: smoke", "profile: smoky", "tiny.yaml:6: arms.baseline: profile = 'smoky': is unknown. Allowed: overnight, paper"),
        ("profile: smoke\n", "", "tiny.yaml:1: profile: Field required. Allowed: profile, base, seeds, arms"),
        ("base:", "bass:", "tiny.yaml:3: bass: Extra inputs are not permitted. Allowed: profile"),
        ("[7, 8]", "[7, 7]", "tiny.yaml:4: seeds: a seed stands twice"),
        ("[7, 8]", "[]", "tiny.yaml:4: seeds: Tuple should have at least 1 item"),
        ("[7, 8]", "[-1]", "tiny.yaml:6: arms.baseline: train.seed = -1: Input should be greater than or equal to 0"),
        ("train.rank: 8", "train.rang: 8", "tiny.yaml:7: arms.rank 8: train.rang = 8: is an unknown field. Allowed: method"),
        ("train.rank: 8", "train.rank: 0", "tiny.yaml:7: arms.rank 8: train.rank = 0: Input should be greater"),
        ("train.rank: 8", "train.seed: 8", "tiny.yaml:7: arms.rank 8 = 'train.seed': is given by `seeds`"),
        ("train.rank: 8", "gguf: [F16]", "tiny.yaml:7: arms.rank 8 = 'gguf': is nothing an ablation runs. Allowed: base_model.<field>"),
        ("data.train_rows", "decide.max_rss_mb", "tiny.yaml:3: base = 'decide.max_rss_mb': is nothing an ablation runs"),
        ("train.rank: 8", "data.teacher: openai/gpt-4.1", "tiny.yaml:7: arms.rank 8 = 'openai/gpt-4.1': an ablation asks no teacher"),
        ("train.rank: 8", "data.languages: [xx]", "tiny.yaml:7: arms.rank 8: data.languages = 'xx': is unknown"),
        ("{train.rank: 8}", "[8]", "tiny.yaml:7: arms.rank 8: Input should be a valid dictionary"),
        ("{train.rank: 8}", "{train.rank: 4}", "tiny.yaml:7: arms.rank 8: is the same as baseline"),
        ("rank 8:", "baseline:", "tiny.yaml:7': is not valid YAML: 'baseline' stands twice"),
        ("rank 8:", "rank|8:", "tiny.yaml:7: arms = 'rank|8': is no name for an arm"),
        ("arms:", "arms: {", "is not valid YAML"),
        (GOOD, "", "tiny.yaml:1: file: Input should be a valid dictionary or instance of AblationFile. Allowed: profile"),
    ],
)
def test_a_bad_file_is_refused_with_file_line_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_ablation(write(tmp_path, GOOD.replace(old, new, 1)))
    assert message in str(caught.value)


@pytest.mark.fast
@pytest.mark.slow
def test_a_bad_file_stops_before_any_work(cartwright: Cartwright, home: Path, tmp_path: Path) -> None:
    for path in (write(tmp_path, GOOD.replace("rank: 8", "rang: 8")), tmp_path / "nowhere.yaml"):
        result = cartwright("ablate", str(path))
        assert result.returncode == 2 and str(path) in result.stderr and "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and not home.exists()


def manifest(kind: str, metrics: dict[str, Any], validation: str = "a", wall_s: float = 60.0) -> Manifest:
    files = {"validation.jsonl": FileEntry(sha256=validation, size=1)}
    facts = {"kind": kind, "key": "k", "version": 1, "config": {}, "inputs": {}, "digest": "d", "libraries": {}, "created": ""}
    return Manifest(**facts, files=files, metrics=metrics, hardware="A processor|2 cores", wall_s=wall_s, peak_rss_mb=None)


def adapter(loss: float, wall_s: float = 60.0, **more: Any) -> Manifest:
    return manifest("finetune", {"examples": 24, "validation_loss": loss, "tokens_per_s": 100.0, **more}, wall_s=wall_s)


def cells(text: str, arm: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {arm}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.fast
def test_the_table_has_the_mean_and_the_range_over_seeds(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path, GOOD))
    baseline, rank = (Outcome(arm, manifest("synthesize", {"counts": {"validation": 24}})) for arm in ablation.arms)
    baseline.adapters = [adapter(0.2, 60), adapter(0.1, 120)]
    rank.adapters, rank.problems = [adapter(0.3, 900, resumed_from_step=3)], ["seed 8: out\nof memory"]
    text = table(ablation, [baseline, rank])
    assert cells(text, "arm") == ["arm", "changes", "rows", "loss", "tokens/s", "minutes"]  # no column for what nobody measured
    assert cells(text, "baseline") == ["baseline", "nothing", "24", "0.1500 (0.1000 to 0.2000)", "100 (100 to 100)", "1.5 (1.0 to 2.0)"]
    assert cells(text, "rank 8") == ["rank 8", "`train.rank=8`", "24", "0.3000", "100", ""]  # interrupted: its time is not the whole
    assert "- rank 8: seed 8: out of memory" in text and "All arms have the same 24 validation rows" in text

    rank.adapters = [adapter(0.3, validation_exact_match=0.5), adapter(0.3, validation_exact_match=0.75)]
    rank.dataset = manifest("synthesize", {"counts": {"validation": 24}}, validation="b")
    text = table(ablation, [baseline, rank])
    assert cells(text, "rank 8*")[3] == "62.5% (50.0% to 75.0%)" and cells(text, "baseline")[3] == ""
    assert "other validation rows" in text and "same 24" not in text and "vocabulary" not in text

    smaller = rank.arm.config.vocabulary.model_copy(update={"tokens": 1024})
    rank.arm = replace(rank.arm, config=rank.arm.config.model_copy(update={"vocabulary": smaller}))
    assert "a loss per token says nothing between those" in table(ablation, [baseline, rank])


def runs(home: Path) -> dict[str, dict[str, Any]]:
    """The arms' runs in MLflow, by name."""
    with sqlite3.connect(home / "mlflow.db") as database:
        query = """select runs.run_uuid, runs.name, runs.status from runs join experiments using (experiment_id) join tags on tags.run_uuid = runs.run_uuid
                   where experiments.name = 'ecommerce-ablation' and tags.key = 'cartwright.kind' and tags.value = 'arm'"""
        found = database.execute(query).fetchall()
        assert len({name for _, name, _ in found}) == len(found)  # none twice
        return {
            name: {
                "status": status,
                "params": dict(database.execute("select key, value from params where run_uuid = ?", [run_id])),
                "metrics": dict(database.execute("select key, value from latest_metrics where run_uuid = ?", [run_id])),
            }
            for run_id, name, status in found
        }


def test_arms_are_trained_once_and_a_new_or_failing_one_joins_them(cartwright: Cartwright, home: Path, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    first = cartwright("ablate", str(path))
    assert first.returncode == 0, first.stdout + first.stderr
    found = runs(home)
    assert set(found) == {"baseline, seed 7", "baseline, seed 8", "rank 8, seed 7", "rank 8, seed 8"}
    for name, run in found.items():
        assert run["status"] == "FINISHED" and run["params"]["train.seed"] == name[-1] and run["params"]["data.train_rows"] == "24"
        assert {"validation_loss", "tokens_per_s", "wall_s"} <= set(run["metrics"])
    assert found["rank 8, seed 7"]["params"]["train.rank"] == "8" and "train.rank" not in found["baseline, seed 7"]["params"]
    losses = [found[f"baseline, seed {seed}"]["metrics"]["validation_loss"] for seed in (7, 8)]
    assert losses[0] != losses[1]
    text = (home / "reports" / "ablation-tiny.md").read_text()
    assert text in first.stdout and f"{sum(losses) / 2:.4f} ({min(losses):.4f} to {max(losses):.4f})" in text
    assert {path.name for path in (home / "store").iterdir()} - {".partial", ".locks"} == {"synthesize", "base_model", "finetune"}
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        shown = database.execute("select data from artifact where key = 'ablation-tiny'").fetchall()
    assert len(shown) == 1 and json.loads(shown[0][0]) == text

    again = cartwright("ablate", str(path))
    assert again.returncode == 0 and "done " not in again.stdout and again.stdout.count("cached finetune") == 4
    assert (home / "reports" / "ablation-tiny.md").read_text() == text and runs(home) == found

    path.write_text(GOOD + "  too short: {train.max_length: 16}\n", encoding="utf-8")  # no row fits, which only the stage can know
    more = cartwright("ablate", str(path))
    assert more.returncode == 0 and more.stdout.count("cached finetune") == 4, more.stdout + more.stderr
    assert {name: run["status"] for name, run in runs(home).items() if name.startswith("too")} == {
        "too short, seed 7": "FAILED",
        "too short, seed 8": "FAILED",
    }
    assert "- too short: seed 7: train.max_length = 16: leaves 1 of 24" in (home / "reports" / "ablation-tiny.md").read_text()
