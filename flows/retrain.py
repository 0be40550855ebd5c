"""The whole pipeline on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.runtime import deployment
from pydantic import Field

from flows import stages
from flows.session import open_run, run_log
from tasks.config import load_config, profiles, resolve
from tasks.core.display import Display
from tasks.core.settings import load_settings
from tasks.decide import BASE, BASE_FEW_SHOT, BASELINES, REFERENCE
from tasks.quantize_gguf import GgufFormat

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
    overrides: dict[str, Any] | None = None,
    execution: Literal["local"] = "local",
) -> Path:
    """From a description of intents to a fine-tuned, quantized, measured and registered model.

    Args:
        profile: How much: smoke (a test on a tiny random model), quick, standard (three times the data), paper (needs a GPU).
        base_model: Hugging Face id, folder or .gguf file. Empty takes the profile's.
        teacher: LiteLLM id of a model that writes more training data, such as openai/gpt-4.1-mini. Empty asks none.
        formats: GGUF formats to make. Empty takes the profile's.
        max_accuracy_loss: Largest loss of exact match a recommended model may have, as a share: 0.01 is one percentage point.
        overrides: Any other field by its dotted name, such as {"train.epochs": 2}. What is named here wins over the fields above.
        execution: local runs every stage on the worker's own machine.

    Returns:
        The folder of the report.
    """
    named = {"base_model.source": base_model, "data.teacher": teacher, "gguf": formats, "decide.max_accuracy_loss": max_accuracy_loss}
    overrides = {name: value for name, value in named.items() if value not in (None, "", [])} | (overrides or {})
    config = resolve(load_config(profile, overrides))
    display = Display(run_log()) if deployment.id else Display()
    with open_run(config, load_settings(), display) as run:
        dataset, card = stages.make_data(run)
        base, adapter, tuned = stages.train(run, dataset)
        reference = stages.refer(run, tuned, dataset)
        gptq, gptq_models, gptq_failed = stages.make_gptq(run, tuned, dataset)
        gguf, gguf_models, gguf_failed, converted = stages.make_gguf(run, tuned, dataset)

        variants = stages.all_variants(config, gguf, gptq)
        models = {BASE: base, BASE_FEW_SHOT: base, **dict.fromkeys((REFERENCE, *BASELINES.values()), tuned), **gptq_models, **gguf_models}
        found, failed, unmeasured = stages.measure(run, variants, models, dataset, gptq_failed | gguf_failed)
        checked, unchecked = stages.check(run, variants, models, reference, base, tuned, converted, failed)
        apis, answered, unanswered = stages.ask_apis(run, dataset) if config.api else ([], {}, {})
        decision = stages.choose(run, [*variants, *apis], models, found | answered, checked, failed | unanswered, unchecked, unmeasured)
        return stages.release(run, decision, dataset, card, adapter, models, found)
