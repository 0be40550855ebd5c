"""Stage `decide`: every variant's figures side by side, the Pareto front, and one recommendation per kind of hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.core.artifacts import MANIFEST, Manifest
from tasks.core.stage import StageConfig, stage
from tasks.fidelity import UNUSABLE
from tasks.paper import compare_with_paper
from tasks.runtimes import Dtype, RuntimeName

BASE, BASE_FEW_SHOT, REFERENCE = "base-bf16", "base-bf16-few-shot", "tuned-fp16"
MIXED = "gguf-mixed"
OF_OUR_MACHINE = ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "rss_mb", "pss_mb", "vram_mb", "energy_j_per_request")
SIGNIFICANT = 0.05  # largest p with which a loss of accuracy is taken for one
ELSEWHERE = "the model runs on its provider's machines"


class Variant(BaseModel):
    """One way to deploy the model. `base` was not fine-tuned; `reference` is the 16-bit model all others are compared with.

    `api` is somebody else's model, asked for contrast: it is never recommended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    format: Literal["hf", "gptq", "gguf", "api"]
    bits: float | None
    runtime: RuntimeName
    dtype: Dtype = "float16"
    role: Literal["base", "reference", "candidate", "api"]
    few_shot: int = 0


class DecideConfig(StageConfig):
    """What a recommended variant must keep to. A limit of null does not limit."""

    max_accuracy_loss: float = Field(
        0.01, ge=0, le=1, description="Largest loss of exact match against the 16-bit model, as a share: 0.01 is one percentage point"
    )
    max_size_mb: float | None = Field(None, gt=0)
    max_rss_mb: float | None = Field(None, gt=0)
    max_latency_p95_ms: float | None = Field(None, gt=0)
    variants: tuple[Variant, ...] = Field((), description="Filled in by the flow")
    unchecked: dict[str, str] = Field(
        {}, description="Variants whose fidelity could not be measured, with the reason; filled in by the flow"
    )
    failed: dict[str, str] = Field({}, description="Variants that could not be made or measured, with the reason; filled in by the flow")


@stage("decide", version=3, libraries=("scipy", "numpy"), isolated=False)
def decide(config: DecideConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `decision.json`: `variants`, `pareto`, `recommendation` and `paper` of the report.

    `inputs` has `model:<variant>`, `evaluate:<variant>` and `benchmark:<variant>` for every variant that did not fail, and
    `fidelity:<variant>` for the quantized ones; of a model behind an API, only `evaluate:<variant>`.
    """
    variants = [_describe(variant, config, inputs) for variant in config.variants]
    reference = next((v for v in variants if v["role"] == "reference" and v["quality"]), None)
    for variant in variants:
        _compare(variant, reference, inputs)
    recommendation = recommend(variants, config)
    decision = {
        "variants": variants,
        "pareto": pareto_front(variants),
        "recommendation": recommendation,
        "paper": compare_with_paper(measured(variants), [v for v in variants if v["role"] == "api"]),
    }
    (out_dir / "decision.json").write_text(json.dumps(decision, indent=2, ensure_ascii=False), encoding="utf-8")
    return {"recommended_cpu": recommendation["cpu"], "variants": len(variants), "failed": len(config.failed)}


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
    performance = _manifest(inputs[f"benchmark:{variant.name}"])["metrics"]
    weights = [entry["size"] for name, entry in model["files"].items() if name.endswith((".gguf", ".safetensors"))]
    hard = quality.get("hard", {})
    notes = []
    if variant.role == "base":
        examples = f" and {variant.few_shot} examples" if variant.few_shot else ", without examples"
        notes.append(f"asked with long instructions{examples}, since it was not fine-tuned")
    if performance["device"] == "cpu" and variant.format == "gptq":
        notes.append("GPTQ is made for GPUs; here it ran on the CPU, so its speed says nothing about a GPU")
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
        "performance": {name: value for name, value in performance.items() if name not in ("device", "threads", "kernel")}
        | {"energy_j_per_request": None, "energy_source": None, "usd_per_1k_requests": None}
        | {"usd_per_1k_requests_reason": "runs on a machine of one's own, whose price is not known here"},
        "notes": notes,
    }


def _fidelity(variant: Variant, config: DecideConfig, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What is known of a variant's fidelity, or why nothing is."""
    if found := inputs.get(f"fidelity:{variant.name}"):
        return {"fidelity": _manifest(found)["metrics"]}
    usual = {"base": "not made from the fine-tuned model", "reference": "it is what the others are compared with"}
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
    return [v for v in variants if v["quality"] and v["role"] not in ("base", "api")]


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
    """The fastest variant within the limits for a CPU; the smallest accurate one of the GPU formats for a GPU."""
    limits = {name: getattr(config, name) for name in ("max_accuracy_loss", "max_size_mb", "max_rss_mb", "max_latency_p95_ms")}
    reference = next((v for v in measured(variants) if v["role"] == "reference"), None)
    if not reference:
        return {
            "cpu": None,
            "gpu": None,
            "constraints": limits,
            "why": "The 16-bit reference could not be measured, so nothing can be compared with it.",
        }
    fitting = [v for v in usable(variants) if _within(v, reference, config)]
    on_cpu = [v for v in fitting if v["device"] == "cpu" and v["role"] == "candidate"]
    cpu = max(on_cpu, key=lambda v: v["performance"]["requests_s"], default=None)
    for_gpu = [v for v in fitting if v["runtime"] == "transformers"]
    on_gpu = [v for v in for_gpu if v["device"] == "cuda"]
    gpu = max(on_gpu, key=lambda v: v["performance"]["requests_s"]) if on_gpu else min(for_gpu, key=lambda v: v["size_mb"], default=None)
    return {
        "cpu": cpu["name"] if cpu else None,
        "gpu": gpu["name"] if gpu else None,
        "constraints": limits,
        "why": f"{_why_cpu(cpu, reference, config)} {_why_gpu(gpu, bool(on_gpu))}",
    }


def _within(v: dict[str, Any], reference: dict[str, Any], config: DecideConfig) -> bool:
    lost = reference["quality"]["exact_match"]["value"] - v["quality"]["exact_match"]["value"]
    limits = (
        (v["size_mb"], config.max_size_mb),
        (v["performance"]["rss_mb"], config.max_rss_mb),
        (v["performance"]["latency_ms"]["p95"], config.max_latency_p95_ms),
    )
    return lost <= config.max_accuracy_loss + 1e-9 and all(limit is None or value <= limit for value, limit in limits)


def _why_cpu(v: dict[str, Any] | None, reference: dict[str, Any], config: DecideConfig) -> str:
    if not v:
        return "No quantized variant kept to the limits."
    exact, was = v["quality"]["exact_match"]["value"], reference["quality"]["exact_match"]["value"]
    return (
        f"{v['name']} answers {v['performance']['requests_s']:.1f} requests/s, {v['speedup_vs_fp16']:.1f} times as many as 16-bit transformers, "
        f"with {v['ram_reduction_vs_fp16']:.0%} less memory and exact match {exact:.1%} against {was:.1%}: the fastest that loses at most {config.max_accuracy_loss * 100:g} percentage points."
    )


def _why_gpu(v: dict[str, Any] | None, measured: bool) -> str:
    if not v:
        return "No variant for a GPU kept to the limits."
    if measured:
        return f"{v['name']} was the fastest on the GPU within the limits."
    return f"{v['name']} is the smallest GPU format within the accuracy limit ({v['size_mb']:.0f} MB, exact match {v['quality']['exact_match']['value']:.1%}). There was no GPU here: its speed on one was not measured."
