"""MLflow: one parent run per pipeline run, one child per stage and per variant.

Runs are found by tag before they are made, so a retry never duplicates one. Nothing here uses the fluent active run,
which is local to a thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from tasks.core import ledger
from tasks.core.flat import TAG, as_params, comparable, flatten, metric_name
from tasks.core.left_runs import end_left_runs
from tasks.core.manifests import Manifest
from tasks.core.markdown import escape_markdown
from tasks.core.settings import Settings, shown_uri, without_secrets
from tasks.domain.errors import UserError

Kind = Literal["pipeline", "stage", "variant", "arm"]
Runtime = Literal["transformers", "llama_cpp"]


def client_of(settings: Settings) -> Any:
    """A client of the MLflow of these settings, which becomes MLflow's own default too.

    Raises:
        UserError: MLflow or its database refuses the address, in a message that quotes a secret of it.
    """
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # its errors are raised as well, and told once
    mlflow.set_tracking_uri(settings.mlflow_uri)
    try:
        return mlflow.MlflowClient(settings.mlflow_uri)
    except Exception as error:  # of MLflow, SQLAlchemy or a driver
        told = without_secrets(str(error).replace(settings.mlflow_uri, shown_uri(settings.mlflow_uri)))
        if told == str(error):
            raise
        # Prefect keeps what a flow failed of, for everyone to read, and so the error behind this one has to go too.
        raise UserError("MLFLOW_TRACKING_URI", shown_uri(settings.mlflow_uri), f"is refused ({told.splitlines()[0][:300]})") from None


def write_ahead(backend: str) -> None:
    """Let MLflow's SQLite database, if it is one, have a write-ahead log: a run makes hundreds of commits, each waits for the disk once and not
    three times, and who reads does not wait for who writes. SQLite remembers it; where the database is in use, another time will do."""
    path = Path(backend.removeprefix("sqlite:///").partition("?")[0])
    if backend.startswith("sqlite:///") and path.is_absolute() and path.parent.is_dir():
        # What is wrong with a file that is no database, MLflow says.
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path, timeout=0)) as database:
            database.execute("PRAGMA journal_mode = WAL")


def open_parent(
    settings: Settings,
    experiment: str,
    pipeline_key: str,
    run_name: str,
    tags: Mapping[str, str],
    *,
    reopen: bool = False,
    mine: Callable[[Mapping[str, str]], bool] = lambda tags: True,
) -> Tracker:
    """A tracker of a parent run for a configuration: one that was left running, else a new one.

    Args:
        experiment: its name; made if there is none.
        pipeline_key: hash of the run's configuration. A parent run of the same key that was left running is taken up again.
        reopen: a parent run of the same key is taken up even if it has ended.
        mine: whether one may be taken up, by its tags. One of the same Prefect flow run is asked about even if it has ended.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.home / "mlflow.lock"):  # two first starts would race in the migration
        write_ahead(settings.mlflow_uri)
        client = client_of(settings)
        found = client.get_experiment_by_name(experiment)
        location = (settings.home / "mlflow-artifacts").as_uri() if settings.mlflow_uri.startswith("sqlite:") else None
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifact_location=location)
    same = f"tags.`{TAG}pipeline_key` = '{pipeline_key}'"
    conditions = [same] if reopen else [f"{same} and attributes.status = 'RUNNING'", f"{same} and tags.`{TAG}left` = 'yes'"]
    if flow_run := tags.get(TAG + "flow_run"):
        conditions.insert(0, f"{same} and tags.`{TAG}flow_run` = '{flow_run}'")
    left = [run for condition in conditions for run in client.search_runs([experiment_id], condition, max_results=1)]
    taken = next((run.info.run_id for run in left if mine(run.data.tags)), None)
    if taken:
        client.update_run(taken, status="RUNNING")
        end_left_runs(client, settings, str(taken), tags)
        for name, value in {**tags, TAG + "left": "no"}.items():
            client.set_tag(taken, name, value)
        return Tracker(settings, str(taken), resumed=True)
    all_tags = {TAG + "kind": "pipeline", **tags, TAG + "pipeline_key": pipeline_key, "mlflow.runName": run_name}
    made = str(client.create_run(experiment_id, run_name=run_name, tags=all_tags).info.run_id)
    end_left_runs(client, settings, made, tags)
    return Tracker(settings, made)


def preload() -> None:
    """Import what a tracker needs, which takes seconds, while there is something else to wait for."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


class Tracker:
    """The MLflow side of one pipeline run: its parent run and the children of that.

    Args:
        parent: id of the parent run, see `open_parent`.

    Raises:
        UserError: MLflow has no such run.
    """

    def __init__(self, settings: Settings, parent: str, resumed: bool = False) -> None:
        from mlflow.exceptions import MlflowException

        self.client = client_of(settings)
        self.uri = settings.mlflow_uri
        self.parent, self.resumed = parent, resumed
        try:
            self.experiment_id = str(self.client.get_run(parent).info.experiment_id)
        except MlflowException as error:
            mend = "Give the workers the MLFLOW_TRACKING_URI of the flow that calls them"
            raise UserError("MLFLOW_TRACKING_URI", shown_uri(self.uri), f"has no run {parent} ({error.error_code})", mend=mend) from None
        self._without_params: set[str] = set()  # runs made here, of which nothing need be read before parameters are written
        earlier = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        self._children = {(run.data.tags.get(TAG + "kind"), run.data.tags.get(TAG + "key")): str(run.info.run_id) for run in earlier}
        self._killed = {str(run.info.run_id) for run in earlier if run.info.status == "KILLED"}

    def _search(self, condition: str) -> list[Any]:
        return list(self.client.search_runs([self.experiment_id], condition, max_results=1000))

    @ledger.charge("mlflow")
    def tag(self, name: str) -> str | None:
        """A tag of ours on the parent run."""
        found: str | None = self.client.get_run(self.parent).data.tags.get(TAG + name)
        return found

    def page(self) -> str | None:
        """The address of the parent run's page, where MLflow is a server."""
        if not self.uri.startswith(("http:", "https:")):
            return None
        return f"{shown_uri(self.uri).replace('***@', '').rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.parent}"

    @property
    def run_name(self) -> str:
        return str(self.client.get_run(self.parent).info.run_name)

    @ledger.charge("mlflow")
    def child(self, name: str, key: str, kind: Kind, tags: Mapping[str, str] | None = None) -> str:
        """The id of the child run with this key, found or made."""
        known = self._children.get((kind, key))
        if known:
            if known in self._killed:
                self._killed.discard(known)
                self.client.update_run(known, status="RUNNING")
            for tag, value in (tags or {}).items():
                self.client.set_tag(known, tag, value)
            return known
        all_tags = {**(tags or {}), TAG + "key": key, TAG + "kind": kind, "mlflow.parentRunId": self.parent}
        made = str(self.client.create_run(self.experiment_id, run_name=name, tags=all_tags).info.run_id)
        self._children[kind, key] = made
        self._without_params.add(made)
        return made

    @ledger.charge("mlflow")
    def log(self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, str] | None = None, step: int = 0) -> None:
        """Write metrics and parameters in one request; parameters that are there already stay."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        known = self.client.get_run(run_id).data.params if params and run_id not in self._without_params else {}
        if params:
            self._without_params.discard(run_id)
        wanted = [Param(name, value) for name, value in (params or {}).items() if name not in known]
        self.client.log_batch(run_id, [Metric(metric_name(name), value, now, step) for name, value in metrics.items()], wanted)

    @ledger.charge("mlflow")
    def log_stage(self, label: str, manifest: Manifest, cached: bool) -> None:
        """Write a finished stage into its child run and end it.

        Figures of an evaluation's parts, such as `test.by_language.de.value`, are in the variant's run, and not here once more: they are most
        of what a cached run would have to write.
        """
        run_id = self.child(label, manifest.key, "stage", {TAG + "cached": str(cached).lower(), TAG + "stage": manifest.kind})
        metrics = {
            **{name: value for name, value in flatten(manifest.metrics).items() if name.count(".") < 3},
            "wall_s": manifest.wall_s,
            **({"peak_rss_mb": manifest.peak_rss_mb} if manifest.peak_rss_mb else {}),
        }
        self.log(run_id, dict(list(metrics.items())[:900]), as_params(manifest.config))
        self.client.set_terminated(run_id)

    @ledger.charge("mlflow")
    def log_files(self, run_id: str, folder: Path, artifact_path: str | None = None) -> None:
        self.client.log_artifacts(run_id, str(folder), artifact_path)

    @ledger.charge("mlflow")
    def log_dataset(self, run_id: str, name: str, digest: str, uri: str, profile: Mapping[str, Any]) -> None:
        """Show a data set as an input of a run; once, however often it is called.

        Args:
            uri: where its files are, as an fsspec URI.
            profile: counts of what is in it.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        scheme = urlsplit(uri).scheme or "file"
        made = Dataset(
            name=name,
            digest=digest[:36],  # as much as MLflow's database holds
            source_type="local" if scheme == "file" else scheme,
            source=json.dumps({"uri": unquote(urlsplit(uri).path) if scheme == "file" else uri}),
            profile=json.dumps(profile),
        )
        self.client.log_inputs(run_id, [DatasetInput(made, [InputTag("mlflow.data.context", "training")])])

    @ledger.charge("mlflow")
    def log_summary(self, report: Mapping[str, Any]) -> None:
        """The run's main figures on the parent run, so that runs compare without opening children."""
        recommended = next((v for v in report["variants"] if v["name"] == report["recommendation"]["cpu"]), None)
        figures = comparable(flatten({**recommended["quality"], **recommended["performance"]})) if recommended else {}
        self.log(self.parent, {**figures, "wall_s": report["wall_s"], **flatten(report["overhead"], "overhead.")})
        flow_run = self.tag("flow_run_url")
        note = escape_markdown(report["recommendation"]["why"]) + (f"\n\n[The flow run in Prefect]({flow_run})" if flow_run else "")
        self.client.set_tag(self.parent, "mlflow.note.content", note)
        self.client.set_tag(self.parent, TAG + "gate", report["gate"]["verdict"])

    @ledger.charge("mlflow")
    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the parent and every child that is still running; of two children with one key, one goes.

        There are two where an answer of MLflow was lost, and its client sent the request to make a run once more.
        """
        seen: set[tuple[str, str]] = set()
        children = self._search(f"tags.`mlflow.parentRunId` = '{self.parent}'")
        for run in sorted(children, key=lambda run: (run.info.run_id not in self._children.values(), run.info.status == "RUNNING")):
            which = (run.data.tags.get(TAG + "kind", ""), run.data.tags.get(TAG + "key", run.info.run_id))
            if which in seen:
                self.client.delete_run(run.info.run_id)
            elif run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, status)
            seen.add(which)
        self.client.set_terminated(self.parent, status)

    # Models ------------------------------------------------------------------------------------------------------

    @ledger.charge("mlflow")
    def log_model(self, run_id: str, name: str, digest: str, artifacts: Mapping[str, Path], runtime: str) -> str:
        """Log a deployable model once per content, and show it as an output of `run_id`. One that a kill cut short is completed.

        Returns:
            The id of the logged model, an earlier one if its content is the same.
        """
        import mlflow
        from mlflow.entities import LoggedModelOutput

        ready, begun = self._logged(digest, run_id)
        if ready:
            model_id = ready[0]
        else:
            if not begun:
                tags = {TAG + "digest": digest, TAG + "variant": name}
                mlflow.initialize_logged_model(name=name, source_run_id=run_id, tags=tags, experiment_id=self.experiment_id)
                _, begun = self._logged(digest, run_id)  # two, if MLflow's answer was lost and the client asked again
            model_id, *others = begun
            for other in others:
                self.client.delete_logged_model(other)
            package = Path(__file__).resolve().parents[1]
            mlflow.pyfunc.log_model(
                model_id=model_id,
                python_model=str(package / "pyfunc_model.py"),
                artifacts={key: str(path) for key, path in artifacts.items()},
                model_config={"runtime": runtime},
                code_paths=[str(package)],
                pip_requirements=_serving_requirements(runtime),
            )
        shown = self.client.get_run(run_id).outputs
        if model_id not in {output.model_id for output in (shown.model_outputs if shown else [])}:  # twice is an error
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id=model_id, step=0)])
        return model_id

    def _logged(self, digest: str, run_id: str) -> tuple[list[str], list[str]]:
        """The logged models with this content: those that are whole, and those that were begun and nobody else is at."""
        found = self.client.search_logged_models([self.experiment_id], filter_string=f"tags.`{TAG}digest` = '{digest}'")
        ready = [str(model.model_id) for model in found if str(model.status) == "READY"]
        return ready, [str(model.model_id) for model in found if str(model.status) == "PENDING" and self._was_cut_short(model, run_id)]

    def _was_cut_short(self, model: Any, run_id: str) -> bool:
        """Whether nobody is logging a model that is not ready: its run is this one, taken up again, or goes on no more."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(model.source_run_id == run_id or self.client.get_run(model.source_run_id).info.status != "RUNNING")
        except MlflowException:  # deleted for good
            return True


def _serving_requirements(runtime: str) -> list[str]:
    from tasks.core.hardware import versions

    names = ("llama-cpp-python", "numpy", "jinja2", "pydantic", "pyyaml", "psutil", "mlflow")
    extra = ("torch", "transformers", "optimum", "gptqmodel") if runtime == "transformers" else ()
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions((*names, *extra)).items()]
