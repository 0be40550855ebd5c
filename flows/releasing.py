"""From a decision to the registry: the champion asked the same rows, the gate, and what is registered, promoted and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.concurrency.sync import concurrency

from flows.session import Run, runner, tell
from tasks.core.child import StageError
from tasks.core.manifests import Manifest
from tasks.core.registry import Registry
from tasks.domain.errors import UserError
from tasks.evaluate import evaluate
from tasks.gate import PROMOTION
from tasks.gate_rows import gate_rows, gate_rows_config
from tasks.register import Comparison, champion_artefact, judge_recommended, register_variants, runtime_of
from tasks.report import write_report
from tasks.report_plots import ReportPlotsConfig, report_plots

NOT_ASKED = "its artefact is not in the store, or it reads another style of prompt"  # why a champion is not compared with


def to_beat(run: Run, challenger: Manifest | None) -> Manifest | None:
    """The champion, if it is another model than the challenger and can be asked the same rows."""
    call, config = runner(run), run.config
    champion = champion_artefact(Registry(call.settings), call.store, config.registry, config.data.prompt)
    return champion if champion and challenger and champion.digest != challenger.digest else None


@flow(name="compare")
def compare(run: Run, challenger: Manifest, champion: Manifest, dataset: Manifest, own: Manifest | None) -> Comparison | str:
    """Challenger and champion on the same rows, more of them than every variant was asked; or why that could not be done."""
    try:
        return _compared(run, challenger, champion, dataset, {"own": own} if own else {})
    except (StageError, UserError) as error:  # a champion that does not load any more must not end every retraining
        return str(error)


def _compared(run: Run, challenger: Manifest, champion: Manifest, dataset: Manifest, own: dict[str, Manifest]) -> Comparison:
    call, config = runner(run), run.config
    rows = call(gate_rows, gate_rows_config(config.data, config.registry), dataset=dataset, **own)
    asked = config.evaluate.model_copy(update={"splits": tuple(rows.metrics["rows"])})
    mine, theirs = (
        call(evaluate, asked.model_copy(update={"runtime": runtime_of(model)}), f"evaluate {who}, for the gate", model=model, dataset=rows)
        for who, model in (("challenger", challenger), ("champion", champion))
    )
    return rows, mine, theirs


@flow(name="release")
def release(
    run: Run, decision: Manifest, dataset: Manifest, card: Manifest, adapter: Manifest, models: dict[str, Manifest], verdict: dict[str, Any]
) -> Path:
    """Registry and report; the folder of the report."""
    call, config = runner(run), run.config
    with concurrency(PROMOTION):  # of all hosts, where the server knows the limit; MLflow's aliases have no compare-and-swap
        verdict = call.act("register", lambda: register_variants(call, config.registry, decision, dataset, models, verdict), "mlflow")
    tell(
        "gate.unchanged" if verdict["unchanged"] else f"gate.{verdict['verdict']}",
        config.registry.name,
        {"run": run.run_id, "mlflow_run": run.mlflow_run, **verdict},
    )
    plots = call(report_plots, ReportPlotsConfig(), decision=decision)
    return call.act(
        "report", lambda: write_report(call, run.config, run.started, decision, dataset, card, plots, adapter, models, verdict), "report"
    )


def judge(run: Run, decision: Manifest, compared: Comparison | str) -> dict[str, Any]:
    """What the gate says of the recommended variant."""
    return judge_recommended(runner(run), run.config.registry, decision, compared)
