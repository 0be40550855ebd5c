"""The whole pipeline on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import flow

from flows import stages
from flows.session import open_run
from tasks.config import load_config, resolve
from tasks.core.display import Display
from tasks.core.settings import load_settings
from tasks.decide import BASE, BASE_FEW_SHOT, REFERENCE


@flow(name="retrain")
def retrain(profile: str = "quick", overrides: dict[str, Any] | None = None, execution: Literal["local"] = "local") -> Path:
    """From a description of intents to a fine-tuned, quantized, measured and registered model.

    Args:
        profile: a file of `deployments/profiles/`.
        overrides: fields to change, by dotted name, such as `{"train.epochs": 2}`.
        execution: `local` runs every stage on this machine.

    Returns:
        The folder of the report.
    """
    config = resolve(load_config(profile, overrides))
    with open_run(config, load_settings(), Display()) as run:
        dataset, card = stages.make_data(run)
        base, adapter, tuned = stages.train(run, dataset)
        reference = stages.refer(run, tuned, dataset)
        gptq, gptq_models, gptq_failed = stages.make_gptq(run, tuned, dataset)
        gguf, gguf_models, gguf_failed, converted = stages.make_gguf(run, tuned, dataset)

        variants = stages.all_variants(config.base_few_shot, gguf, gptq)
        models = {BASE: base, BASE_FEW_SHOT: base, REFERENCE: tuned, **gptq_models, **gguf_models}
        evaluations, benchmarks, failed = stages.measure(run, variants, models, dataset, gptq_failed | gguf_failed)
        checked, unchecked = stages.check(run, variants, models, reference, base, tuned, converted, failed)
        apis, answered, unanswered = stages.ask_apis(run, dataset) if config.api else ([], {}, {})
        decision = stages.choose(
            run, [*variants, *apis], models, evaluations | answered, benchmarks, checked, failed | unanswered, unchecked
        )
        return stages.release(run, decision, dataset, card, adapter, models, evaluations)
