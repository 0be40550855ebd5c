"""A check for data drift: what customers write now against what the champion was trained for. It tells, and promotes nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import deployment

from flows.session import alone, ending, opened, run_log, tell
from tasks.champion import Champion, champion_with_dataset
from tasks.core.artifacts import Store
from tasks.core.display import Display
from tasks.core.flat import as_params, flatten
from tasks.core.manifests import MANIFEST, Manifest
from tasks.core.markdown import escape_markdown
from tasks.core.registry import champion_files
from tasks.core.runner import Runner
from tasks.core.settings import Settings, load_settings
from tasks.core.tracking import open_parent
from tasks.domain.errors import UserError
from tasks.drift import DriftConfig, DriftOptions, read_result
from tasks.drift import drift as drift_stage
from tasks.drift_report import HEADLINES, TEXT, rows_of
from tasks.recent_texts import read_texts, shown

USUAL = DriftOptions()


@flow(name="drift")
def drift(texts: str = "", model: str = "shop-intent", options: DriftOptions = USUAL) -> Path:
    """Compare recent customer texts with the data the champion was trained on. Finds and tells; never promotes.

    Args:
        texts: JSONL with a `text` on each line: a path or any fsspec URI; `*` stands for any part of a name. Empty takes CARTWRIGHT_TEXTS.
        model: The registered model, `registry.name` of the configuration.
        options: Largest differences that are no drift, how many texts to compare and to ask, and whether to keep samples.

    Returns:
        The folder of the report.
    """
    settings = load_settings()
    uri = texts or settings.texts_uri
    digest, champion = read_texts(uri, most=0).sha256, champion_with_dataset(settings, model)
    display = Display(run_log()) if deployment.id else Display()
    with open_check(settings, champion, digest, options, display) as call, TemporaryDirectory() as folder:
        path, runtime, _ = champion_files(settings, model, Path(folder), champion.tags["version"])
        filled = {"texts": uri, "texts_sha256": digest, "model": str(path), "model_digest": champion.tags["cartwright.digest"]}
        config = DriftConfig(**dict(options), **filled, runtime=runtime)
        manifest = call(drift_stage, config, dataset=champion.dataset)
        return call.act("publish", lambda: (publish(call, champion, config, manifest), False), "report")


@contextmanager
def open_check(settings: Settings, champion: Champion, digest: str, options: DriftOptions, display: Display) -> Iterator[Runner]:
    """The MLflow run of a check, of kind `drift`, beside the retrainings that made the champion.

    Raises:
        UserError: the home cannot be written, or the same model is being checked already.
    """
    store = Store(settings.store_uri, settings.home)
    store.check_writable()
    running = UserError("model", champion.name, "is being checked for drift already", mend="Wait for it, or stop it first")
    with alone(settings, lock := f"drift-{champion.name}", running):
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-drift-{champion.name}"
        key = hashlib.sha256(
            f"drift {champion.name} {champion.tags['cartwright.digest']} {digest} {options.model_dump_json()}".encode()
        ).hexdigest()[:16]
        tags = {"cartwright.kind": "drift", "cartwright.model": champion.name, "cartwright.version": champion.tags["version"]}
        tags |= opened(settings, lock)
        tracker = open_parent(settings, champion.experiment, key, name, tags)
        with ending(tracker):
            yield Runner(tracker.run_name, settings, store, tracker, display)


def publish(call: Runner, champion: Champion, config: DriftConfig, manifest: Manifest) -> Path:
    """Report, MLflow run, Prefect artifacts and event; the folder of the report."""
    made, folder = call.store.path(manifest.kind, manifest.key), call.settings.reports / call.run_id
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    found, tracker = read_result(folder), call.tracker
    verdict, why = found["verdict"], "; ".join(found["reasons"])
    params = {"model": champion.name, "version": champion.tags["version"], "texts": shown(config.texts), **dict(config.allowed)}
    tracker.log(tracker.parent, flatten(manifest.metrics), as_params(params))
    tracker.log_files(tracker.parent, folder, "drift")
    tracker.client.set_tag(tracker.parent, "cartwright.drift", verdict)
    tracker.client.set_tag(tracker.parent, "mlflow.note.content", f"{HEADLINES[verdict]}. {escape_markdown(why)}")
    page = f"{(folder / TEXT).read_text(encoding='utf-8')}\nReport: `{folder / 'drift.html'}`\n\nMLflow run: `{tracker.parent}`"
    create_markdown_artifact(key="drift", markdown=page, description=call.run_id)
    create_table_artifact(key="drift-columns", table=rows_of(found), description=call.run_id)
    distances = {column["name"]: column["distance"] for column in found["columns"]}
    payload = {"run": call.run_id, "version": champion.tags["version"], "reasons": found["reasons"], "distances": distances}
    tell(f"drift.{verdict}", champion.name, {**payload, "texts": found["texts"], "report": str(folder / "drift.html")})
    return folder
