"""The registered model in MLflow: its versions, the aliases `champion` and `previous`, and what was decided about them."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from tasks.core import ledger
from tasks.core.claims import Claim
from tasks.core.flat import TAG
from tasks.core.registered_files import ANEW, TAG_LENGTH, check_files, files_of, hashes_as_tags
from tasks.core.settings import Settings, shown_uri
from tasks.core.tracking import Runtime, client_of
from tasks.domain.errors import UserError

CHAMPION, PREVIOUS = "champion", "previous"
ROLLED_BACK = TAG + "rolled_back"
ROLLING_BACK = TAG + "rolling_back"  # on the version that a rollback makes champion, while it is under way: the version it replaces
BEFORE = TAG + "previous_before"  # on the champion that a promotion replaces, while it is under way: what was `previous`, or NONE
NONE = "none"
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")  # what MLflow says of what is not there


class Registry:
    """The registered models of an MLflow."""

    @ledger.charge("mlflow")
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.client = client_of(settings)
        self._claim: Claim | None = None

    def register(
        self, name: str, model_id: str, digest: str, tags: Mapping[str, str], description: str, weights: Collection[str] = ()
    ) -> tuple[str, bool]:
        """Register a logged model once per content; its version, and whether it was there already. What is in its files is noted.

        Args:
            description: what its page says of it, as Markdown.
            weights: SHA-256 of the files of the artefact it was logged from; if there are any, files of weights must be among them.

        Raises:
            UserError: the registry's storage holds other weights than were logged.
        """
        import mlflow

        for version in self.client.search_model_versions(f"name = '{name}'"):
            if version.tags.get(TAG + "digest") == digest:
                wanted = {tag: value for tag, value in tags.items() if tag not in version.tags}  # of an earlier Cartwright
                if not files_of(version.tags):
                    wanted |= self._files(f"models:/{name}/{version.version}", weights)
                for tag, value in wanted.items():
                    self.client.set_model_version_tag(name, str(version.version), tag, value)
                return str(version.version), True
        uri = f"models:/{model_id}"
        tags = {**tags, **self._files(uri, weights), TAG + "digest": digest}
        with contextlib.redirect_stderr(io.StringIO()):  # it reports to the terminal what we report ourselves
            made = mlflow.register_model(uri, name, tags=tags)
        version = self._first_of(name, digest, str(made.version))
        self.client.update_model_version(name, version, description)
        return version, False

    def _first_of(self, name: str, digest: str, made: str) -> str:
        """The first version with this content. Where that is not the one just made, since MLflow's answer was lost and the client asked again,
        or another host registered it at the same moment, the latter goes."""
        same = [
            str(version.version)
            for version in self.client.search_model_versions(f"name = '{name}'")
            if version.tags.get(TAG + "digest") == digest
        ]
        first = min([*same, made], key=int)
        if first != made:
            self.client.delete_model_version(name, made)
        return first

    def _files(self, uri: str, weights: Collection[str]) -> dict[str, str]:
        """SHA-256 of every file of a model, as tags."""
        import mlflow

        with TemporaryDirectory() as folder:
            return hashes_as_tags(Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder)), uri, weights)

    @ledger.charge("mlflow")
    def champion(self, name: str, alias: str = CHAMPION) -> dict[str, str] | None:
        """Version and tags of the registered model's champion, or of what another alias points at; None without one."""
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in MISSING:
                return None
            raise
        return {**version.tags, "version": str(version.version)}

    def promote(self, name: str, version: str, works: Callable[[], str]) -> str:
        """Make a version the champion if it works, and the champion until now `previous`. If it does not, nothing has moved.

        Args:
            works: what is wrong with the version, loaded from the registry; empty if nothing is. Asked before the alias moves: who
                serves the champion follows the alias, and must not get what has not proved itself.

        Returns:
            What was wrong.
        """
        if problem := works():
            return problem
        if self._claim and not self._claim.holds():
            return "it took so long that another host began to promote"
        self.settle(name)
        until_now, previous = (self.champion(name, alias) for alias in (CHAMPION, PREVIOUS))
        replaced = until_now["version"] if until_now and until_now["version"] != version else None
        if replaced:  # any of these writes may be the last before the machine dies, see `settle`
            self.client.set_model_version_tag(name, replaced, BEFORE, previous["version"] if previous else NONE)
            self.client.set_registered_model_alias(name, PREVIOUS, replaced)
        self.client.set_registered_model_alias(name, CHAMPION, version)
        self._promoted(name, version, replaced)
        return ""

    def _promoted(self, name: str, version: str, replaced: str | None) -> None:
        """What is written once the alias has moved."""
        tags = self.client.get_model_version(name, version).tags
        self.client.set_model_version_tag(name, version, TAG + "promoted", _now())
        for tag in {ROLLED_BACK, ROLLING_BACK, BEFORE} & set(tags):
            self.client.delete_model_version_tag(name, version, tag)
        if replaced:
            self.client.delete_model_version_tag(name, replaced, BEFORE)  # last: until then the next promotion or rollback looks after it

    def unsettled(self, name: str) -> bool:
        """Whether a promotion was killed between its writes."""
        return any(BEFORE in (self.champion(name, alias) or ()) for alias in (CHAMPION, PREVIOUS))

    def settle(self, name: str) -> None:
        """Undo what a promotion wrote that was killed before the champion moved, or write what one still had to that was killed after it."""
        champion, previous = (self.champion(name, alias) for alias in (CHAMPION, PREVIOUS))
        if champion and BEFORE in champion:
            if previous and previous["version"] == champion["version"]:
                known = {str(version.version) for version in self.client.search_model_versions(f"name = '{name}'")}
                if champion[BEFORE] in known:
                    self.client.set_registered_model_alias(name, PREVIOUS, champion[BEFORE])
                else:  # there was none, or it was deleted since
                    self.client.delete_registered_model_alias(name, PREVIOUS)
            self.client.delete_model_version_tag(name, champion["version"], BEFORE)
        elif champion and previous and BEFORE in previous:
            self._promoted(name, champion["version"], previous["version"])

    @ledger.charge("mlflow")
    def rolled_back(self, name: str, digest: str) -> str | None:
        """When the version with this content was taken out of service by `rollback`; None if it was not, or is not registered."""
        found = [v for v in self.client.search_model_versions(f"name = '{name}'") if v.tags.get(TAG + "digest") == digest]
        return next((v.tags[ROLLED_BACK] for v in found if v.tags.get(ROLLED_BACK)), None)

    def version(self, name: str, version: str | None) -> dict[str, str]:
        """Tags of a version of a registered model, the newest if None, with its `version`.

        Raises:
            UserError: there is none.
        """
        found = {str(v.version): v for v in self.client.search_model_versions(f"name = '{name}'")}
        wanted = version or max(found, key=int, default="")
        if wanted not in found:
            problem = f"is no version of {name} in {shown_uri(self._settings.mlflow_uri)}"
            raise UserError(
                "version", version, problem, allowed=sorted(found, key=int) or "none yet", mend="`cartwright run` registers one"
            )
        return {**found[wanted].tags, "version": wanted}

    @contextlib.contextmanager
    def promoting(self, name: str) -> Iterator[None]:
        """Held while a model is promoted or rolled back: MLflow's aliases have no compare-and-swap. Of homes that share records by a
        server, too, whether or not they have a Prefect server in common."""
        with self._lock(f"promotion-{name}"):
            if not by_server(self._settings) or not self.client.search_registered_models(f"name = '{name}'"):
                yield
                return
            with Claim(self.client, name, f"{socket.gethostname()}:{self._settings.home}") as self._claim:
                try:
                    yield
                finally:
                    self._claim = None

    def registering(self, name: str) -> FileLock:
        """Held while models are logged and registered: two runs that look for a version at once would both make it."""
        return self._lock(f"registration-{name}")

    def _lock(self, name: str) -> FileLock:
        file = self._settings.mlflow_uri.removeprefix("sqlite:///")
        folder = (
            self._settings.home if file == self._settings.mlflow_uri else Path(file).parent
        ) / "locks"  # of all homes that share a file
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def write_decision(self, name: str, version: str, decision: Mapping[str, Any]) -> None:
        """Note on a version what was decided about it: by whom or what, when, why, and the figures. Earlier decisions stay."""
        when = _now()
        checks = [{"name": check["name"], "passed": check["passed"]} for check in decision["checks"]]
        written = json.dumps({**decision, "when": when, "checks": checks})
        if len(written) > TAG_LENGTH:
            written = json.dumps({**decision, "when": when, "checks": [check for check in checks if not check["passed"]][:10]})
        moment = when.replace(":", "").replace("+0000", "")
        for tag, value in ((f"decision.{moment}", written[:TAG_LENGTH]), ("verdict", decision["verdict"]), ("decided", when)):
            self.client.set_model_version_tag(name, version, TAG + tag, value)

    def rollback(self, name: str, by: str, why: str = "") -> tuple[dict[str, str], dict[str, str]]:
        """Let `champion` and `previous` of a registered model change places, and write down who did it and why.

        The files of `previous` are compared with what was registered first: who loads the champion would refuse others.

        Returns:
            Version and tags of the champion now, and of the one until now.

        Raises:
            UserError: one of the two is missing, the files of `previous` are not those that were registered, or another champion came while
                they were read. Nothing has moved.
        """
        with self.promoting(name):
            now, before = self._swap(name)
            said = {"by": by, "why": why, "checks": []}
            self.write_decision(name, now["version"], {**said, "verdict": "rollback", "champion": f"version {before['version']}"})
            self.write_decision(name, before["version"], {**said, "verdict": "rolled back", "champion": f"version {now['version']}"})
            self.client.delete_model_version_tag(name, now["version"], ROLLING_BACK)  # last: until then the same command goes on with it
        return now, before

    def _swap(self, name: str) -> tuple[dict[str, str], dict[str, str]]:
        self.settle(name)
        champion, previous = (self.champion(name, alias) for alias in (CHAMPION, PREVIOUS))
        read = champion
        if champion and ROLLING_BACK in champion:  # a rollback to it was interrupted behind the first alias
            previous, champion = champion, self.version(name, champion[ROLLING_BACK])
        if not champion or not previous:
            missing = CHAMPION if not champion else PREVIOUS
            mend = "There is nothing to go back to before a second model was promoted"
            raise UserError("model", name, f"has no version with the alias {missing} in {shown_uri(self._settings.mlflow_uri)}", mend=mend)
        if champion["version"] == previous["version"]:  # by hand, or by an interrupted promotion of an earlier Cartwright
            mend = "Run `cartwright run` again, or make another version the champion by `cartwright promote VERSION`"
            raise UserError("model", name, f"has version {previous['version']} as champion and as previous", mend=mend)
        self._check(name, previous["version"], champion["version"])
        meanwhile, lost = self.champion(name), self._claim and not self._claim.holds()
        if lost or not meanwhile or not read or meanwhile["version"] != read["version"]:
            problem = f"nothing has moved. Another host began to promote while the files of version {previous['version']} were read"
            raise UserError("rollback", None, problem, mend="Look which version is the champion now, and run the same command again")
        # Any of these may be the last before the machine dies. First of all, the next retraining must not promote the other again.
        now = _now()
        self.client.set_model_version_tag(name, champion["version"], ROLLED_BACK, now)
        self.client.set_model_version_tag(name, previous["version"], ROLLING_BACK, champion["version"])
        self.client.set_registered_model_alias(name, CHAMPION, previous["version"])
        self.client.set_registered_model_alias(name, PREVIOUS, champion["version"])
        self.client.set_model_version_tag(name, previous["version"], TAG + "promoted", f"{now} by rollback")
        if ROLLED_BACK in previous:
            self.client.delete_model_version_tag(name, previous["version"], ROLLED_BACK)
        return previous, champion

    def _check(self, name: str, version: str, champion: str) -> None:
        """Raise UserError unless the files of a version that is to be the champion are those that were registered."""
        with TemporaryDirectory() as folder:
            try:
                checked_files(self._settings, name, Path(folder), version)
            except UserError as error:
                raise UserError("rollback", None, f"version {champion} stays the champion. {error}") from None
            except Exception as error:  # files that are gone, or their storage does not answer: each kind has errors of its own
                problem = f"version {champion} stays the champion. The files of version {version} cannot be read ({type(error).__name__}: {error})"
                mend = "`cartwright promote VERSION` makes another version the champion, `cartwright run` makes a new one"
                raise UserError("rollback", None, problem, mend=mend) from None


def by_server(settings: Settings) -> bool:
    """Whether other hosts may write to the same records."""
    return not settings.mlflow_uri.startswith("sqlite:")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def champion_version(settings: Settings, name: str) -> dict[str, str] | None:
    """Version and tags of a registered model's champion; None without one. Nothing is made where there is no registry yet."""
    file = settings.mlflow_uri.removeprefix("sqlite:///")
    if file != settings.mlflow_uri and not Path(file).is_file():
        return None
    return Registry(settings).champion(name)


def find_champion(settings: Settings, name: str) -> tuple[dict[str, str], str | None]:
    """Version and tags of a registered model's champion, and the experiment it was made in, None if that is gone.

    Raises:
        UserError: the registry has none.
    """
    from mlflow.exceptions import MlflowException

    champion = champion_version(settings, name)
    if not champion:
        problem = f"has no champion in {shown_uri(settings.mlflow_uri)}"
        raise UserError("model", name, problem, mend="Run `cartwright run` first, or name the model as registry.name did")
    client = client_of(settings)
    try:
        run_id = client.get_model_version(name, champion["version"]).run_id
        return champion, str(client.get_experiment(client.get_run(run_id).info.experiment_id).name) if run_id else None
    except MlflowException:
        return champion, None


def champion_files(settings: Settings, name: str, into: Path | None = None, version: str | None = None) -> tuple[Path, Runtime, Path]:
    """Path of the champion's model, the runtime that loads it, and the folder of its `spec.yaml`.

    Args:
        into: an empty folder for the files of a registry that keeps them elsewhere.
        version: this version, whether or not the alias points at it by now.

    Raises:
        UserError: the registry has none, or not its files, or they are not those that were registered.
    """
    import mlflow

    folder = checked_files(settings, name, into, version)
    flavor = mlflow.models.Model.load(str(folder)).flavors["python_function"]
    files = flavor["artifacts"]
    return folder / files["model"]["path"], flavor["config"]["runtime"], (folder / files["spec"]["path"]).parent


def checked_files(settings: Settings, name: str, into: Path | None = None, version: str | None = None) -> Path:
    """The folder of a version's files, of the champion's if None, after `check_files`; arguments and errors of `champion_files`."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client, found = client_of(settings), None
    try:
        found = client.get_model_version(name, version) if version else client.get_model_version_by_alias(name, CHAMPION)
        uri = f"models:/{name}/{found.version}"
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(into) if into else None))
    except MlflowException as error:
        if error.error_code not in MISSING:  # the server is away for a moment: nothing is wrong with the model
            raise UserError("MLFLOW_TRACKING_URI", shown_uri(settings.mlflow_uri), f"cannot be asked ({error.error_code})") from None
        shown = shown_uri(settings.mlflow_uri)
        if found:
            problem = f"the storage of the registry {shown} no longer has its files ({error.error_code})"
            raise UserError("model", f"{name} version {found.version}", problem, mend=ANEW) from None
        missing = f"version {version}" if version else "champion"
        problem = f"the registry {shown} has no {missing} of {name} ({error.error_code})"
        raise UserError("model", CHAMPION, problem, mend="Run `cartwright run` first") from None
    check_files(folder, f"{name} version {found.version}", found.tags)
    return folder
