"""The report of a run: gathers what stages found into the report contract, writes it, and points `reports/latest` at it."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.core import hardware, ledger
from tasks.core.manifests import Manifest
from tasks.core.markdown import escape_markdown
from tasks.core.runner import Runner
from tasks.core.settings import Settings
from tasks.core.source import git_state
from tasks.core.tracking import Tracker
from tasks.decide import decided
from tasks.domain.errors import UserError
from tasks.gate import in_markdown
from tasks.overhead import overhead
from tasks.rendering import render
from tasks.reproducibility import reproducibility
from tasks.sbom import SBOM, write_sbom

PICTURES = ("accuracy_memory", "accuracy_speed", "latency", "divergence", "languages")


def write_report(
    run: Runner,
    config: RunConfig,
    started: str,
    decision: Manifest,
    dataset: Manifest,
    card: Manifest,
    plots: Manifest,
    adapter: Manifest,
    models: Mapping[str, Manifest],
    gate: dict[str, Any],
) -> tuple[Path, bool]:
    """Write `reports/<run>/`, log it to MLflow, and point `reports/latest` at it.

    Returns:
        The folder, and whether no stage of the run computed anything.
    """
    found = decided(run.store, decision)
    finished = datetime.now(UTC)
    ended_well = [stage for stage in run.stages if stage["state"] != "failed"]
    report = {
        "run_id": run.run_id,
        "mlflow_run": run.tracker.parent,
        "flow_run": run.tracker.tag("flow_run"),
        "profile": config.profile,
        "config": config.model_dump(mode="json"),
        "git": git_state(),
        "started": started,
        "finished": finished.isoformat(timespec="seconds"),
        "wall_s": round((finished - datetime.fromisoformat(started)).total_seconds(), 1),
        "environment": {**hardware.environment(), "measured_on": measured_on(found["variants"])},
        "stages": ended_well,
        "failed_stages": [stage["name"] for stage in run.stages if stage["state"] == "failed"],
        "dataset": {"sha256": dataset.digest, **dataset.metrics, "named_by_own_rows": card.metrics["named_by_own_rows"]},
        "training": training_facts(adapter, config),
        **found,
        "reproducibility": reproducibility(ended_well, found["variants"]),
        "gate": gate | {f"{name}_reason": why for name, why in NOT_IN_GATE.items() if gate.get(name) is None},
        "not_run": not_run(found["variants"]),
        "sbom": SBOM,
    }
    folder = run.settings.reports / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    write_sbom(folder / SBOM, report, config.base_model, dataset, adapter, models)
    shown = run.store.fetch(card), run.store.fetch(plots)
    report["overhead"] = overhead()  # as late as it can be and still be in the report
    render(report, folder, *shown)
    point_latest(run.settings, folder)
    run.tracker.log_files(run.tracker.parent, folder, "report")
    run.tracker.log_summary(report)
    with ledger.charge("prefect"):
        show_in_prefect(report, folder, run.tracker)
    return folder, all(stage["state"] == "cached" for stage in run.stages)


def show_in_prefect(report: dict[str, Any], folder: Path, tracker: Tracker) -> None:
    """The recommendation, the gate, the table of variants, all tables and the pictures as artifacts of the flow run, and where the report is."""
    from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact, create_table_artifact

    if page := tracker.page():
        create_link_artifact(key="mlflow-run", link=page, link_text="The run in MLflow", description=report["run_id"])
        create_link_artifact(key="report", link=f"{page}/artifacts/report/report.html", link_text="The report in MLflow")
    create_markdown_artifact(key="gate", markdown=in_markdown(report["gate"]), description=report["run_id"])
    where = f"Report: `{folder / 'report.html'}`\n\nMLflow run: `{tracker.parent}`"
    create_markdown_artifact(
        key="recommendation", markdown=f"{escape_markdown(report['recommendation']['why'])}\n\n{where}", description=report["run_id"]
    )
    create_table_artifact(key="variants", table=[_variant_row(v) for v in report["variants"]], description=report["run_id"])
    page = (folder / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(key="tables", markdown=by_itself(page), description=report["run_id"])
    for name in PICTURES:
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        create_image_artifact(key=name.replace("_", "-"), image_url=f"data:image/png;base64,{picture}", description=report["run_id"])


def by_itself(page: str) -> str:
    """A report in Markdown without what is beside it: pictures with their captions, and links to files."""
    without_pictures = re.sub(r"^!\[.*\n\n.*\n", "", page, flags=re.MULTILINE)
    return re.sub(r"\[([^\]\n]+)\]\((?!https?:)[^)\n]+\)", r"`\1`", without_pictures)


def _variant_row(variant: dict[str, Any]) -> dict[str, Any]:
    if variant.get("error"):
        return {"variant": variant["name"], "error": variant["error"]}
    quality, performance, fidelity = variant["quality"], variant["performance"], variant["fidelity"] or {}
    return {
        "variant": variant["name"],
        "exact match": quality["exact_match"]["value"],
        "hard": (quality["hard_exact_match"] or {}).get("value"),
        "verdict": fidelity.get("verdict"),
        "mean KLD": fidelity.get("mean_kld"),
        "size MB": variant["size_mb"],
        "RSS MB": performance["rss_mb"],
        "latency p50 ms": performance["latency_ms"]["p50"],
        "requests/s": performance["requests_s"],
        "batched": performance["requests_s_batched"],
        "speed-up": variant["speedup_vs_fp16"],
    }


NOT_IN_GATE = {"champion": "there was none", "challenger": "none was recommended", "delta": "not compared", "low": "not compared"}


def training_facts(adapter: Manifest, config: RunConfig) -> dict[str, Any]:
    """The `training` of the report."""
    names = ("examples", "epochs", "tokens", "tokens_per_s", "trainable_params", "final_loss", "validation_loss", "precision", "steps")
    facts = {name: adapter.metrics.get(name) for name in names}
    if facts["tokens_per_s"] is None:
        facts["tokens_per_s_reason"] = "training was interrupted and taken up again, so its speed was not measured as a whole"
    vocabulary = config.vocabulary.tokens or "all"
    about = {"base_model": config.base_model.source, "vocabulary": vocabulary}
    return {**about, **facts, "wall_s": adapter.wall_s, "peak_rss_mb": adapter.peak_rss_mb}


def not_run(variants: Iterable[Mapping[str, Any]]) -> list[str]:
    """What could not be measured where the variants were, in words."""
    if any(variant.get("device") == "cuda" for variant in variants):
        return []
    made = sorted({v["format"].upper() for v in variants if v["format"] in ("gptq", "awq") and v.get("performance")})
    what = f"{' and '.join(made)} was made and evaluated on the CPU, and neither" if made else "neither"
    return [f"There was no GPU: {what} GPU memory nor GPU speed was measured."]


def point_latest(settings: Settings, folder: Path) -> None:
    """Let `reports/latest` be a link to `folder`, replaced in one step."""
    link = settings.reports / "latest"
    new = settings.reports / f".latest-{os.getpid()}-{time.monotonic_ns()}"
    new.symlink_to(folder.name)
    new.replace(link)


def latest_artefacts(settings: Settings, profile: str) -> list[tuple[str, str]]:
    """Kind and key of what the latest run used, if it was of this profile: the next one probably uses most of it too."""
    try:
        report = json.loads((settings.reports / "latest" / "report.json").read_text(encoding="utf-8"))
        stages = report["stages"] if report["profile"] == profile else []
        return [(str(stage["kind"]), str(stage["key"])) for stage in stages if stage["kind"] and stage["key"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none yet, or no longer what it was: nothing depends on it
        return []


def measured_on(variants: Iterable[Mapping[str, Any]]) -> str:
    """The machines that speed and memory were measured on: with pools not the one that writes the report."""
    return "; ".join(
        sorted({variant["performance"]["machine"] for variant in variants if (variant.get("performance") or {}).get("machine")})
    )


def latest_report(settings: Settings, run_id: str = "latest") -> Path:
    """The folder of a finished report.

    Raises:
        UserError: there is none.
    """
    folder = settings.reports / run_id
    if not (folder / "report.json").is_file():
        known = sorted(path.name for path in settings.reports.glob("*/") if path.name != "latest") or "none yet"
        raise UserError("run", run_id, f"has no report in {settings.reports}", allowed=known, mend="Run `cartwright run` first")
    return folder.resolve()


def read_report(folder: Path) -> dict[str, Any]:
    """A finished report's figures.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "report.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            "run", folder.name, f"has a damaged report ({file})", mend="Run `cartwright run` again: it is written anew"
        ) from None
    return report
