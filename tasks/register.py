"""Registering: every variant's run and model in MLflow, the recommended one as a version of the registered model, the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core.artifacts import Manifest, Store
from tasks.core.runner import Runner
from tasks.core.stage import StageConfig
from tasks.core.tracking import Tracker, as_params, flatten
from tasks.decide import correct_rows, paired_difference, recommended_cpu
from tasks.quantize_gguf import MODEL_FILE
from tasks.registered import problem_of_champion


class RegisterConfig(StageConfig):
    """Where the recommended model goes, and what it must not lose."""

    name: str = Field("shop-intent", pattern=r"^[\w.-]+$", description="Name of the registered model")
    margin: float = Field(
        0.01, ge=0, le=1, description="Largest loss of exact match against the champion, as a share: 0.01 is one percentage point"
    )


def champion_artefact(tracker: Tracker, store: Store, config: RegisterConfig, prompt: str) -> Manifest | None:
    """The store's artefact of the registered champion, if both are there and it reads the data set's style of prompt."""
    champion = tracker.champion(config.name)
    if not champion or "cartwright.key" not in champion or champion.get("cartwright.prompt", prompt) != prompt:
        return None
    return store.find(champion["cartwright.kind"], champion["cartwright.key"])[0]


def gate(
    config: RegisterConfig,
    champion: dict[str, str] | None,
    challenger: Manifest | None,
    name: str | None,
    mine: Path | None,
    theirs: Path | None,
) -> dict[str, Any]:
    """Compare challenger and champion on the same rows.

    Args:
        champion: its version and tags, None if there is none.
        mine, theirs: folders of the two evaluations; `theirs` is None if the champion could not be evaluated.

    Returns:
        The `gate` of the report.
    """
    result: dict[str, Any] = {
        "champion": f"version {champion['version']}" if champion else None,
        "challenger": name,
        "delta": None,
        "low": None,
        "margin": config.margin,
        "checks": [],
    }
    if not challenger or not mine:
        return {**result, "verdict": "hold", "checks": ["no variant was recommended"]}
    if not champion:
        return {**result, "verdict": "promote", "checks": ["there was no champion yet"]}
    if champion.get("cartwright.digest") == challenger.digest:
        return {**result, "verdict": "hold", "checks": ["the challenger is the champion already"]}
    if not theirs:
        return {
            **result,
            "verdict": "inconclusive",
            "checks": [
                "the champion could not be asked the same rows: its artefact is not in the store, or it reads another style of prompt"
            ],
        }
    difference = paired_difference(correct_rows(mine), correct_rows(theirs))
    passed = difference["delta"] >= -config.margin
    check = {"name": f"exact match at most {config.margin * 100:g} percentage points lower", "passed": passed}
    return {**result, "verdict": "promote" if passed else "hold", **difference, "checks": [check]}


def log_variants(
    tracker: Tracker, store: Store, decision: dict[str, Any], models: dict[str, Manifest], dataset: Manifest
) -> dict[str, str]:
    """A child run for every variant, with the same metric names, and a logged model for every deployable one.

    Returns:
        Ids of the logged models by variant.
    """
    logged = {}
    for variant in decision["variants"]:
        run_id = tracker.child(
            variant["name"],
            variant.get("key", variant["name"]) + "/" + variant["name"],
            "variant",
            {"cartwright.variant": variant["name"], "cartwright.dataset": dataset.digest},
        )
        if variant.get("error"):
            tracker.client.set_tag(run_id, "cartwright.error", variant["error"][:5000])
            tracker.client.set_terminated(run_id, "FAILED")
            continue
        figures = flatten(
            {
                **variant["quality"],
                **variant["performance"],
                **(variant["fidelity"] or {}),
                "constrained": variant.get("constrained") or {},
                **{k: variant[k] for k in ("size_mb", "bits", "speedup_vs_fp16", "ram_reduction_vs_fp16")},
            }
        )
        tracker.log(
            run_id,
            figures,
            as_params({k: variant[k] for k in ("name", "role", "format", "bits", "runtime", "device", "threads", "sha256")}),
        )
        if variant["fidelity"]:
            tracker.client.set_tag(run_id, "cartwright.verdict", variant["fidelity"]["verdict"])
        if variant["role"] == "candidate":
            manifest = models[variant["name"]]
            folder = store.path(manifest.kind, manifest.key)
            artifacts = {
                "model": folder / MODEL_FILE if variant["runtime"] == "llama_cpp" else folder,
                "spec": store.path(dataset.kind, dataset.key) / "spec.yaml",
            }
            logged[variant["name"]] = tracker.log_model(run_id, variant["name"], manifest.digest, artifacts, variant["runtime"])
        tracker.client.set_terminated(run_id)
    return logged


def register_variants(
    run: Runner,
    config: RegisterConfig,
    decision: Manifest,
    dataset: Manifest,
    models: dict[str, Manifest],
    evaluation: Manifest | None,
    champion_evaluation: Manifest | None,
) -> tuple[dict[str, Any], bool]:
    """Log every variant, register the recommended one, and make it the champion if it passes the gate.

    Args:
        evaluation: of the recommended variant.

    Returns:
        The `gate` of the report, and whether there was nothing to do.
    """
    tracker, store = run.tracker, run.store
    decided = json.loads((store.path(decision.kind, decision.key) / "decision.json").read_text(encoding="utf-8"))
    logged = log_variants(tracker, store, decided, models, dataset)
    name = recommended_cpu(decision)
    challenger = models.get(name or "")
    folders = [store.path(e.kind, e.key) if e else None for e in (evaluation, champion_evaluation)]
    verdict = gate(config, tracker.champion(config.name), challenger, name, folders[0], folders[1])
    if not challenger or not name:
        return verdict, True
    tags = {"cartwright.kind": challenger.kind, "cartwright.key": challenger.key, "cartwright.run": run.run_id, "cartwright.variant": name}
    tags |= {"cartwright.prompt": dataset.config["prompt"], "cartwright.dataset_key": dataset.key}
    version, known = tracker.register(config.name, logged[name], challenger.digest, tags)
    if verdict["verdict"] == "promote" and (when := tracker.rolled_back(config.name, version)):
        mend = f"it was rolled back at {when}; `cartwright rollback` once more makes it the champion again"
        verdict |= {"verdict": "hold", "checks": [*verdict["checks"], {"name": mend, "passed": False}]}
    if verdict["verdict"] == "promote":
        problem = tracker.promote(config.name, version, lambda: problem_of_champion(config.name))
        loads = {"name": "loads from the registry and answers" + (f": {problem}" if problem else ""), "passed": not problem}
        verdict |= {"verdict": "hold" if problem else "promote", "checks": [*verdict["checks"], loads]}
    return {**verdict, "version": version}, known and verdict["verdict"] != "promote"
