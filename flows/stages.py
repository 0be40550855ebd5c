"""The stage flows: pieces of the DAG that run on one kind of machine. Order and branching only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prefect import flow

from flows.session import Run, runner, teacher_secret
from tasks.base_model import base_model
from tasks.benchmark import benchmark
from tasks.core.artifacts import Manifest
from tasks.core.child import StageError
from tasks.data_card import DataCardConfig, data_card, publish
from tasks.decide import BASE, BASE_FEW_SHOT, MIXED, REFERENCE, Variant, decide, recommended_cpu
from tasks.domain.errors import UserError
from tasks.evaluate import evaluate
from tasks.evaluate_api import api_variants, evaluate_api
from tasks.fidelity import FidelityConfig, fidelity, reference_logits
from tasks.finetune import finetune
from tasks.importance import importance
from tasks.merge import merge
from tasks.quantize_gguf import ConvertGgufConfig, QuantizeGgufConfig, convert_gguf, quantize_gguf
from tasks.quantize_gptq import quantize_gptq
from tasks.register import champion_artefact, register_variants
from tasks.report import write_report
from tasks.search_gguf import search_gguf
from tasks.synthesize import synthesize
from tasks.teach import NO_TEACHER, teach, teach_config

Models = dict[str, Manifest]
Failed = dict[str, str]


@flow(name="data")
def make_data(run: Run) -> tuple[Manifest, Manifest]:
    """Labelled utterances, split and checked for leaks, and their data card; a teacher, where one is named, is asked first."""
    call, data = runner(run), run.config.data
    lessons = {"teacher": ask_teacher(run)} if data.teacher != NO_TEACHER else {}
    dataset = call(synthesize, data, **lessons)
    card = call(data_card, DataCardConfig(), dataset=dataset)
    publish(call, Path(data.domain).name, dataset, card)
    return dataset, card


@flow(name="ask-teacher")
def ask_teacher(run: Run) -> Manifest:
    """What a teacher adds to training; one whose budget is used up has given less."""
    call, config = runner(run), run.config.teacher
    asking = replace(call, secrets=lambda: teacher_secret(config.secret_block))
    lessons = asking(teach, teach_config(run.config.data, config))
    if lessons.metrics["stopped"]:
        call.display.say(f"The teacher was asked less than planned: {lessons.metrics['stopped']}")
    return lessons


@flow(name="train")
def train(run: Run, dataset: Manifest) -> tuple[Manifest, Manifest, Manifest]:
    """Base model, adapter and merged 16-bit model."""
    call = runner(run)
    base = call(base_model, run.config.base_model)
    adapter = call(finetune, run.config.train, base_model=base, dataset=dataset)
    return base, adapter, call(merge, run.config.merge, base_model=base, adapter=adapter, dataset=dataset)


@flow(name="refer")
def refer(run: Run, tuned: Manifest, dataset: Manifest) -> Manifest | str:
    """What the 16-bit model foretells, with which every quantized variant is compared; or why that could not be computed."""
    try:
        return runner(run)(reference_logits, run.config.fidelity, model=tuned, dataset=dataset)
    except (StageError, UserError) as error:
        return str(error)


@flow(name="quantize-gptq")
def make_gptq(run: Run, tuned: Manifest, dataset: Manifest) -> tuple[list[Variant], Models, Failed]:
    """Every GPTQ variant; one that fails does not stop the others."""
    variants, models, failed = [], {}, {}
    for config in run.config.gptq:
        name = f"gptq-{config.bits}bit" + (f"-g{config.group_size}" if config.group_size else "")
        variants.append(Variant(name=name, format="gptq", bits=config.bits, runtime="transformers", role="candidate"))
        try:
            models[name] = runner(run)(quantize_gptq, config, f"quantize {name}", model=tuned, dataset=dataset)
        except (StageError, UserError) as error:
            failed[name] = str(error)
    return variants, models, failed


@flow(name="quantize-gguf")
def make_gguf(run: Run, tuned: Manifest, dataset: Manifest) -> tuple[list[Variant], Models, Failed, Manifest | None]:
    """Every GGUF format from one F16 file, which comes last, if the model could be converted; one that fails does not stop the others."""
    call, config = runner(run), run.config
    variants, models, failed = [], {}, {}
    made: dict[bool, dict[str, Manifest]] = {}  # what a format is made from, without and with an importance matrix
    problem = ""
    try:
        made[False] = {"gguf": call(convert_gguf, ConvertGgufConfig(), "convert to GGUF", model=tuned)}
        if config.gguf_importance != "without" or config.gguf_search:
            matrix = call(importance, config.importance, "importance matrix", model=tuned, dataset=dataset, **made[False])
            made[True] = {**made[False], "importance": matrix}
    except (StageError, UserError) as error:
        problem = str(error)
    for kind, weighted in config.gguf_kinds():
        name = f"gguf-{kind}" + ("-imatrix" if weighted else "")
        bits = 16 if kind == "F16" else int(kind.strip("IQ")[0])
        variants.append(Variant(name=name, format="gguf", bits=bits, runtime="llama_cpp", role="candidate"))
        if weighted not in made:
            failed[name] = problem
            continue
        try:
            models[name] = call(quantize_gguf, QuantizeGgufConfig(format=kind), f"quantize {name}", **made[weighted])
        except (StageError, UserError) as error:
            failed[name] = str(error)
    if config.gguf_search:
        variants.append(Variant(name=MIXED, format="gguf", bits=None, runtime="llama_cpp", role="candidate"))
        try:
            if True not in made:
                raise StageError(problem)
            models[MIXED] = call(
                search_gguf, config.gguf_search, f"search {MIXED}", reference=other_rows(run, tuned, dataset), **made[True]
            )
        except (StageError, UserError) as error:
            failed[MIXED] = str(error)
    return variants, models, failed, made.get(False, {}).get("gguf")


def other_rows(run: Run, tuned: Manifest, dataset: Manifest) -> Manifest:
    """What the 16-bit model foretells of other rows than those variants are checked on: what is chosen on rows is not judged on them."""
    rows = run.config.fidelity
    config = rows.model_copy(update={"skip": rows.skip + rows.rows})
    return runner(run)(reference_logits, config, "reference_logits for the search", model=tuned, dataset=dataset)


@flow(name="measure")
def measure(run: Run, variants: list[Variant], models: Models, dataset: Manifest, failed: Failed) -> tuple[Models, Models, Failed]:
    """Accuracy and speed of every variant, each in the runtime it will be deployed with, on the same rows."""
    call, config = runner(run), run.config
    evaluations, benchmarks, failed = {}, {}, dict(failed)
    for variant in variants:
        if variant.name in failed:
            continue
        how = {"runtime": variant.runtime, "zero_shot": variant.role == "base", "few_shot": variant.few_shot}
        # The base model reads long instructions with every request, and its speed is nobody's choice.
        few = {"requests": 5, "batched_requests": 8, "repeats": 1, "warmup": 1} if variant.role == "base" else {}
        try:
            evaluations[variant.name] = call(
                evaluate, config.evaluate.model_copy(update=how), f"evaluate {variant.name}", model=models[variant.name], dataset=dataset
            )
            benchmarks[variant.name] = call(
                benchmark,
                config.benchmark.model_copy(update=how | few | {"dtype": variant.dtype}),
                f"benchmark {variant.name}",
                model=models[variant.name],
                dataset=dataset,
            )
        except (StageError, UserError) as error:
            failed[variant.name] = str(error)
    return evaluations, benchmarks, failed


@flow(name="check")
def check(
    run: Run,
    variants: list[Variant],
    models: Models,
    reference: Manifest | str,
    base: Manifest,
    tuned: Manifest,
    converted: Manifest | None,
    failed: Failed,
) -> tuple[Models, Failed]:
    """Whether every quantized variant still is the fine-tuned model. What could not be checked is noted, and stands unchecked."""
    call, checked, unchecked = runner(run), {}, {}
    quantized = [variant for variant in variants if variant.role == "candidate" and variant.name not in failed]
    before, problems = {"hf": {"tuned": tuned, "base": base}}, {}
    if isinstance(reference, str):
        return {}, {variant.name: reference for variant in quantized}
    if converted and any(variant.format == "gguf" for variant in quantized):
        try:
            before["gguf"] = {"tuned": converted, "base": call(convert_gguf, ConvertGgufConfig(), "convert base to GGUF", model=base)}
        except (StageError, UserError) as error:
            problems["gguf"] = str(error)
    for variant in quantized:
        kind = "gguf" if variant.format == "gguf" else "hf"
        if kind in problems:
            unchecked[variant.name] = problems[kind]
            continue
        try:
            config, model = FidelityConfig(runtime=variant.runtime), models[variant.name]
            checked[variant.name] = call(fidelity, config, f"check {variant.name}", model=model, reference=reference, **before[kind])
        except (StageError, UserError) as error:
            unchecked[variant.name] = str(error)
    return checked, unchecked


@flow(name="ask-apis")
def ask_apis(run: Run, dataset: Manifest) -> tuple[list[Variant], Models, Failed]:
    """Models behind an API, on the same rows; one that does not answer does not stop the others."""
    variants, evaluations, failed = [], {}, {}
    for variant, config in api_variants(run.config.api):
        variants.append(variant)
        try:
            evaluations[variant.name] = runner(run)(evaluate_api, config, f"evaluate {variant.name}", dataset=dataset)
        except (StageError, UserError) as error:
            failed[variant.name] = str(error)
    return variants, evaluations, failed


@flow(name="choose")
def choose(
    run: Run,
    variants: list[Variant],
    models: Models,
    evaluations: Models,
    benchmarks: Models,
    checked: Models,
    failed: Failed,
    unchecked: Failed,
) -> Manifest:
    """Figures side by side, Pareto front, recommendation."""
    inputs = {
        f"{kind}:{v.name}": found[v.name]
        for v in variants
        if v.name not in failed
        for kind, found in (("model", models), ("evaluate", evaluations), ("benchmark", benchmarks), ("fidelity", checked))
        if v.name in found and (v.role != "api" or kind == "evaluate")
    }
    config = run.config.decide.model_copy(update={"variants": tuple(variants), "failed": failed, "unchecked": unchecked})
    return runner(run).run(decide, config, "decide", inputs)


@flow(name="release")
def release(
    run: Run, decision: Manifest, dataset: Manifest, card: Manifest, adapter: Manifest, models: Models, evaluations: Models
) -> Path:
    """Registry, gate and report; the folder of the report."""
    call, config = runner(run), run.config
    challenger = models.get(recommended_cpu(decision) or "")
    champion = champion_artefact(call.tracker, call.store, config.registry, config.data.prompt)
    asked = None
    if champion and challenger and champion.digest != challenger.digest:
        how = {"runtime": "llama_cpp" if champion.kind in ("quantize_gguf", "search_gguf") else "transformers"}
        asked = call(evaluate, config.evaluate.model_copy(update=how), "evaluate champion", model=champion, dataset=dataset)
    verdict = call.act("register", lambda: register_variants(call, config.registry, decision, dataset, models, evaluations, asked))
    return call.act("report", lambda: write_report(call, run.config, run.started, decision, dataset, card, adapter, verdict))


def all_variants(few_shot: int, gguf: list[Variant], gptq: list[Variant]) -> list[Variant]:
    """Base model (without and, if wanted, with examples) and 16-bit reference first, then the quantized ones."""
    base = Variant(name=BASE, format="hf", bits=16, runtime="transformers", dtype="bfloat16", role="base")
    first = [
        base,
        *([base.model_copy(update={"name": BASE_FEW_SHOT, "few_shot": few_shot})] if few_shot else []),
        Variant(name=REFERENCE, format="hf", bits=16, runtime="transformers", role="reference"),
    ]
    return [*first, *gptq, *gguf]
