"""The whole pipeline on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.runtime import deployment
from pydantic import Field

from flows import approval, releasing, stages
from flows.placement import Here, Machine, Pools
from flows.session import open_run, run_log
from tasks.config import left_out, load_config, profiles, resolve
from tasks.core.display import Display
from tasks.core.settings import load_settings
from tasks.decide import recommended_cpu
from tasks.gate import PromotionMode
from tasks.quantize_gguf import GgufFormat
from tasks.variants import BASE, BASE_FEW_SHOT, BASELINES, REFERENCE

# The form in the Prefect UI is made from these types and from the docstring: a value that is not allowed is refused there.
Profile = Annotated[str, Field(json_schema_extra={"enum": profiles()})]
Loss = Annotated[float, Field(ge=0, le=1)]


@flow(name="retrain")
def retrain(
    profile: Profile = "quick",
    base_model: str | None = None,
    teacher: str | None = None,
    formats: list[GgufFormat] | None = None,
    max_accuracy_loss: Loss | None = None,
    promotion: PromotionMode | None = None,
    overrides: dict[str, Any] | None = None,
    execution: Literal["local", "pools"] = "local",
    accelerator: Machine = "cpu",
) -> Path:
    """From a description of intents to a fine-tuned, quantized, measured and registered model.

    Args:
        profile: How much: smoke (a test on a tiny random model), quick, standard (three times the data), overnight (three times that), paper (needs a GPU).
        base_model: Hugging Face id, folder or .gguf file. Empty takes the profile's.
        teacher: LiteLLM id of a model that writes more training data, such as openai/gpt-4.1-mini. Empty asks none.
        formats: GGUF formats to make. Empty takes the profile's.
        max_accuracy_loss: Largest loss of exact match a recommended model may have, as a share: 0.01 is one percentage point.
        promotion: What passes the gate becomes champion at once (auto), once a person agrees here in the UI (manual), or not at all (off). Empty takes the profile's.
        overrides: Any other field by its dotted name, such as {"train.epochs": 2}. What is named here wins over the fields above.
        execution: local runs every stage in this process; pools sends each to a worker of cpu-pool or gpu-pool.
        accelerator: With pools, where training and what is made for GPUs run.

    Returns:
        The folder of the report.
    """
    named = {
        "base_model.source": base_model, "data.teacher": teacher, "gguf": formats,
        "decide.max_accuracy_loss": max_accuracy_loss, "registry.mode": promotion,
    }  # fmt: skip
    overrides = {name: value for name, value in named.items() if value not in (None, "", [])} | (overrides or {})
    config = resolve(load_config(profile, overrides))
    display = Display(run_log()) if deployment.id else Display()
    for problem in left_out(config):
        display.say(problem)
    with open_run(config, load_settings(), display, here=execution == "local") as run:
        on = Pools(run, accelerator) if execution == "pools" else Here(run)
        extra, own = stages.own_rows(run)
        dataset, card = on(stages.make_data, extra)
        base, trimmed, adapter, tuned, reference = on(stages.train, dataset)
        gptq, gptq_models, failed = on(stages.make_gptq, tuned, dataset)
        gguf, gguf_models, gguf_failed, converted = on(stages.make_gguf, tuned, dataset, base)

        variants = stages.all_variants(config, gguf, gptq)
        models = {BASE: base, BASE_FEW_SHOT: base, **dict.fromkeys((REFERENCE, *BASELINES.values()), tuned), **gptq_models, **gguf_models}
        failed |= gguf_failed
        found: stages.Models = {}
        checked: stages.Models = {}
        unmeasured: stages.Failed = {}
        unchecked: stages.Failed = {}
        for machine, some in on.machines(variants):
            # Checked first: a measurement wants the machine without the process that stages are forked from, which then has to begin anew.
            sound, doubtful = on(stages.check, some, models, reference, base, trimmed, tuned, converted, failed, machine=machine)
            measured, failed, missed = on(stages.measure, some, models, dataset, failed, machine=machine)
            found, unmeasured, checked, unchecked = found | measured, unmeasured | missed, checked | sound, unchecked | doubtful
        apis, answered, unanswered = on(stages.ask_apis, dataset) if config.api else ([], {}, {})
        decision = stages.choose(run, [*variants, *apis], models, found | answered, checked, failed | unanswered, unchecked, unmeasured)

        challenger = models.get(recommended_cpu(decision) or "")
        champion = releasing.to_beat(run, challenger)
        compared = on(releasing.compare, challenger, champion, dataset, own) if champion else releasing.NOT_ASKED
        verdict = releasing.judge(run, decision, compared)
        if config.registry.mode == "manual" and verdict["verdict"] == "promote":
            if approval.to_be_asked(verdict):  # registered and reported first: should nobody answer, nothing is lost
                releasing.release(run, decision, dataset, card, adapter, models, approval.waiting(verdict))
            verdict = approval.ask(verdict) if deployment.id else approval.waiting(verdict)
        return releasing.release(run, decision, dataset, card, adapter, models, verdict)
