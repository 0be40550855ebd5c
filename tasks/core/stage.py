"""The one seam: a stage is a plain function `(config, inputs, out_dir) -> metrics`; this module gives it everything else.

Key, cache, lock, resume, child process, manifest. Neither the stage nor this module knows Prefect or MLflow.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tasks.core import child, hardware, ledger
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest, canonical_json, damage_of, describe_files, digest_of
from tasks.core.progress import Event
from tasks.domain.errors import UserError

logger = logging.getLogger("cartwright")

State = Literal["computed", "cached"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as large as numpy takes one
MEASURED = "it measures time and memory"  # why an artefact varies


class StageConfig(BaseModel):
    """Base of every stage's config: frozen, and unknown fields are errors.

    `not_in_key` names fields that say where something is; another field holds the digest of what is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    not_in_key: ClassVar[frozenset[str]] = frozenset()

    def in_key(self) -> dict[str, Any]:
        """What of it the result depends on."""
        return self.model_dump(mode="json", exclude=set(self.not_in_key))


class StageFunction(Protocol):
    def __call__(self, config: Any, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Stage:
    """A stage and what the seam must know of it.

    Attributes:
        version: raised by hand when the code's meaning changes, so that old artefacts are not used.
        libraries: those whose version changes the result; part of the key.
        measures: the result depends on the machine, so its class is part of the key.
        resumable: an interrupted attempt's files are kept in `out_dir` for the next one.
        keeps: a file of a resumable stage that is kept even where an input turns out to be damaged, since each of its lines says what it
            was made of; empty if there is none.
        isolated: runs in a child process of its own.
        varies: why its artefact is not the same bytes each time it is made from the same inputs, by the same versions, on the same kind
            of machine with as many cores; empty if it is. The report and the tests go by it.
        preloaded: the child begins with torch and transformers imported, see `fork_server`, and keeps the memory it frees, since it
            will want as much again a moment later. Not for what measures memory or the time to load.
    """

    name: str
    version: int
    function: StageFunction
    libraries: tuple[str, ...] = ()
    measures: bool = False
    resumable: bool = False
    isolated: bool = True
    preloaded: bool = False
    varies: str = ""
    keeps: str = ""

    @property
    def config_type(self) -> type[StageConfig]:
        return inspect.get_annotations(self.function, eval_str=True)["config"]

    def key(self, config: StageConfig, inputs: Mapping[str, Manifest]) -> str:
        """The artefact's name: a hash of everything the result depends on. No path, time or pickle is in it."""
        parts = {
            "stage": self.name,
            "version": self.version,
            "config": config.in_key(),
            "inputs": {name: manifest.digest for name, manifest in inputs.items()},
            "libraries": hardware.versions(self.libraries),
            "hardware": hardware.hardware_class() if self.measures else None,
        }
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def stage(
    name: str,
    *,
    version: int,
    libraries: tuple[str, ...] = (),
    measures: bool = False,
    resumable: bool = False,
    isolated: bool = True,
    preloaded: bool = False,
    varies: str = "",
    keeps: str = "",
) -> Callable[[StageFunction], Stage]:
    """Turn a plain stage function into a `Stage`; the function stays reachable as `.function`."""

    def wrap(function: StageFunction) -> Stage:
        return Stage(name, version, function, libraries, measures, resumable, isolated, preloaded, varies, keeps)

    return wrap


def run(
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Manifest],
    store: Store,
    log_dir: Path,
    on_event: Callable[[Event], None] = lambda event: None,
    on_start: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = logger.warning,
    secrets: Callable[[], Mapping[str, str]] = dict,
) -> tuple[Manifest, State]:
    """Give the artefact of a stage: the stored one if it is whole, else a new one.

    Args:
        secrets: asked when something is to be computed; environment variables for the child process, kept nowhere.

    Raises:
        child.StageError: the stage failed; its message has the reason and the log's path.
        OSError: the store cannot be read or written, or its disk is full. Never taken for a miss, nor for a variant that fails.
    """
    key = stage.key(config, inputs)
    with store.lock(stage.name, key):
        manifest, damage = store.find(stage.name, key)
        if manifest:
            return manifest, "cached"
        if damage:
            warn(f"Rebuilding {stage.name}: {damage}")
        on_start()
        return _compute(stage, config, inputs, store, log_dir, key, on_event, secrets), "computed"


def _compute(
    stage: Stage,
    config: StageConfig,
    inputs: Mapping[str, Manifest],
    store: Store,
    log_dir: Path,
    key: str,
    on_event: Callable[[Event], None],
    secrets: Callable[[], Mapping[str, str]],
) -> Manifest:
    folders = {name: store.fetch(manifest) for name, manifest in inputs.items()}
    out_dir = store.partial(stage.name, key)
    if finished := store.finished(stage.name, key):
        return finished
    if out_dir.exists() and not stage.resumable:
        shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        if stage.isolated:
            log = log_dir / f"{stage.name}-{key[:8]}.log"
            with ledger.charge("processes"):
                outcome = child.run_isolated(stage, config, folders, out_dir, log, on_event, secrets())
        else:
            with ledger.charge("stages"):
                outcome = child.Outcome(stage.function(config, folders, out_dir), None)
    except BaseException as error:
        if not stage.resumable:  # what is half made is of no use, and may be what filled the disk
            shutil.rmtree(out_dir, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, UserError):
            _check_inputs(stage, inputs, folders, out_dir)
        raise
    _check_inputs(stage, inputs, folders, out_dir)
    files = describe_files(out_dir)
    manifest = Manifest(
        kind=stage.name,
        key=key,
        version=stage.version,
        config=config.model_dump(mode="json"),
        inputs={name: manifest.digest for name, manifest in inputs.items()},
        files=files,
        digest=digest_of(files),
        metrics=outcome.metrics,
        libraries=hardware.versions(stage.libraries),
        hardware=hardware.hardware_class(),
        wall_s=round(time.monotonic() - started, 3),
        peak_rss_mb=outcome.peak_rss_mb,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    ).sealed()
    return store.commit(out_dir, manifest)


def _check_inputs(stage: Stage, inputs: Mapping[str, Manifest], folders: Mapping[str, Path], out_dir: Path) -> None:
    """Whether what a stage read still is what was found whole, which may be long ago. If not, what it made of it goes, but for what
    it `keeps`.

    Raises:
        child.StageError: something was damaged meanwhile.
    """
    for name, folder in folders.items():
        if damage := damage_of(folder, inputs[name], only_touched=True):
            for path in list(out_dir.iterdir()) if stage.keeps else [out_dir]:
                if path.name != stage.keeps:
                    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
            raise child.StageError(f"Stage {stage.name} failed: its input was damaged meanwhile: {damage}. Run again: it is made anew")
