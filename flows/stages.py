"""The stage flows: pieces of the DAG that run on one kind of machine. Order and branching only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow

from flows.session import Run, runner, teacher_secret, tell
from tasks.base_model import TINY, base_model
from tasks.benchmark import MOST_RUNS, benchmark
from tasks.config import RunConfig, gptq_name
from tasks.core.child import FORKS, ITS_LOG, StageError
from tasks.core.manifests import Manifest
from tasks.core.runner import Runner
from tasks.core.stage import Stage, StageConfig
from tasks.data_card import DataCardConfig, data_card, publish
from tasks.decide import decide
from tasks.domain.errors import UserError
from tasks.evaluate import evaluate
from tasks.evaluate_api import api_variants, evaluate_api
from tasks.fidelity import FidelityConfig, fidelity, reference_logits
from tasks.finetune import finetune
from tasks.importance import importance
from tasks.llama_bench import LlamaBenchConfig, llama_bench
from tasks.merge import merge
from tasks.own_files import OwnFilesConfig, own_files
from tasks.qlora import why_slow
from tasks.quantize_awq import quantize_awq
from tasks.quantize_gguf import QuantizeGgufConfig, convert_config, convert_gguf, quantize_gguf
from tasks.quantize_gptq import quantize_gptq
from tasks.search_gguf import search_gguf
from tasks.synthesize import synthesize
from tasks.teach import NO_TEACHER, teach, teach_config
from tasks.trim_vocabulary import VocabularyConfig, trim_vocabulary
from tasks.variants import BASE, BASE_FEW_SHOT, BASELINES, MIXED, REFERENCE, Variant

Models = dict[str, Manifest]
Failed = dict[str, str]


def own_rows(run: Run) -> tuple[Manifest | None, Manifest | None]:
    """The team's files of `data.extra` and of `registry.own_rows`, where there are any: in the store, workers that run elsewhere find them."""
    data, registry = run.config.data, run.config.registry
    named = (("data.extra", data.extra, data.extra_sha256), ("registry.own_rows", registry.own_rows, registry.own_rows_sha256))
    extra, own = (put_files(runner(run), *files) for files in named)
    return extra, own


def put_files(call: Runner, field: str, paths: tuple[str, ...], sha256: tuple[str, ...]) -> Manifest | None:
    """Files that a field of the configuration names, as an artefact; None without any."""
    return call(own_files, OwnFilesConfig(field=field, paths=paths, sha256=sha256), f"files of {field}") if paths else None


@flow(name="data")
def make_data(run: Run, extra: Manifest | None) -> tuple[Manifest, Manifest]:
    """Labelled utterances, split and checked for leaks, and their data card; a teacher, where one is named, is asked first."""
    call, data = runner(run), run.config.data
    lessons = {"teacher": ask_teacher(run)} if data.teacher != NO_TEACHER else {}
    given = {"extra": extra} if extra else {}
    # Where the data is made anew, everything is: torch is imported beside it. With pools, another process is going to need it.
    making = replace(call, meanwhile=FORKS.warm) if call.pool == "local" else call
    dataset = making(synthesize, data, **lessons, **given)
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
        facts = {"run": run.run_id, "stopped": lessons.metrics["stopped"]}
        tell("teacher.budget", run.config.data.teacher, facts, kind="teacher")
    return lessons


@flow(name="train")
def train(run: Run, dataset: Manifest) -> tuple[Manifest, Manifest, Manifest, Manifest, Manifest | str]:
    """Base model, the same with the vocabulary it is trained with, adapter, merged 16-bit model, and what that foretells, with which every
    quantized variant is compared; or why not."""
    call = runner(run)
    base = call(base_model, run.config.base_model)
    trimmed = with_vocabulary(call, run.config.vocabulary, base, dataset)

    def explain() -> None:
        for lack in why_slow(run.config.train) if run.config.base_model.source != TINY else ():
            call.display.say(lack)

    adapter = replace(call, meanwhile=explain)(finetune, run.config.train, base_model=trimmed, dataset=dataset)
    if missed := adapter.metrics["left_out_too_long"]:
        limit = f"train.max_length={run.config.train.max_length}"
        call.display.say(f"{missed:,} of {missed + adapter.metrics['examples']:,} training rows have more tokens than {limit}: left out.")
    tuned = call(merge, run.config.merge, base_model=trimmed, adapter=adapter, dataset=dataset)
    try:
        reference: Manifest | str = call(reference_logits, run.config.fidelity, model=tuned, dataset=dataset)
    except (StageError, UserError) as error:
        reference = str(error)
    return base, trimmed, adapter, tuned, reference


def with_vocabulary(call: Runner, config: VocabularyConfig, base: Manifest, dataset: Manifest, label: str = "trim_vocabulary") -> Manifest:
    """The base model with the vocabulary that the configuration leaves it."""
    if config.tokens is None:
        return base
    made = call(trim_vocabulary, config, label, base_model=base, dataset=dataset)
    if lost := made.metrics["tokens_in_use_left_out"]:
        share, all_ = made.metrics["share_of_text_left_out"], made.metrics["tokens_in_use"]
        call.display.say(
            f"vocabulary.tokens={config.tokens} leaves out {lost:,} of {all_:,} tokens of the training rows, {share:.2%} of their text, which is written in smaller ones."
        )
    return made


def to_gguf(run: Run, model: Manifest, base: Manifest, label: str) -> Manifest:
    """A model as 16-bit GGUF. How one of a trimmed vocabulary cuts texts into words is told from the base model's tokenizer."""
    whole = {} if run.config.vocabulary.tokens is None else {"untrimmed": base}
    return runner(run)(convert_gguf, convert_config(), label, model=model, **whole)


@flow(name="quantize-gptq")
def make_gptq(run: Run, tuned: Manifest, dataset: Manifest) -> tuple[list[Variant], Models, Failed]:
    """Every variant of the formats that GPTQModel makes, GPTQ and AWQ; one that fails does not stop the others."""
    variants, models, failed = [], {}, {}
    wanted = [("gptq", quantize_gptq, config) for config in run.config.gptq] + [("awq", quantize_awq, config) for config in run.config.awq]
    for format_, stage, config in wanted:
        name = gptq_name(format_, config)
        variants.append(Variant(name=name, format=format_, bits=config.bits, runtime="transformers", role="candidate"))
        try:
            models[name] = runner(run)(stage, config, f"quantize {name}", model=tuned, dataset=dataset)
        except (StageError, UserError) as error:
            failed[name] = str(error)
    return variants, models, failed


@flow(name="quantize-gguf")
def make_gguf(run: Run, tuned: Manifest, dataset: Manifest, base: Manifest) -> tuple[list[Variant], Models, Failed, Manifest | None]:
    """Every GGUF format from one F16 file, which comes last, if the model could be converted; one that fails does not stop the others."""
    call, config = runner(run), run.config
    variants, models, failed = [], {}, {}
    made: dict[bool, dict[str, Manifest]] = {}  # what a format is made from, without and with an importance matrix
    problem = ""
    try:
        made[False] = {"gguf": to_gguf(run, tuned, base, "convert to GGUF")}
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
def measure(run: Run, variants: list[Variant], models: Models, dataset: Manifest, failed: Failed) -> tuple[Models, Failed, Failed]:
    """Accuracy, then speed and memory, of every variant, each in the runtime it will be deployed with, on the same rows.

    Returns:
        What was found, by the names that `decide` knows it by; the variants that failed; what else of variants could not be measured.
    """
    call, config = runner(run), run.config
    found, failed, unmeasured = {}, dict(failed), {}

    def attempt(variant: Variant, name: str, stage: Stage, settings: StageConfig, label: str, **more: Manifest) -> None:
        if variant.name in failed:
            return
        try:
            found[name] = call(stage, settings, label, model=models[variant.name], **more)
        except (StageError, UserError) as error:
            if name in (f"evaluate:{variant.name}", f"benchmark:{variant.name}:0"):  # without them it cannot be compared
                failed[variant.name] = str(error)
            else:
                unmeasured[name] = str(error)

    for variant in variants:
        asked = config.evaluate.model_copy(update=how(variant) | kernel_of(config, variant))
        attempt(variant, f"evaluate:{variant.name}", evaluate, asked, f"evaluate {variant.name}", dataset=dataset)
        if config.constrained and variant.format == "gguf":
            kept = asked.model_copy(update={"constrained": True})
            attempt(variant, f"constrained:{variant.name}", evaluate, kept, f"evaluate {variant.name}, constrained", dataset=dataset)
    for name, stage, settings, label, variant in measurements(config, variants):
        data = {} if stage is llama_bench else {"dataset": dataset}
        attempt(variant, name, stage, settings, label, **data)
    return {name: manifest for name, manifest in found.items() if name.split(":")[1] not in failed}, failed, unmeasured


def how(variant: Variant) -> dict[str, Any]:
    """How a variant is asked. Accuracy is measured in what is quickest here, but for variants that are nothing but a precision."""
    precision = {"dtype": variant.dtype} if variant.role == "baseline" else {}
    return {"runtime": variant.runtime, "zero_shot": variant.role == "base", "few_shot": variant.few_shot, **precision}


def kernel_of(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """The kernel that a variant is asked, checked and timed with alike."""
    return {"kernel": config.benchmark.kernel if variant.format == "gptq" else None}


def measurements(config: RunConfig, variants: list[Variant]) -> Iterator[tuple[str, Stage, StageConfig, str, Variant]]:
    """Every measurement of speed and memory: name, stage, config, label, variant. Variants take turns, so that a machine that gets
    slower or busier for a while does it to all of them."""
    for number in range(config.benchmark.runs):
        again = f", run {number + 1}" if number else ""
        for variant in variants:
            if variant.role == "base" and number:
                continue
            # The base model reads long instructions with every request, and its speed is nobody's choice: it is measured once, in what
            # is quickest here.
            few = {"requests": 12, "batched_requests": 12, "repeats": 1, "warmup": 1, "loads": ()} if variant.role == "base" else {}
            run = MOST_RUNS * config.benchmark.session + number
            settings = how(variant) | kernel_of(config, variant) | few | {"dtype": variant.dtype, "run": run}
            measured = config.benchmark.model_copy(update=settings)
            yield f"benchmark:{variant.name}:{number}", benchmark, measured, f"benchmark {variant.name}{again}", variant
            for kernel in config.benchmark.kernels if variant.format == "gptq" and not number else ():
                other = measured.model_copy(update={"kernel": kernel})
                yield f"kernel:{variant.name}:{kernel}", benchmark, other, f"benchmark {variant.name}, {kernel} kernel", variant
            if variant.format != "gguf":
                continue
            if config.benchmark.llama_bench:
                same = {name: getattr(measured, name) for name in ("prefill_tokens", "decode_tokens", "repeats", "run")}
                theirs = LlamaBenchConfig(**same)
                yield f"llama-bench:{variant.name}:{number}", llama_bench, theirs, f"llama-bench {variant.name}{again}", variant
            beside = (
                ("constrained-benchmark", "constrained", "constrained", config.constrained),
                ("mapped", "mapped", "mmap", config.benchmark.mapped_too),
            )
            for name, word, field, wanted in beside:
                if wanted and not number:
                    other = measured.model_copy(update={field: True})
                    yield f"{name}:{variant.name}", benchmark, other, f"benchmark {variant.name}, {word}", variant


@flow(name="check")
def check(
    run: Run,
    variants: list[Variant],
    models: Models,
    reference: Manifest | str,
    base: Manifest,
    trimmed: Manifest,
    tuned: Manifest,
    converted: Manifest | None,
    failed: Failed,
) -> tuple[Models, Failed]:
    """Whether every quantized variant still is the fine-tuned model. What could not be checked is noted, and stands unchecked."""
    call, checked, unchecked = runner(run), {}, {}
    quantized = [variant for variant in variants if variant.role == "candidate" and variant.name not in failed]
    before, problems = {"hf": {"tuned": tuned, "base": trimmed}}, {}
    if isinstance(reference, str):
        return {}, {variant.name: reference for variant in quantized}
    if converted and any(variant.format == "gguf" for variant in quantized):
        try:
            before["gguf"] = {"tuned": converted, "base": to_gguf(run, trimmed, base, "convert base to GGUF")}
        except (StageError, UserError) as error:
            problems["gguf"] = str(error)
    for variant in quantized:
        kind = "gguf" if variant.format == "gguf" else "hf"
        if kind in problems:
            unchecked[variant.name] = problems[kind]
            continue
        try:
            folded = {"folded": variant.format == "awq"}
            settings = FidelityConfig.model_validate({"runtime": variant.runtime, **folded, **kernel_of(run.config, variant)})
            model = models[variant.name]
            checked[variant.name] = call(fidelity, settings, f"check {variant.name}", model=model, reference=reference, **before[kind])
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
            evaluations[f"evaluate:{variant.name}"] = runner(run)(evaluate_api, config, f"evaluate {variant.name}", dataset=dataset)
        except (StageError, UserError) as error:
            failed[variant.name] = str(error)
    return variants, evaluations, failed


@flow(name="choose")
def choose(
    run: Run,
    variants: list[Variant],
    models: Models,
    found: Models,
    checked: Models,
    failed: Failed,
    unchecked: Failed,
    unmeasured: Failed,
) -> Manifest:
    """Figures side by side, Pareto front, recommendation."""
    inputs = found | {
        f"{kind}:{v.name}": made[v.name]
        for v in variants
        if v.name not in failed
        for kind, made in (("model", models), ("fidelity", checked))
        if v.name in made and v.role != "api"
    }
    problems = {"failed": failed, "unchecked": unchecked, "unmeasured": unmeasured}
    # A log is another run's each time: with its path in the key, what failed before would be decided and reported anew.
    told = {kind: {name: why.partition(ITS_LOG)[0] for name, why in found.items()} for kind, found in problems.items()}
    config = run.config.decide.model_copy(update={"variants": tuple(variants), **told})
    return runner(run).run(decide, config, "decide", inputs)


def all_variants(config: RunConfig, gguf: list[Variant], gptq: list[Variant]) -> list[Variant]:
    """Base model (without and, if wanted, with examples) and 16-bit reference first, then its other precisions and the quantized ones."""
    base = Variant(name=BASE, format="hf", bits=16, runtime="transformers", dtype="auto", role="base")
    first = [
        base,
        *([base.model_copy(update={"name": BASE_FEW_SHOT, "few_shot": config.base_few_shot})] if config.base_few_shot else []),
        Variant(name=REFERENCE, format="hf", bits=16, runtime="transformers", role="reference"),
    ]
    baselines = [
        Variant(
            name=BASELINES[dtype], format="hf", bits=32 if dtype == "float32" else 16, runtime="transformers", dtype=dtype, role="baseline"
        )
        for dtype in config.baselines
    ]
    return [*first, *baselines, *gptq, *gguf]
