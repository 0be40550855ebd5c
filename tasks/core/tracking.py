"""MLflow: one parent run per pipeline run, one child per stage and per variant. The only module that imports mlflow.

Runs are found by tag before they are made, so a retry never duplicates one. Nothing here uses the fluent active run,
which is local to a thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from tasks.core.artifacts import Manifest
from tasks.core.settings import Settings
from tasks.domain.errors import UserError

Kind = Literal["pipeline", "stage", "variant", "arm"]
Runtime = Literal["transformers", "llama_cpp"]
TAG = "cartwright."
CHAMPION, PREVIOUS = "champion", "previous"  # aliases of the registered model
ROLLED_BACK = TAG + "rolled_back"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping by dotted name: what MLflow takes as metrics. Lists and texts are left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def as_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as MLflow parameters, nested fields by dotted name; at most 6,000 characters each."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= as_params(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{name}"] = text[:6000]
    return flat


def preload() -> None:
    """Import what a tracker needs, which takes seconds, while there is something else to wait for."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


class Tracker:
    """The MLflow side of one pipeline run.

    Args:
        experiment: its name; made if there is none.
        pipeline_key: hash of the run's configuration. A parent run of the same key that was left running is taken up again.
        reopen: a parent run of the same key is taken up even if it has ended.
    """

    def __init__(
        self, settings: Settings, experiment: str, pipeline_key: str, run_name: str, tags: Mapping[str, str], *, reopen: bool = False
    ) -> None:
        import mlflow
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        settings.home.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(settings.mlflow_uri)
        self.uri = settings.mlflow_uri
        self.client = MlflowClient(settings.mlflow_uri)
        with FileLock(settings.home / "mlflow.lock"):  # two first starts would race in the migration
            found = self.client.get_experiment_by_name(experiment)
            location = (settings.home / "mlflow-artifacts").as_uri() if settings.mlflow_uri.startswith("sqlite:") else None
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment, artifact_location=location)
        self._without_params: set[str] = set()  # runs made here, of which nothing need be read before parameters are written
        same = f"tags.`{TAG}pipeline_key` = '{pipeline_key}'"
        left = self._search(same if reopen else f"{same} and attributes.status = 'RUNNING'")
        self.resumed = bool(left)
        if left:
            self.parent = left[0].info.run_id
            self.client.update_run(self.parent, status="RUNNING")
        else:
            all_tags = {TAG + "kind": "pipeline", **tags, TAG + "pipeline_key": pipeline_key, "mlflow.runName": run_name}
            self.parent = self.client.create_run(self.experiment_id, run_name=run_name, tags=all_tags).info.run_id
        earlier = self._search(f"tags.`mlflow.parentRunId` = '{self.parent}'") if left else []
        self._children = {(run.data.tags.get(TAG + "kind"), run.data.tags.get(TAG + "key")): str(run.info.run_id) for run in earlier}

    def _search(self, condition: str) -> list[Any]:
        return list(self.client.search_runs([self.experiment_id], condition, max_results=1000))

    @property
    def run_name(self) -> str:
        return str(self.client.get_run(self.parent).info.run_name)

    def child(self, name: str, key: str, kind: Kind, tags: Mapping[str, str] | None = None) -> str:
        """The id of the child run with this key, found or made."""
        known = self._children.get((kind, key))
        if known:
            for tag, value in (tags or {}).items():
                self.client.set_tag(known, tag, value)
            return known
        all_tags = {**(tags or {}), TAG + "key": key, TAG + "kind": kind, "mlflow.parentRunId": self.parent}
        made = str(self.client.create_run(self.experiment_id, run_name=name, tags=all_tags).info.run_id)
        self._children[kind, key] = made
        self._without_params.add(made)
        return made

    def log(self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, str] | None = None, step: int = 0) -> None:
        """Write metrics and parameters in one request; parameters that are there already stay."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        known = self.client.get_run(run_id).data.params if params and run_id not in self._without_params else {}
        if params:
            self._without_params.discard(run_id)
        wanted = [Param(name, value) for name, value in (params or {}).items() if name not in known]
        self.client.log_batch(run_id, [Metric(_metric_name(name), value, now, step) for name, value in metrics.items()], wanted)

    def log_stage(self, label: str, manifest: Manifest, cached: bool) -> str:
        """Write a finished stage into its child run and end it."""
        run_id = self.child(label, manifest.key, "stage", {TAG + "cached": str(cached).lower(), TAG + "stage": manifest.kind})
        metrics = {
            **flatten(manifest.metrics),
            "wall_s": manifest.wall_s,
            **({"peak_rss_mb": manifest.peak_rss_mb} if manifest.peak_rss_mb else {}),
        }
        self.log(run_id, dict(list(metrics.items())[:900]), as_params(manifest.config))
        self.client.set_terminated(run_id)
        return run_id

    def log_files(self, run_id: str, folder: Path, artifact_path: str | None = None) -> None:
        self.client.log_artifacts(run_id, str(folder), artifact_path)

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

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """The run's main figures on the parent run, so that runs compare without opening children."""
        recommended = next((v for v in report["variants"] if v["name"] == report["recommendation"]["cpu"]), None)
        figures = flatten({**recommended["quality"], **recommended["performance"]}) if recommended else {}
        self.log(self.parent, {**figures, "wall_s": report["wall_s"]})
        self.client.set_tag(self.parent, "mlflow.note.content", report["recommendation"]["why"])
        self.client.set_tag(self.parent, TAG + "gate", report["gate"]["verdict"])

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the parent and every child that is still running."""
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self.parent}' and attributes.status = 'RUNNING'"):
            self.client.set_terminated(run.info.run_id, status)
        self.client.set_terminated(self.parent, status)

    # Models ------------------------------------------------------------------------------------------------------

    def log_model(self, run_id: str, name: str, digest: str, artifacts: Mapping[str, Path], runtime: str) -> str:
        """Log a deployable model once per content, and show it as an output of `run_id`.

        Returns:
            The id of the logged model, an earlier one if its content is the same.
        """
        import mlflow
        from mlflow.entities import LoggedModelOutput

        found = self.client.search_logged_models([self.experiment_id], filter_string=f"tags.`{TAG}digest` = '{digest}'", max_results=1)
        ready = [model for model in found if str(model.status) == "READY"]
        if ready:
            model_id = str(ready[0].model_id)
        else:
            tags = {TAG + "digest": digest, TAG + "variant": name}
            model_id = str(
                mlflow.initialize_logged_model(name=name, source_run_id=run_id, tags=tags, experiment_id=self.experiment_id).model_id
            )
            package = Path(__file__).resolve().parents[1]
            mlflow.pyfunc.log_model(
                model_id=model_id,
                python_model=str(package / "pyfunc_model.py"),
                artifacts={key: str(path) for key, path in artifacts.items()},
                model_config={"runtime": runtime},
                code_paths=[str(package)],
                pip_requirements=_serving_requirements(runtime),
            )
        self.client.log_outputs(run_id, [LoggedModelOutput(model_id=model_id, step=0)])
        return model_id

    def register(self, name: str, model_id: str, digest: str, tags: Mapping[str, str]) -> tuple[str, bool]:
        """Register a logged model once per content; its version, and whether it was there already."""
        import mlflow

        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(TAG + "digest") == digest:
                for tag in tags.keys() - version.tags.keys():  # of an earlier Cartwright, which did not note it yet
                    self.client.set_model_version_tag(name, str(version.version), tag, tags[tag])
                return str(version.version), True
        with contextlib.redirect_stderr(io.StringIO()):  # it reports to the terminal what we report ourselves
            made = mlflow.register_model(f"models:/{model_id}", name, tags={**tags, TAG + "digest": digest})
        return str(made.version), False

    def champion(self, name: str, alias: str = CHAMPION) -> dict[str, str] | None:
        """Version and tags of the registered model's champion, or of what another alias points at; None without one."""
        return version_behind(self.client, name, alias)

    def promote(self, name: str, version: str, works: Callable[[], str]) -> str:
        """Make a version the champion, and the champion until now `previous`. If it then does not work, all is as it was.

        Args:
            works: what is wrong with the new champion; empty if nothing is.

        Returns:
            What was wrong.
        """
        before = {alias: self.champion(name, alias) for alias in (CHAMPION, PREVIOUS)}
        if until_now := before[CHAMPION]:
            self.client.set_registered_model_alias(name, PREVIOUS, until_now["version"])
        self.client.set_registered_model_alias(name, CHAMPION, version)
        try:
            problem = works()
        except BaseException:  # interrupted: it has not proved itself
            self._put_back(name, before)
            raise
        if problem:
            self._put_back(name, before)
        else:
            self.client.set_model_version_tag(name, version, TAG + "promoted", datetime.now(UTC).isoformat(timespec="seconds"))
        return problem

    def _put_back(self, name: str, before: Mapping[str, dict[str, str] | None]) -> None:
        for alias, was in before.items():
            if was:
                self.client.set_registered_model_alias(name, alias, was["version"])
            else:
                self.client.delete_registered_model_alias(name, alias)

    def rolled_back(self, name: str, version: str) -> str | None:
        """When a version was taken out of service by `rollback`; None if it was not."""
        return self.client.get_model_version(name, version).tags.get(ROLLED_BACK) or None


def version_behind(client: Any, name: str, alias: str) -> dict[str, str] | None:
    """Version and tags of what an alias of a registered model points at; None if there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return {**version.tags, "version": str(version.version)}


def find_champion(settings: Settings, name: str) -> tuple[dict[str, str], str | None]:
    """Version and tags of a registered model's champion, and the experiment it was made in, None if that is gone.

    Raises:
        UserError: the registry has none.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    kept = settings.mlflow_uri.removeprefix("sqlite:///")
    champion = None
    if kept == settings.mlflow_uri or Path(kept).exists():  # else MLflow would make an empty one
        mlflow.set_tracking_uri(settings.mlflow_uri)
        client = mlflow.MlflowClient()
        champion = version_behind(client, name, CHAMPION)
    if not champion:
        problem = f"has no champion in {settings.mlflow_uri}"
        raise UserError("model", name, problem, mend="Run `cartwright run` first, or name the model as registry.name did")
    try:
        run_id = client.get_model_version(name, champion["version"]).run_id
        return champion, str(client.get_experiment(client.get_run(run_id).info.experiment_id).name) if run_id else None
    except MlflowException:
        return champion, None


def rollback(settings: Settings, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Let `champion` and `previous` of a registered model change places.

    Returns:
        Version and tags of the champion now, and of the one until now.

    Raises:
        UserError: one of the two is missing.
    """
    import mlflow

    mlflow.set_tracking_uri(settings.mlflow_uri)
    client = mlflow.MlflowClient()
    champion, previous = (version_behind(client, name, alias) for alias in (CHAMPION, PREVIOUS))
    if not champion or not previous:
        missing = CHAMPION if not champion else PREVIOUS
        mend = "There is nothing to go back to before a second model was promoted"
        raise UserError("model", name, f"has no version with the alias {missing} in {settings.mlflow_uri}", mend=mend)
    client.set_registered_model_alias(name, CHAMPION, previous["version"])
    client.set_registered_model_alias(name, PREVIOUS, champion["version"])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    client.set_model_version_tag(name, champion["version"], ROLLED_BACK, now)  # the next retraining must not promote it again
    client.set_model_version_tag(name, previous["version"], TAG + "promoted", f"{now} by rollback")
    if ROLLED_BACK in previous:
        client.delete_model_version_tag(name, previous["version"], ROLLED_BACK)
    return previous, champion


def _metric_name(name: str) -> str:
    """MLflow allows letters, digits, `_ - . : /` and spaces in the name of a metric."""
    return "".join(char if char.isalnum() or char in "_-. :/" else "_" for char in name)


def _serving_requirements(runtime: str) -> list[str]:
    from tasks.core.hardware import versions

    names = ("llama-cpp-python", "numpy", "jinja2", "pydantic", "pyyaml", "psutil", "mlflow")
    extra = ("torch", "transformers", "optimum", "gptqmodel") if runtime == "transformers" else ()
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions((*names, *extra)).items()]


def champion_files(settings: Settings, name: str, into: Path | None = None) -> tuple[Path, Runtime, Path]:
    """Path of the champion's model, the runtime that loads it, and the folder of its `spec.yaml`.

    Args:
        into: an empty folder for the files of a registry that keeps them elsewhere.

    Raises:
        UserError: the registry has none.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(settings.mlflow_uri)
    uri = f"models:/{name}@{CHAMPION}"
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(into) if into else None))
    except MlflowException as error:
        raise UserError(
            "model",
            CHAMPION,
            f"the registry {settings.mlflow_uri} has no champion of {name} ({error.error_code})",
            mend="Run `cartwright run` first",
        ) from None
    flavor = mlflow.models.Model.load(str(folder)).flavors["python_function"]
    files = flavor["artifacts"]
    return folder / files["model"]["path"], flavor["config"]["runtime"], (folder / files["spec"]["path"]).parent
