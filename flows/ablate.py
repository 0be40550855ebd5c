"""An ablation: every arm with every seed, trained through the same cached seam as a run, side by side in MLflow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.session import alone, ending, opened
from flows.stages import put_files, with_vocabulary
from tasks.ablation import SEED, Ablation, Arm, Outcome, figures, load_ablation, table
from tasks.base_model import base_model
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.display import Display
from tasks.core.flat import as_params
from tasks.core.manifests import Manifest
from tasks.core.runner import Runner
from tasks.core.settings import Settings, load_settings
from tasks.core.tracking import open_parent
from tasks.domain.errors import UserError
from tasks.finetune import finetune
from tasks.synthesize import synthesize


@flow(name="ablate")
def ablate(file: str) -> Path:
    """Train every arm of an ablation with every seed, and write the table of what came out.

    Args:
        file: a YAML file like those of `deployments/ablations/`.

    Returns:
        The table, as Markdown.
    """
    ablation = load_ablation(Path(file))
    settings = load_settings()
    with open_ablation(ablation, settings, Display()) as call:
        outcomes = [try_arm(call, ablation, arm) for arm in ablation.arms]
        path = settings.reports / f"ablation-{ablation.name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table(ablation, outcomes), encoding="utf-8")
        call.tracker.client.log_artifact(call.tracker.parent, str(path))
    key = re.sub("[^a-z0-9]+", "-", f"ablation-{ablation.name.lower()}").strip("-")
    create_markdown_artifact(path.read_text(encoding="utf-8"), key=key, description=str(path))
    if not any(outcome.adapters for outcome in outcomes):
        raise StageError(f"No arm of {ablation.name} could be trained; {path} has the reasons")
    return path


@contextmanager
def open_ablation(ablation: Ablation, settings: Settings, display: Display) -> Iterator[Runner]:
    """The one MLflow run of an ablation's name. Repeated, it is taken up again, and each arm's run found in it.

    Raises:
        UserError: the home cannot be written, or an ablation of this name is running already.
    """
    store = Store(settings.store_uri, settings.home)
    store.check_writable()
    name = f"ablation-{ablation.name}"
    with alone(settings, name, UserError("ablation", ablation.name, "is running already", mend="Wait for it, or stop it first")):
        domain = Path(ablation.arms[0].config.data.domain).name
        tags = {"cartwright.profile": ablation.profile, **opened(settings, name)}
        tracker = open_parent(settings, f"{domain}-ablation", name, name, tags, reopen=True)
        with ending(tracker):
            yield Runner(name, settings, store, tracker, display)


def try_arm(call: Runner, ablation: Ablation, arm: Arm) -> Outcome:
    """Train one arm with every seed. What fails is noted, and the rest goes on."""
    outcome = Outcome(arm)
    try:
        data = arm.config.data
        extra = put_files(call, "data.extra", data.extra, data.extra_sha256)
        outcome.dataset = call(synthesize, data, f"synthesize {arm.name}", **({"extra": extra} if extra else {}))
        base = call(base_model, arm.config.base_model, f"base_model {arm.name}")
        trimmed = with_vocabulary(call, arm.config.vocabulary, base, outcome.dataset, f"trim_vocabulary {arm.name}")
    except (StageError, UserError) as error:
        outcome.problems.append(str(error))
        return outcome
    for seed in ablation.seeds:
        try:
            outcome.adapters.append(_train(call, ablation, arm, seed, trimmed, outcome.dataset))
        except (StageError, UserError) as error:
            outcome.problems.append(f"seed {seed}: {error}")
    return outcome


def _train(call: Runner, ablation: Ablation, arm: Arm, seed: int, base: Manifest, dataset: Manifest) -> Manifest:
    """One arm with one seed, as an MLflow run of its own."""
    label = f"{arm.name}, seed {seed}"
    tags = {"cartwright.arm": arm.name, "cartwright.dataset": dataset.digest}
    run_id = call.tracker.child(label, hashlib.sha256(f"{label} {arm.key()}".encode()).hexdigest()[:32], "arm", tags)
    params = as_params({"arm": arm.name, "profile": ablation.profile, **ablation.base, **arm.changes, SEED: seed})
    call.tracker.log(run_id, {}, params)
    try:
        config = arm.config.train.model_copy(update={"seed": seed})
        adapter = call(finetune, config, f"finetune {label}", base_model=base, dataset=dataset)
    except BaseException as error:
        call.tracker.client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    call.tracker.log(run_id, figures(adapter))
    call.tracker.client.set_terminated(run_id)
    return adapter
