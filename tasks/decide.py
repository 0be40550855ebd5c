"""Stage `decide`: every variant's figures side by side, the Pareto front, and one recommendation per kind of hardware."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.benchmark import pooled
from tasks.core.manifests import MANIFEST, Manifest
from tasks.core.stage import StageConfig, stage
from tasks.fidelity import UNUSABLE
from tasks.paper import compare_with_paper
from tasks.runtimes import Dtype, RuntimeName

BASE, BASE_FEW_SHOT, REFERENCE = "base-bf16", "base-bf16-few-shot", "tuned-fp16"
BASELINES = {"float32": "tuned-fp32", "bfloat16": "tuned-bf16"}
MIXED = "gguf-mixed"
OF_OUR_MACHINE = ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "rss_mb", "pss_mb", "vram_mb", "energy_j_per_request")
GPU_FORMATS = ("gptq", "awq")
QUIET = 0.1  # cores that others may keep busy while a variant is measured; with more the machine was not quiet
REPEATABLE = 0.1  # spread of a figure over runs from which a note says so
SIGNIFICANT = 0.05  # largest p with which a loss of accuracy is taken for one
LIMITS = ("max_accuracy_loss", "max_size_mb", "max_rss_mb", "max_latency_p95_ms", "max_usd_per_1k_requests")
ELSEWHERE = "the model runs on its provider's machines"


class Variant(BaseModel):
    """One way to deploy the model. `base` was not fine-tuned; `reference` is the 16-bit model all others are compared with.

    `baseline` is the same model computed in another precision, which shows what that alone makes of the speed.
    `api` is somebody else's model, asked for contrast: it is never recommended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    format: Literal["hf", "gptq", "awq", "gguf", "api"]
    bits: float | None
    runtime: RuntimeName
    dtype: Dtype = "float16"
    role: Literal["base", "reference", "baseline", "candidate", "api"]
    few_shot: int = 0


class DecideConfig(StageConfig):
    """What a recommended variant must keep to. A limit of null does not limit."""

    max_accuracy_loss: float = Field(
        0.005, ge=0, le=1, description="Largest loss of exact match against the 16-bit model, as a share: 0.01 is one percentage point"
    )
    max_size_mb: float | None = Field(None, gt=0)
    max_rss_mb: float | None = Field(None, gt=0)
    max_latency_p95_ms: float | None = Field(None, gt=0)
    machine_usd_per_hour: float | None = Field(None, gt=0, description="What the machine costs, from which the price of requests follows")
    max_usd_per_1k_requests: float | None = Field(None, gt=0, description="Needs machine_usd_per_hour")
    variants: tuple[Variant, ...] = Field((), description="Filled in by the flow")
    unchecked: dict[str, str] = Field(
        {}, description="Variants whose fidelity could not be measured, with the reason; filled in by the flow"
    )
    unmeasured: dict[str, str] = Field({}, description="Further measurements that failed, with the reason; filled in by the flow")
    failed: dict[str, str] = Field({}, description="Variants that could not be made or measured, with the reason; filled in by the flow")

    @model_validator(mode="after")
    def _a_price_needs_a_price(self) -> DecideConfig:
        if self.max_usd_per_1k_requests is not None and self.machine_usd_per_hour is None:
            raise ValueError("max_usd_per_1k_requests needs machine_usd_per_hour, what the machine costs")
        return self


@stage("decide", version=4, libraries=("scipy", "numpy"), isolated=False, varies="it holds what was measured")
def decide(config: DecideConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `decision.json`: `variants`, `pareto`, `recommendation` and `paper` of the report.

    `inputs` has `model:<variant>`, `evaluate:<variant>` and `benchmark:<variant>:<run>` for every variant that did not fail, and
    `fidelity:<variant>` for the quantized ones; of a model behind an API, only `evaluate:<variant>`. GGUF variants may have
    `constrained:<variant>`, `constrained-benchmark:<variant>`, `mapped:<variant>` and `llama-bench:<variant>:<run>` too.
    """
    variants = [_describe(variant, config, inputs) for variant in config.variants]
    reference = next((v for v in variants if v["role"] == "reference" and v["quality"]), None)
    for variant in variants:
        _compare(variant, reference, inputs)
    recommendation = recommend(variants, config)
    for variant in variants:
        if why := recommendation.get("excluded", {}).get(variant["name"]):
            variant["notes"].append(f"not recommended: {why}")
    decision = {
        "variants": variants,
        "pareto": pareto_front(variants),
        "recommendation": recommendation,
        "measurement": measurement(variants),
        "paper": compare_with_paper(measured(variants), [v for v in variants if v["role"] == "api"]),
    }
    (out_dir / "decision.json").write_text(json.dumps(decision, indent=2, ensure_ascii=False), encoding="utf-8")
    return {"recommended_cpu": recommendation["cpu"], "variants": len(variants), "failed": len(config.failed)}


def measurement(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How much others disturbed the measurements: the most that any of them kept busy, in cores, and whether that is little."""
    busy = {v["name"]: v["performance"] for v in variants if v["role"] != "api" and v["performance"]}
    if not busy:
        return None
    most = max(busy, key=lambda name: busy[name]["others_cores"] + busy[name]["stolen_cores"])
    return {
        "others_cores": max(found["others_cores"] for found in busy.values()),
        "stolen_cores": max(found["stolen_cores"] for found in busy.values()),
        "most_disturbed": most,
        "quiet": busy[most]["others_cores"] + busy[most]["stolen_cores"] <= QUIET,
    }


def recommended_cpu(decision: Manifest) -> str | None:
    """The variant a decision recommends for a CPU."""
    return decision.metrics["recommended_cpu"]


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _describe(variant: Variant, config: DecideConfig, inputs: Mapping[str, Path]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": variant.name,
        "role": variant.role,
        "format": variant.format,
        "bits": variant.bits,
        "runtime": variant.runtime,
        "few_shot": variant.few_shot,
    }
    if variant.name in config.failed:
        return {**row, "error": config.failed[variant.name], "quality": None, "performance": None, "size_mb": None, "notes": []}
    if variant.role == "api":
        return row | _describe_api(variant, _manifest(inputs[f"evaluate:{variant.name}"]))
    model = _manifest(inputs[f"model:{variant.name}"])
    quality = _manifest(inputs[f"evaluate:{variant.name}"])["metrics"]
    performance = pooled([(_manifest(folder)["metrics"], folder) for folder in _runs("benchmark", variant, inputs)])
    weights = [entry["size"] for name, entry in model["files"].items() if name.endswith((".gguf", ".safetensors"))]
    hard = quality.get("hard", {})
    notes = []
    if variant.role == "base":
        examples = f" and {variant.few_shot} examples" if variant.few_shot else ", without examples"
        notes.append(f"asked with long instructions{examples}, since it was not fine-tuned")
    if performance["device"] == "cpu" and variant.format in GPU_FORMATS:
        notes.append(f"{variant.format.upper()} is made for GPUs; here it ran on the CPU, so its speed says nothing about a GPU")
    if performance["spread"] and (spread := max(performance["spread"].values())) > REPEATABLE:
        notes.append(
            f"its {performance['runs']} runs differ by up to {spread:.0%}: the machine was not quiet, or the variant is not steady"
        )
    notes += [
        f"{name.split(':')[0]} failed: {why}"
        for name, why in config.unmeasured.items()
        if name.split(":")[1] == variant.name and not name.startswith("kernel:")
    ]
    return {
        **row,
        "device": performance["device"],
        "threads": performance["threads"],
        "kernel": performance["kernel"],
        "size_mb": sum(weights) / 1e6,
        "sha256": model["digest"],
        "key": model["key"],
        "tensor_types": model["metrics"].get("tensor_types"),
        "bits": model["metrics"].get("bits_per_weight", variant.bits),
        "quality": {**quality["test"], "hard_exact_match": hard.get("exact_match"), "hard": hard},
        **_fidelity(variant, config, inputs),
        "constrained": _constrained(variant, inputs),
        "performance": {name: value for name, value in performance.items() if name not in ("device", "threads", "kernel")}
        | {"mapped": _mapped(variant, inputs), "llama_bench": _llama_bench(variant, performance, inputs)}
        | {"kernels": _kernels(variant, config, inputs)}
        | _missing(performance)
        | _price(performance, config),
        "notes": notes,
    }


def _runs(kind: str, variant: Variant, inputs: Mapping[str, Path]) -> list[Path]:
    """The artefacts of a measurement's runs, in their order."""
    return [inputs[name] for run in range(len(inputs)) if (name := f"{kind}:{variant.name}:{run}") in inputs]


def _constrained(variant: Variant, inputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """What constrained decoding brings and costs: figures of accuracy and speed with it, and the paired difference it makes."""
    found, timed = (inputs.get(f"{kind}:{variant.name}") for kind in ("constrained", "constrained-benchmark"))
    if not found or not timed:
        return None
    quality, speed = _manifest(found)["metrics"], _manifest(timed)["metrics"]
    return {
        "exact_match": quality["test"]["exact_match"],
        "hard_exact_match": quality.get("hard", {}).get("exact_match"),
        "json_valid": quality["test"]["json_valid"],
        "vs_free": paired_difference(correct_rows(found), correct_rows(inputs[f"evaluate:{variant.name}"])),
        "requests_s": speed["requests_s"],
        "requests_s_batched": speed["requests_s_batched"],
    }


def _mapped(variant: Variant, inputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Load time, memory and speed with the file mapped into memory."""
    if not (found := inputs.get(f"mapped:{variant.name}")):
        return None
    metrics = _manifest(found)["metrics"]
    return {name: metrics[name] for name in ("load_s", "rss_mb", "pss_mb", "private_mb", "requests_s")}


def _kernels(variant: Variant, config: DecideConfig, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Speed with each kernel that was tried, or why there is none."""
    prefix = f"kernel:{variant.name}:"
    figures = ("kernel", "requests_s", "requests_s_batched", "prefill_tok_s", "decode_tok_s")
    found = {name: _manifest(folder)["metrics"] for name, folder in inputs.items() if name.startswith(prefix)}
    measured = [{"name": name.removeprefix(prefix), **{figure: metrics[figure] for figure in figures}} for name, metrics in found.items()]
    return measured + [
        {"name": name.removeprefix(prefix), "error": why} for name, why in config.unmeasured.items() if name.startswith(prefix)
    ]


def _missing(performance: Mapping[str, Any]) -> dict[str, str]:
    """Why figures are missing that a machine like this cannot give."""
    reasons = {}
    if performance.get("vram_mb") is None:
        reasons["vram_mb_reason"] = "runs on the CPU" if performance["device"] == "cpu" else "NVML does not tell it here"
    if performance.get("energy_j_per_request") is None:
        why = performance.get("energy_j_per_request_reason")
        reasons["energy_j_per_request_reason"] = why or "it could not be told in each of the runs"
    return reasons


def _llama_bench(variant: Variant, performance: Mapping[str, Any], inputs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Medians of llama-bench's figures over its runs, and ours as a share of them."""
    theirs = [_manifest(folder)["metrics"] for folder in _runs("llama-bench", variant, inputs)]
    if not theirs:
        return None
    medians = {name: statistics.median(found[name] for found in theirs) for name in ("prefill_tok_s", "decode_tok_s")}
    ratios = {f"{name.split('_')[0]}_ratio": performance[name] / value for name, value in medians.items()}
    return medians | ratios | {"build_commit": theirs[0]["build_commit"]}


def _fidelity(variant: Variant, config: DecideConfig, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What is known of a variant's fidelity, or why nothing is."""
    if found := inputs.get(f"fidelity:{variant.name}"):
        return {"fidelity": _manifest(found)["metrics"]}
    usual = {
        "baseline": "the reference's weights in another precision",
        "base": "not made from the fine-tuned model",
        "reference": "it is what the others are compared with",
    }
    return {"fidelity": None, "fidelity_reason": config.unchecked.get(variant.name) or usual.get(variant.role, "not measured")}


def _describe_api(variant: Variant, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A model behind an API: what cannot be known of it is null, and says why."""
    metrics, asked = evaluation["metrics"], evaluation["metrics"]["performance"]
    hidden = dict.fromkeys(OF_OUR_MACHINE) | dict.fromkeys((f"{name}_reason" for name in OF_OUR_MACHINE), ELSEWHERE)
    examples = f"{variant.few_shot} examples" if variant.few_shot else "no examples"
    notes = [f"asked with long instructions and {examples}, {asked['parallel']} requests at a time; a latency includes the network."]
    if asked["requests_failed"]:
        failed, total = asked["requests_failed"], asked["requests"] + asked["requests_failed"]
        notes.append(f"{failed} of {total} requests got no answer and count as wrong. The first: {asked['first_failure']}.")
    priced = {} if asked["usd"] is not None else {"usd_per_1k_requests_reason": "LiteLLM has no price of this model"}
    return {
        "model": evaluation["config"]["model"],
        "device": "api",
        "threads": None,
        "kernel": None,
        **dict.fromkeys(("size_mb", "sha256", "tensor_types")),
        **{f"{name}_reason": ELSEWHERE for name in ("size_mb", "bits", "threads", "sha256", "speedup_vs_fp16", "ram_reduction_vs_fp16")},
        "key": evaluation["key"],
        "quality": {**metrics["test"], "hard_exact_match": metrics.get("hard", {}).get("exact_match"), "hard": metrics.get("hard", {})},
        "fidelity": None,
        "fidelity_reason": "another model: nothing of ours was quantized into it",
        "performance": {name: value for name, value in asked.items() if name != "device"} | hidden | priced,
        "notes": notes,
    }


def _compare(variant: dict[str, Any], reference: dict[str, Any] | None, inputs: Mapping[str, Path]) -> None:
    variant["speedup_vs_fp16"] = variant["ram_reduction_vs_fp16"] = None
    if not reference or not variant["quality"]:
        return
    if variant["role"] != "api":
        mine, theirs = variant["performance"], reference["performance"]
        variant["speedup_vs_fp16"] = mine["requests_s"] / theirs["requests_s"]
        variant["speedup_vs_fp16_batched"] = mine["requests_s_batched"] / theirs["requests_s_batched"]
        variant["ram_reduction_vs_fp16"] = 1 - mine["rss_mb"] / theirs["rss_mb"]
    if variant is not reference:
        variant["quality"]["vs_reference"] = paired_difference(
            correct_rows(inputs[f"evaluate:{variant['name']}"]), correct_rows(inputs[f"evaluate:{reference['name']}"])
        )
    if fidelity := variant["fidelity"]:
        lost = variant["quality"]["vs_reference"]
        if fidelity["verdict"] == "ok" and lost["delta"] < 0 and lost["mcnemar_p"] < SIGNIFICANT:
            fidelity |= {
                "verdict": "degraded",
                "why": f"It is right {-lost['delta'] * 100:.1f} percentage points less often than the 16-bit model (McNemar p {lost['mcnemar_p']:.3f}).",
            }
        if fidelity["verdict"] != "ok":
            variant["notes"].append(f"{fidelity['verdict']}: {fidelity['why']}")


def correct_rows(folder: Path) -> list[bool]:
    """Which rows of `test` an evaluation got right."""
    with (folder / "test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["correct"] for line in file]


def paired_difference(mine: Sequence[bool], theirs: Sequence[bool], draws: int = 2000) -> dict[str, float]:
    """Difference of two shares on the same rows: bootstrap 95% interval, and McNemar's exact test (1947).

    Returns:
        `delta` (mine - theirs), `low`, `high`, `mcnemar_p`.
    """
    import numpy as np
    from scipy.stats import binomtest

    difference = np.asarray(mine, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).choice(difference, (draws, len(difference))).mean(axis=1)
    won, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return {
        "delta": float(difference.mean()),
        "low": float(np.quantile(drawn, 0.025)),
        "high": float(np.quantile(drawn, 0.975)),
        "mcnemar_p": p,
    }


def measured(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that could be deployed and have figures: neither the model before fine-tuning nor somebody else's."""
    return [v for v in variants if v["quality"] and v["role"] not in ("base", "baseline", "api")]


def usable(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured ones whose file, weights and runtime are what they should be."""
    return [v for v in measured(variants) if not (v["fidelity"] and v["fidelity"]["verdict"] in UNUSABLE)]


def pareto_front(variants: list[dict[str, Any]]) -> list[str]:
    """Variants that no other beats in accuracy, speed and memory at once (and in one of them strictly)."""

    def figures(v: dict[str, Any]) -> tuple[float, float, float]:
        return v["quality"]["exact_match"]["value"], v["performance"]["requests_s"], -v["performance"]["rss_mb"]

    found = usable(variants)
    return [v["name"] for v in found if not any(_dominates(figures(other), figures(v)) for other in found)]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def recommend(variants: list[dict[str, Any]], config: DecideConfig) -> dict[str, Any]:
    """The fastest variant within the limits for a CPU; the smallest accurate one of the GPU formats for a GPU; and who came second."""
    limits = {name: getattr(config, name) for name in LIMITS}
    reference = next((v for v in measured(variants) if v["role"] == "reference"), None)
    if not reference:
        return {
            "cpu": None,
            "gpu": None,
            "constraints": limits,
            "why": "The 16-bit reference could not be measured, so nothing can be compared with it.",
        }
    fitting = [v for v in usable(variants) if not _excluded(v, reference, config)]
    on_cpu = sorted(
        (v for v in fitting if v["device"] == "cpu" and v["role"] == "candidate"),
        key=lambda v: v["performance"]["requests_s"],
        reverse=True,
    )
    for_gpu = [v for v in fitting if v["runtime"] == "transformers"]
    on_gpu = sorted((v for v in for_gpu if v["device"] == "cuda"), key=lambda v: v["performance"]["requests_s"], reverse=True)
    gpu = on_gpu or sorted(for_gpu, key=lambda v: v["size_mb"])
    best, second = [*on_cpu, None, None][:2]
    return {
        "cpu": best["name"] if best else None,
        "gpu": gpu[0]["name"] if gpu else None,
        "runner_up": second["name"] if second else None,
        "gpu_runner_up": gpu[1]["name"] if len(gpu) > 1 else None,
        "excluded": {v["name"]: why for v in measured(variants) if v["role"] == "candidate" and (why := _excluded(v, reference, config))},
        "constraints": limits,
        "why": f"{_why_cpu(best, second, reference, config)} {_why_gpu(gpu[0] if gpu else None, bool(on_gpu))}",
    }


def _excluded(v: dict[str, Any], reference: dict[str, Any], config: DecideConfig) -> str:
    """Why a variant is not recommended, empty if nothing stands against it."""
    if v["fidelity"] and v["fidelity"]["verdict"] in UNUSABLE:
        return str(v["fidelity"]["verdict"])
    lost = reference["quality"]["exact_match"]["value"] - v["quality"]["exact_match"]["value"]
    if lost > config.max_accuracy_loss + 1e-9:
        return f"loses {lost * 100:.1f} percentage points of exact match; at most {config.max_accuracy_loss * 100:g} are allowed"
    versus = v["quality"].get("vs_reference")
    if versus and versus["delta"] < 0 and versus["mcnemar_p"] < SIGNIFICANT:
        return f"is significantly less accurate (McNemar p {versus['mcnemar_p']:.3f})"
    limits = (
        ("size", v["size_mb"], config.max_size_mb, "MB"),
        ("memory", v["performance"]["rss_mb"], config.max_rss_mb, "MB"),
        ("95th percentile of latency", v["performance"]["latency_ms"]["p95"], config.max_latency_p95_ms, "ms"),
        ("price of 1,000 requests", v["performance"].get("usd_per_1k_requests"), config.max_usd_per_1k_requests, "USD"),
    )
    over = [
        f"its {what} is {value:.3g} {unit}; at most {limit:g} are allowed"
        for what, value, limit, unit in limits
        if limit is not None and (value is None or value > limit)
    ]
    return over[0] if over else ""


def _price(performance: Mapping[str, Any], config: DecideConfig) -> dict[str, Any]:
    """What 1,000 requests cost on a machine that is busy with them all the time."""
    if config.machine_usd_per_hour is None:
        return {
            "usd_per_1k_requests": None,
            "usd_per_1k_requests_reason": "decide.machine_usd_per_hour, what the machine costs, is not set",
        }
    return {"usd_per_1k_requests": config.machine_usd_per_hour / 3600 * 1000 / performance["requests_s_batched"]}


def _why_cpu(v: dict[str, Any] | None, second: dict[str, Any] | None, reference: dict[str, Any], config: DecideConfig) -> str:
    if not v:
        return "No quantized variant kept to the limits."
    exact, was = v["quality"]["exact_match"]["value"], reference["quality"]["exact_match"]["value"]
    after = f" Runner-up: {second['name']} with {second['performance']['requests_s']:.1f} requests/s." if second else ""
    return (
        f"{v['name']} answers {v['performance']['requests_s']:.1f} requests/s, {v['speedup_vs_fp16']:.1f} times as many as 16-bit transformers, "
        f"with {v['ram_reduction_vs_fp16']:.0%} less memory and exact match {exact:.1%} against {was:.1%}: the fastest that loses at most {config.max_accuracy_loss * 100:g} percentage points.{after}"
    )


def _why_gpu(v: dict[str, Any] | None, measured: bool) -> str:
    if not v:
        return "No variant for a GPU kept to the limits."
    if measured:
        return f"{v['name']} was the fastest on the GPU within the limits."
    return f"{v['name']} is the smallest GPU format within the accuracy limit ({v['size_mb']:.0f} MB, exact match {v['quality']['exact_match']['value']:.1%}). There was no GPU here: its speed on one was not measured."
