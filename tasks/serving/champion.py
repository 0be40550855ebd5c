"""The champion that serves: loaded from the registry, tried, and followed as its alias moves."""

from __future__ import annotations

import logging
import shlex
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.core import hardware
from tasks.core.registry import champion_files, champion_version
from tasks.core.settings import Settings, shown_uri
from tasks.domain import prompt
from tasks.domain.errors import UserError
from tasks.domain.grammar import answer_grammar
from tasks.domain.spec import Spec, load_spec
from tasks.registered import QUESTION
from tasks.runtimes import Completion, common_prefix
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Closing, Engine
from tasks.serving.metrics import Metrics
from tasks.weights import check_gguf

log = logging.getLogger("cartwright.serve")
ANSWERS_WITHIN_S = 120
TRY_AGAIN_S = 600  # at most, after a version that failed
ROLL_BACK = "`cartwright rollback` makes the one before it the champion again; `cartwright run` makes a new one"


@dataclass(frozen=True)
class Champion:
    """A model that has answered a question."""

    version: str
    variant: str
    spec: Spec
    engine: Engine

    def submit(self, texts: list[str], max_tokens: int) -> list[Future[Completion]]:
        """See `Engine.submit`."""
        return self.engine.submit([prompt.messages(self.spec, text) for text in texts], max_tokens)


def load_champion(settings: Settings, config: ServeConfig, version: dict[str, str]) -> Champion:
    """Load a version of the registered model and ask it something. Its files are only needed meanwhile.

    Args:
        version: its tags and `version`.

    Raises:
        UserError: it cannot be served.
    """
    number, variant = version["version"], version.get("cartwright.variant", "unknown")
    with TemporaryDirectory(prefix="cartwright-serve-") as folder:
        try:
            path, runtime, asked_by = champion_files(settings, config.name, Path(folder), number)
        except UserError:
            raise
        except Exception as error:  # gone, not as we register models, or a storage that does not answer
            raise _unusable(config, number, variant, f"its files cannot be read: {type(error).__name__}: {error}") from None
        if runtime != "llama_cpp":
            raise UserError(
                "champion",
                f"{config.name} version {number} ({variant})",
                f"runs in {runtime}, and what is served runs in llama.cpp",
                mend=f"{ROLL_BACK}; or serve it with `{_by_mlflow(settings, config.name)}`",
            )
        return _load(config, path, load_spec(str(asked_by)), number, variant)


def _by_mlflow(settings: Settings, name: str) -> str:
    """The command with which MLflow's own server serves the champion. It starts uvicorn by its name, so PATH has to lead to both."""
    path, uri = shlex.quote(str(Path(sys.executable).parent)), shlex.quote(shown_uri(settings.mlflow_uri))
    return f"PATH={path}:$PATH MLFLOW_TRACKING_URI={uri} mlflow models serve -m models:/{name}@champion --env-manager local"


def load_file(config: ServeConfig, path: Path) -> Champion:
    """A GGUF file that was registered nowhere, asked as the `ecommerce` domain asks."""
    check_gguf("--gguf", path)
    return _load(config, path, load_spec("ecommerce"), "0", path.stem)


def _load(config: ServeConfig, path: Path, spec: Spec, version: str, variant: str) -> Champion:
    from tasks.runtimes.llama_cpp import LlamaCppRuntime

    grammar = answer_grammar(spec) if config.constrained else None
    try:
        model = LlamaCppRuntime(path, config.threads or hardware.cores(), grammar=grammar)
    except Exception as error:  # of llama.cpp
        raise _unusable(config, version, variant, f"does not load: {error}") from None
    try:
        prefix = common_prefix([model.encode(prompt.messages(spec, text)) for text in ("a", "7", "é")])
    except Exception as error:  # of the template of the chat
        model.close()
        raise _unusable(config, version, variant, f"cannot be asked: {error}") from None
    engine = Engine(model, prefix, config.parallel, config.max_waiting, config.max_tokens)
    champion = Champion(version, variant, spec, engine)
    try:
        (asked,) = champion.submit([QUESTION], config.max_tokens)
        answered = asked.result(ANSWERS_WITHIN_S)
    except Exception as error:
        engine.close()
        raise _unusable(config, version, variant, f"does not answer: {error or type(error).__name__}") from None
    if not answered.completion_tokens:
        engine.close()
        raise _unusable(config, version, variant, "answers nothing")
    return champion


def _unusable(config: ServeConfig, version: str, variant: str, problem: str) -> UserError:
    return UserError("champion", f"{config.name} version {version} ({variant})", problem, mend=ROLL_BACK)


class Champions:
    """The champion at present. A thread looks up the alias and changes it."""

    def __init__(self, settings: Settings, config: ServeConfig, metrics: Metrics) -> None:
        self._settings, self._config, self._metrics = settings, config, metrics
        self._stop = threading.Event()
        self._failed: dict[str, tuple[float, float]] = {}  # when a version may be tried again, and the pause after that
        self._said = ""
        self._loading = threading.Lock()
        self._leaving: Engine | None = None
        self.current = self._first()
        self.metrics_follow()
        self._thread = threading.Thread(target=self._follow, name="champion", daemon=True)
        if not config.gguf:
            self._thread.start()

    def _first(self) -> Champion:
        if self._config.gguf:
            return load_file(self._config, self._config.gguf)
        try:
            version = champion_version(self._settings, self._config.name)
        except Exception as error:
            mend = "Start it, or correct MLFLOW_TRACKING_URI"
            raise UserError(
                "MLFLOW_TRACKING_URI", shown_uri(self._settings.mlflow_uri), f"the registry does not answer: {error}", mend=mend
            ) from None
        if not version:
            where = f"the registry {shown_uri(self._settings.mlflow_uri)} has no version with the alias champion"
            mend = "Run `cartwright run` first, or say where it is: MLFLOW_TRACKING_URI, CARTWRIGHT_HOME, --name"
            raise UserError("--name", self._config.name, where, mend=mend)
        return load_champion(self._settings, self._config, version)

    def submit(self, texts: list[str], max_tokens: int) -> tuple[Champion, list[Future[Completion]]]:
        """Ask the champion; one that makes way for another just now is not asked.

        Raises:
            Closing: the server ends.
        """
        while True:
            champion = self.current
            try:
                return champion, champion.submit(texts, max_tokens)
            except Closing:
                if champion is self.current:
                    raise

    def close(self) -> None:
        """Follow the alias no more, and end when everything was answered."""
        self._stop.set()
        until = time.monotonic() + self._config.end_s
        self._loading.acquire(timeout=self._config.end_s)  # llama.cpp must not be torn down while it loads a new champion
        self.current.engine.close()
        for engine in filter(None, (self._leaving, self.current.engine)):
            engine.thread.join(max(0.1, until - time.monotonic()))

    def metrics_follow(self) -> None:
        """Let the metrics show the champion at present."""
        self._metrics.show(self._config.name, self.current.version, self.current.variant, self.current.engine)

    def _follow(self) -> None:
        while not self._stop.wait(self._config.reload_s):
            try:
                self.check()
            except Exception as error:  # whatever it is, serving goes on
                self._metrics.registry_errors.inc()
                self._say(f"The registry does not answer; version {self.current.version} goes on serving: {type(error).__name__}: {error}")

    def check(self) -> None:
        """Look up the alias and, if it has moved, load what it points at, let that serve, and let the one before it end."""
        version = champion_version(self._settings, self._config.name)
        if not version:
            self._say(f"{self._config.name} has no champion any more; version {self.current.version} goes on serving")
            return
        number = version["version"]
        if number == self.current.version:
            self._say("")
            return
        not_before, pause = self._failed.get(number, (0.0, self._config.reload_s))
        if time.monotonic() < not_before:
            return
        with self._loading:
            if not self._stop.is_set():
                self._take_up(version, pause)

    def _take_up(self, version: dict[str, str], pause: float) -> None:
        number, before = version["version"], self.current
        try:
            made = load_champion(self._settings, self._config, version)
        except Exception as error:
            self._failed[number] = time.monotonic() + pause, min(2 * pause, TRY_AGAIN_S)
            self._metrics.reloads.labels("failed").inc()
            log.error("Version %s was not taken up; version %s goes on serving: %s", number, before.version, error)
            return
        self._failed.pop(number, None)
        self.current, self._leaving = made, before.engine
        self.metrics_follow()
        before.engine.close()
        self._metrics.reloads.labels("ok").inc()
        log.warning("Version %s (%s) serves instead of version %s", number, made.variant, before.version)

    def _say(self, problem: str) -> None:
        """Log a state once, not every few seconds."""
        if problem and problem != self._said:
            log.warning(problem)
        self._said = problem
