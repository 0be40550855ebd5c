"""Runs stages for one pipeline run: as Prefect tasks, tracked in MLflow, shown on the terminal, noted for the report."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.core import ledger
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.display import Display
from tasks.core.ledger import Account
from tasks.core.manifests import Manifest
from tasks.core.progress import Event
from tasks.core.settings import Settings
from tasks.core.stage import Stage, StageConfig
from tasks.core.tracking import Tracker


@dataclass
class Runner:
    """Everything a stage call needs beside its config and inputs.

    `secrets` gives environment variables for the child processes; it is asked only when something is computed, and so is what is done
    `meanwhile`.
    """

    run_id: str
    settings: Settings
    store: Store
    tracker: Tracker
    display: Display
    pool: str = "local"
    stages: list[dict[str, Any]] = field(default_factory=list)
    secrets: Callable[[], Mapping[str, str]] = dict
    meanwhile: Callable[[], None] = lambda: None

    def __call__(self, stage: Stage, config: StageConfig, label: str = "", /, **inputs: Manifest) -> Manifest:
        """Run a stage, or find its artefact, as a Prefect task whose state is `Cached` if nothing was computed.

        Args:
            label: what the call is shown as; the stage's name if empty.
            inputs: the artefacts it reads, by the names its function knows them by.

        Raises:
            StageError: the stage failed.
        """
        return self.run(stage, config, label or stage.name, inputs)

    def run(self, stage: Stage, config: StageConfig, label: str, inputs: Mapping[str, Manifest]) -> Manifest:
        """As a call, for inputs whose names are no identifiers."""
        return as_prefect_task(label, functools.partial(self._run, stage, config, label, inputs))

    def act(self, label: str, action: Callable[[], tuple[Any, bool]], account: Account) -> Any:
        """Run something that makes no artefact; `action` returns its result and whether there was nothing to do.

        Args:
            account: what its time is charged to.
        """

        def timed() -> tuple[Any, bool]:
            started, worked = time.monotonic(), ledger.split()["stages"]
            self.display.start(label)
            try:
                with ledger.charge(account):
                    result, nothing_to_do = action()
            except BaseException:
                self._note(label, "failed", started, worked)
                raise
            self._note(label, "cached" if nothing_to_do else "computed", started, worked)
            return result, nothing_to_do

        return as_prefect_task(label, timed)

    @ledger.charge("store")
    def _run(self, stage: Stage, config: StageConfig, label: str, inputs: Mapping[str, Manifest]) -> tuple[Manifest, bool]:
        started, worked = time.monotonic(), ledger.split()["stages"]
        child_run: list[str] = []

        def on_start() -> None:
            self.store.stop_reading_ahead()
            self.meanwhile()
            self.display.start(label)
            child_run.append(self.tracker.child(label, stage.key(config, inputs), "stage", {"cartwright.stage": stage.name}))

        def on_event(event: Event) -> None:
            self.display.event(event)
            if "metrics" in event and child_run:
                self.tracker.log(child_run[0], event["metrics"], step=event["step"])

        try:
            manifest, state = seam.run(
                stage,
                config,
                inputs,
                self.store,
                self.settings.home / "logs" / self.run_id,
                on_event,
                on_start,
                self.display.say,
                self.secrets,
            )
        except BaseException as error:
            self._note(label, "failed", started, worked, stage, why=str(error) if isinstance(error, StageError) else "")
            if child_run:
                self.tracker.client.set_terminated(child_run[0], "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self.tracker.log_stage(label, manifest, cached=state == "cached")
        self._note(label, state, started, worked, stage, manifest)
        return manifest, state == "cached"

    def _note(
        self,
        label: str,
        state: str,
        started: float,
        worked: float,
        stage: Stage | None = None,
        manifest: Manifest | None = None,
        why: str = "",
    ) -> None:
        """Note for the report how a stage went that `started` then, when all stages before it had `worked` so many seconds.

        Args:
            state: `computed`, `cached` or `failed`.
            why: it failed, as a person is told.
        """
        wall_s = time.monotonic() - started
        self.stages.append(
            {
                "name": label,
                "kind": stage.name if stage else None,
                "key": manifest.key if manifest else "",
                "state": state,
                "wall_s": round(wall_s, 3),
                "worked_s": round(ledger.split()["stages"] - worked, 3),
                "pool": self.pool,
                "peak_rss_mb": manifest.peak_rss_mb if manifest else None,
                "computed_in_s": manifest.wall_s if manifest else None,
                "varies": stage.varies if stage else "",
            }
        )
        self.display.finish(label, state, wall_s, why)


def as_prefect_task(label: str, body: Callable[[], tuple[Any, bool]]) -> Any:
    """Run `body` as a Prefect task. It returns a result and whether that was cached.

    Prefect's own cache is not used: it would hold a second truth beside the store, and takes any storage error for a miss.
    """
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    outcome: list[Any] = []

    @task(name=label, task_run_name=label, cache_policy=NO_CACHE)
    def run() -> Any:
        result, cached = body()
        outcome.append(result)
        return Completed(name="Cached", message="Found whole in the store") if cached else None

    run(return_state=True).result(raise_on_failure=True)
    return outcome[0]
