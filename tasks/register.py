"""Registering: every variant's run and model in MLflow, the recommended one as a version of the registered model, the gate."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tasks import gate
from tasks.core import ledger
from tasks.core.artifacts import Store
from tasks.core.flat import as_params, comparable, flatten
from tasks.core.manifests import Manifest
from tasks.core.registry import Registry
from tasks.core.runner import Runner
from tasks.core.tracking import Tracker
from tasks.decide import decided, recommended_cpu
from tasks.gate import RegisterConfig
from tasks.quantize_gguf import MODEL_FILE
from tasks.registered import problem_of
from tasks.variant_figures import AGAINST_REFERENCE

# Rows, and the evaluations of challenger and champion on them.
Comparison = tuple[Manifest, Manifest, Manifest]


def champion_artefact(registry: Registry, store: Store, config: RegisterConfig, prompt: str) -> Manifest | None:
    """The store's artefact of the registered champion, if both are there and it reads the data set's style of prompt."""
    champion = registry.champion(config.name)
    if not champion or "cartwright.key" not in champion or champion.get("cartwright.prompt", prompt) != prompt:
        return None
    kind, key = champion["cartwright.kind"], champion["cartwright.key"]
    with store.lock(kind, key):  # one that is being made anew is waited for
        return store.find(kind, key)[0]


def runtime_of(model: Manifest) -> Literal["llama_cpp", "transformers"]:
    """What a model's artefact is loaded with."""
    return "llama_cpp" if model.kind in ("quantize_gguf", "search_gguf") else "transformers"


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
                **{k: variant[k] for k in ("size_mb", "bits", *AGAINST_REFERENCE)},
            }
        )
        tracker.log(
            run_id,
            comparable(figures),
            as_params({k: variant[k] for k in ("name", "role", "format", "bits", "runtime", "device", "threads", "sha256")}),
        )
        if variant["fidelity"]:
            tracker.client.set_tag(run_id, "cartwright.verdict", variant["fidelity"]["verdict"])
        if variant["role"] == "candidate" or variant["name"] == decision["recommendation"]["gpu"]:  # that may be the 16-bit model
            manifest = models[variant["name"]]
            folder = store.fetch(manifest)
            artifacts = {
                "model": folder / MODEL_FILE if variant["runtime"] == "llama_cpp" else folder,
                "spec": store.fetch(dataset) / "spec.yaml",
            }
            logged[variant["name"]] = tracker.log_model(run_id, variant["name"], manifest.digest, artifacts, variant["runtime"])
        tracker.client.set_terminated(run_id)
    return logged


def judge_recommended(run: Runner, config: RegisterConfig, decision: Manifest, compared: Comparison | str) -> dict[str, Any]:
    """The gate's verdict on the recommended variant: the `gate` of the report.

    Args:
        compared: rows and evaluations, or why there are none.
    """
    registry, found, name = Registry(run.settings), decided(run.store, decision), recommended_cpu(decision)
    challenger = next((variant for variant in found["variants"] if variant["name"] == name), None)
    champion = registry.champion(config.name)
    checks: list[dict[str, Any]] | str
    if isinstance(compared, str):
        checks = compared
    elif champion and compared[2].inputs["model"] != champion.get("cartwright.digest"):
        checks = "another model became champion meanwhile; the next retraining compares with that"
    else:
        rows, mine, theirs = (run.store.fetch(manifest) for manifest in compared)
        checks = gate.compare(rows, mine, theirs, config)
    back = registry.rolled_back(config.name, challenger["sha256"]) if challenger else None
    return gate.judge(config, champion, challenger, found["recommendation"].get("excluded", {}), checks, back)


def register_variants(
    run: Runner, config: RegisterConfig, decision: Manifest, dataset: Manifest, models: dict[str, Manifest], verdict: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Log every variant, register the recommended one, and make it the champion if the verdict is to promote.

    Args:
        verdict: of `judge_recommended`, and of a person where one was asked: `by` is who decided.

    Returns:
        The `gate` of the report, and whether there was nothing to do.
    """
    with Registry(run.settings).registering(config.name), _temporary_files_in(run.settings.home / "tmp" / config.name):
        return _registered(run, config, decision, dataset, models, verdict)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """MLflow copies a model into the temporary folder before it logs it. What a kill leaves of it goes with the next registration."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def _registered(
    run: Runner, config: RegisterConfig, decision: Manifest, dataset: Manifest, models: dict[str, Manifest], verdict: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    tracker, registry, name = run.tracker, Registry(run.settings), recommended_cpu(decision)
    found = decided(run.store, decision)
    logged = log_variants(tracker, run.store, found, models, dataset)
    challenger = models.get(name or "")
    if not challenger or not name:
        return verdict, True
    tags = {
        "kind": challenger.kind, "key": challenger.key, "run": run.run_id, "mlflow_run": tracker.parent, "variant": name,
        "prompt": dataset.config["prompt"], "dataset_key": dataset.key, "dataset_sha256": dataset.digest, "flow_run": tracker.tag("flow_run") or "",
    }  # fmt: skip
    variant = next(variant for variant in found["variants"] if variant["name"] == name)
    about = describe(config.name, variant, run.run_id, tracker.parent)
    weights = {entry.sha256 for entry in challenger.files.values()}
    noted = {f"cartwright.{k}": v for k, v in tags.items()}
    version, known = registry.register(config.name, logged[name], challenger.digest, noted, about, weights)
    if verdict["verdict"] == "promote":
        verdict = promote(registry, config.name, version, verdict)
    verdict = {**verdict, "version": version}
    if not verdict["unchanged"]:  # what was decided when it was promoted stays the last word
        registry.write_decision(config.name, version, verdict)
    elif registry.unsettled(config.name):
        with registry.promoting(config.name):
            registry.settle(config.name)
    return verdict, known and verdict["verdict"] != "promote"


def promote(registry: Registry, name: str, version: str, verdict: dict[str, Any]) -> dict[str, Any]:
    """Make a version the champion, unless another became it since the verdict, or it does not answer from the registry."""
    with registry.promoting(name):
        champion = registry.champion(name)
        now = f"version {champion['version']}" if champion else None
        if now != verdict["champion"]:
            return gate.hold(verdict, f"it was compared with {verdict['champion'] or 'no champion'}, and the champion is {now} by now")
        problem = registry.promote(name, version, ledger.charge("stages")(lambda: problem_of(name, version)))
    if problem:
        return gate.hold(verdict, f"does not answer from the registry: {problem}")
    return {**verdict, "checks": [*verdict["checks"], {"name": "loads from the registry and answers", "passed": True}]}


def promote_by_hand(registry: Registry, name: str, version: dict[str, str], by: str, why: str) -> dict[str, Any]:
    """Make a version the champion because a person says so; what came of it, as a verdict.

    Args:
        version: its tags and number, see `Registry.version`.
    """
    champion = registry.champion(name)
    verdict: dict[str, Any] = {
        "verdict": "promote",
        "champion": f"version {champion['version']}" if champion else None,
        "challenger": version.get("cartwright.variant"),
        "checks": [],
        "by": by,
        "why": why,
    }
    if champion and champion["version"] == version["version"]:
        return gate.hold(verdict, "it is the champion already")
    verdict = promote(registry, name, version["version"], verdict)
    registry.write_decision(name, version["version"], verdict)
    return verdict


def describe(name: str, variant: dict[str, Any], run_id: str, mlflow_run: str) -> str:
    """What the registered model's page says of a version, as Markdown."""
    quality, speed, fidelity = variant["quality"], variant["performance"], variant["fidelity"] or {}
    exact, hard = quality["exact_match"], quality["hard_exact_match"]
    figures = [
        f"exact match {exact['value']:.1%} ({exact['low']:.1%} to {exact['high']:.1%}, {exact['n']} rows)",
        *([f"on `hard` {hard['value']:.1%}"] if hard else []),
        f"fidelity {fidelity.get('verdict', 'not measured')}",
        f"{speed['requests_s']:.1f} requests/s, {speed['requests_s_batched']:.1f} batched, {variant['size_mb']:.0f} MB",
    ]
    where = "In the folder of Cartwright, with `MLFLOW_TRACKING_URI=... .venv/bin/python` and the address of this MLflow:"
    load = f'```\nimport mlflow\nmodel = mlflow.pyfunc.load_model("models:/{name}@champion")\nmodel.predict(["two red shoes please"])\n```'
    return f"`{variant['name']}` of run `{run_id}` (MLflow run `{mlflow_run}`): {'; '.join(figures)}.\n\n{where}\n\n{load}"
