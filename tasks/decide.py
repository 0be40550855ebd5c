"""Stage `decide`: every variant's figures side by side, the Pareto front, and one recommendation per kind of hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tasks.core.manifests import Manifest
from tasks.core.stage import StageConfig, stage
from tasks.fidelity import UNUSABLE
from tasks.paired import correct_rows, paired_difference
from tasks.paper import compare_with_paper
from tasks.variant_figures import AGAINST_REFERENCE, describe
from tasks.variants import MIXED, Variant

QUIET = 0.1  # cores that others may keep busy while a variant is measured; with more the machine was not quiet
SIGNIFICANT = 0.05  # largest p with which a loss of accuracy is taken for one
NONE_MEASURED = "No quantized variant that can be trusted was made and measured on a CPU."
WORTH_SEARCHING = 0.1  # how much smaller or faster than a ready-made file a searched mixture is to be
NEED_A_GPU = ("max_vram_mb", "max_latency_p95_ms", "max_usd_per_1k_requests")  # limits that a GPU variant measured on a CPU is not held to
LIMITS = ("max_accuracy_loss", "max_size_mb", "max_rss_mb", "max_vram_mb", "max_latency_p95_ms", "max_usd_per_1k_requests")


class DecideConfig(StageConfig):
    """What a recommended variant is for, and what it must keep to. A limit of null does not limit."""

    at_a_time: int | None = Field(
        None,
        ge=1,
        le=255,
        description="Requests under way at once where the variant is to work: speed, latency and price are those measured there. "
        "1, `benchmark.parallel` or one of `benchmark.loads`; null takes speed and latency of one, and the price of `parallel`",
    )

    max_accuracy_loss: float = Field(
        0.005, ge=0, le=1, description="Largest loss of exact match against the 16-bit model, as a share: 0.01 is one percentage point"
    )
    max_size_mb: float | None = Field(None, gt=0)
    max_rss_mb: float | None = Field(
        None, gt=0, description="Of what runs on a CPU, at its peak, from loading to the answers at `benchmark.parallel`"
    )
    max_vram_mb: float | None = Field(None, gt=0, description="GPU memory, of what runs on one")
    max_latency_p95_ms: float | None = Field(None, gt=0, description="With `at_a_time` requests under way")
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


@stage("decide", version=9, libraries=("scipy", "numpy"), isolated=False, varies="it holds what was measured")
def decide(config: DecideConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `decision.json`: `variants`, `pareto`, `recommendation` and `paper` of the report.

    `inputs` has `model:<variant>`, `evaluate:<variant>` and `benchmark:<variant>:<run>` for every variant that did not fail, and
    `fidelity:<variant>` for the quantized ones; of a model behind an API, only `evaluate:<variant>`. GGUF variants may have
    `constrained:<variant>`, `constrained-benchmark:<variant>`, `mapped:<variant>` and `llama-bench:<variant>:<run>` too.
    """
    variants = [describe(variant, config, inputs) for variant in config.variants]
    reference = next((v for v in variants if v["role"] == "reference" and v["quality"]), None)
    for variant in variants:
        _compare(variant, reference, inputs)
    recommendation = recommend(variants, config)
    mixed = next((variant for variant in measured(variants) if variant["name"] == MIXED), None)
    if mixed and (best := best_ready_made(variants, config)):
        mine, *theirs = (correct_rows(inputs[f"evaluate:{variant['name']}"]) for variant in (mixed, *best))
        versus = [paired_difference(mine, other) for other in theirs]
        mixed["notes"].append(beside_ready_made(mixed, best, versus, recommendation["excluded"].get(MIXED, ""), config.at_a_time))
    for variant in variants:
        if why := recommendation.get("excluded", {}).get(variant["name"]):
            for_cpu = " for a CPU" if variant["name"] == recommendation["gpu"] else ""
            variant["notes"].append(f"not recommended{for_cpu}: {why}")
    decision = {
        "variants": variants,
        "pareto": pareto_front(variants, config.at_a_time),
        "recommendation": recommendation,
        "measurement": measurement(variants),
        "paper": compare_with_paper(usable(variants), [v for v in variants if v["role"] == "api"], recommendation["cpu"]),
    }
    (out_dir / "decision.json").write_text(json.dumps(decision, indent=2, ensure_ascii=False), encoding="utf-8")
    return {"recommended_cpu": recommendation["cpu"], "variants": len(variants), "failed": len(config.failed)}


def measurement(variants: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How much others disturbed the measurements: the most that any of them kept busy, in cores, and whether that is little; and how far the runs
    of a variant lay apart in requests/s, at most, (largest - smallest) / median; None where each was measured once."""
    busy = {v["name"]: v["performance"] for v in variants if v["role"] != "api" and v["performance"]}
    if not busy:
        return None
    most = max(busy, key=lambda name: busy[name]["others_cores"] + busy[name]["stolen_cores"])
    apart = {name: found["spread"]["requests_s"] for name, found in busy.items() if found.get("spread")}
    least_steady = max(apart, key=lambda name: apart[name]) if apart else None
    return {
        "spread": apart[least_steady] if least_steady else None,
        "least_steady": least_steady,
        "others_cores": max(found["others_cores"] for found in busy.values()),
        "stolen_cores": max(found["stolen_cores"] for found in busy.values()),
        "most_disturbed": most,
        "quiet": busy[most]["others_cores"] + busy[most]["stolen_cores"] <= QUIET,
    }


def recommended_cpu(decision: Manifest) -> str | None:
    """The variant a decision recommends for a CPU."""
    return decision.metrics["recommended_cpu"]


def _compare(variant: dict[str, Any], reference: dict[str, Any] | None, inputs: Mapping[str, Path]) -> None:
    for figure in AGAINST_REFERENCE:
        variant[figure] = None
    if not reference or not variant["quality"]:
        return
    if variant["role"] != "api":
        mine, theirs = variant["performance"], reference["performance"]
        where = [f"{of['device']} ({of['performance'].get('machine') or 'unknown'})" for of in (reference, variant)]
        if where[0] == where[1]:
            variant["speedup_vs_fp16"] = mine["requests_s"] / theirs["requests_s"]
            variant["speedup_vs_fp16_batched"] = mine["requests_s_batched"] / theirs["requests_s_batched"]
            variant["batched_vs_fp16_alone"] = mine["requests_s_batched"] / theirs["requests_s"]
            variant["ram_reduction_vs_fp16"] = 1 - mine["rss_mb"] / theirs["rss_mb"]
            variant["private_reduction_vs_fp16"] = 1 - mine["private_mb"] / theirs["private_mb"]
            if mine.get("vram_mb") and theirs.get("vram_mb"):
                variant["vram_reduction_vs_fp16"] = 1 - mine["vram_mb"] / theirs["vram_mb"]
            else:
                variant["vram_reduction_vs_fp16_reason"] = mine.get("vram_mb_reason") or "the 16-bit model's is not known"
        else:
            elsewhere = f"the 16-bit model was measured on {where[0]}, this variant on {where[1]}"
            variant |= dict.fromkeys((f"{figure}_reason" for figure in AGAINST_REFERENCE), elsewhere)
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


def measured(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that could be deployed and have figures: neither the model before fine-tuning nor somebody else's."""
    return [v for v in variants if v["quality"] and v["role"] not in ("base", "baseline", "api")]


def usable(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured ones whose file, weights and runtime are what they should be."""
    return [v for v in measured(variants) if not (v["fidelity"] and v["fidelity"]["verdict"] in UNUSABLE)]


def is_sound(v: dict[str, Any]) -> bool:
    """Whether its fidelity was measured and found to be `ok`, as promotion wants it; the 16-bit model is what others are measured by."""
    return v["role"] != "candidate" or bool(v["fidelity"] and v["fidelity"]["verdict"] == "ok")


def best_ready_made(variants: list[dict[str, Any]], config: DecideConfig) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The GGUF file that would be recommended if nothing had been searched, and the smallest that might be; None where none keeps to the limits."""
    ready_made = [v for v in variants if v["role"] == "reference" or (v["format"] == "gguf" and v["name"] != MIXED)]
    found = recommend(ready_made, config)
    if not found["cpu"]:
        return None
    fitting = [v for v in usable(ready_made) if v["role"] == "candidate" and v["name"] not in found["excluded"]]
    fastest = next(v for v in fitting if v["name"] == found["cpu"])
    return fastest, min((v for v in fitting if is_sound(v) == is_sound(fastest)), key=lambda v: float(v["size_mb"]))


def beside_ready_made(
    mixed: dict[str, Any],
    best: tuple[dict[str, Any], dict[str, Any]],
    versus: Sequence[Mapping[str, float]],
    excluded: str,
    at_a_time: int | None = None,
) -> str:
    """What the search brought, beside the fastest and the smallest of the ready-made GGUF files within the limits.

    Args:
        versus: how much more often the mixture is right than each of them, paired.
        excluded: why it may not be recommended, if so.
    """
    fastest, smallest = best
    smaller = 1 - mixed["size_mb"] / smallest["size_mb"]
    quicker = requests_s(mixed, at_a_time) / requests_s(fastest, at_a_time)
    accuracy = [f"{found['delta'] * 100:+.1f} points of its exact match (McNemar p {found['mcnemar_p']:.2f})" for found in versus]
    figures = (
        f"{abs(smaller):.0%} {'smaller' if smaller > 0 else 'larger'} than {smallest['name']}, the smallest ready-made file within the limits, with "
        f"{accuracy[1]}; {quicker:.2f} times the requests/s of {fastest['name']}, the one to recommend among them, with {accuracy[0]}"
    )
    if excluded:
        return f"{figures}, but it may not be recommended: {excluded}"
    as_good = [found["delta"] >= 0 or found["mcnemar_p"] >= SIGNIFICANT for found in versus]
    worth = any(gain >= WORTH_SEARCHING and equal for gain, equal in zip((quicker - 1, smaller), as_good, strict=True))
    return f"{figures}: {'' if worth else 'not '}{WORTH_SEARCHING:.0%} smaller or faster at equal accuracy"


def pareto_front(variants: list[dict[str, Any]], at_a_time: int | None = None) -> list[str]:
    """Variants that no other on the same device beats in accuracy, speed and memory (a GPU's own) at once, and in one of them strictly.

    With so many requests under way; what was not measured there, as the base model, is on no front.
    """

    def figures(v: dict[str, Any]) -> tuple[float, float, float]:
        memory = v["performance"].get("vram_mb") if v["device"] == "cuda" else None  # the memory of its host is mostly CUDA's own
        return v["quality"]["exact_match"]["value"], requests_s(v, at_a_time), -(memory or v["performance"]["rss_mb"])

    found = [v for v in usable(variants) if at_a_time in (None, 1) or str(at_a_time) in v["performance"]["requests_s_by_load"]]
    return [
        v["name"] for v in found if not any(other["device"] == v["device"] and _dominates(figures(other), figures(v)) for other in found)
    ]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def recommend(variants: list[dict[str, Any]], config: DecideConfig) -> dict[str, Any]:
    """The fastest variant within the limits for a CPU; the smallest accurate one of the GPU formats for a GPU; and who came second.

    One whose fidelity is `ok` comes before one that is faster and `degraded` or unchecked, since only the first can be promoted.
    """
    limits = {name: getattr(config, name) for name in (*LIMITS, "at_a_time")}
    reference = next((v for v in measured(variants) if v["role"] == "reference"), None)
    if not reference:
        return {
            "cpu": None,
            "gpu": None,
            "excluded": {},
            "constraints": limits,
            "why": "The 16-bit reference could not be measured, so nothing can be compared with it.",
        }

    def speed(v: dict[str, Any]) -> float:
        return requests_s(v, config.at_a_time)

    candidates = [v for v in usable(variants) if v["device"] == "cpu" and v["role"] == "candidate"]
    fitting = [v for v in candidates if not _excluded(v, reference, config)]
    on_cpu = sorted(fitting, key=lambda v: (is_sound(v), speed(v)), reverse=True)
    for_gpu = [v for v in usable(variants) if v["runtime"] == "transformers" and not _excluded(v, reference, config, on_gpu=True)]
    on_gpu = sorted((v for v in for_gpu if v["device"] == "cuda"), key=lambda v: (is_sound(v), speed(v)), reverse=True)
    gpu = on_gpu or sorted(for_gpu, key=lambda v: (not is_sound(v), v["size_mb"]))
    best, second = [*on_cpu, None, None][:2]
    passed_over = [v["name"] for v in on_cpu if best and speed(v) > speed(best)]
    return {
        "cpu": best["name"] if best else None,
        "gpu": gpu[0]["name"] if gpu else None,
        "runner_up": second["name"] if second else None,
        "gpu_runner_up": gpu[1]["name"] if len(gpu) > 1 else None,
        "excluded": {v["name"]: why for v in measured(variants) if v["role"] == "candidate" and (why := _excluded(v, reference, config))},
        "constraints": limits,
        "why": f"{_why_cpu(best, second, passed_over, reference, config) if candidates else NONE_MEASURED} {_why_gpu(gpu, bool(on_gpu), config)}",
    }


def requests_s(v: dict[str, Any], at_a_time: int | None) -> float:
    """How many a variant answers when so many are under way; None is one."""
    measured_there = v["performance"]["requests_s"] if at_a_time in (None, 1) else v["performance"]["requests_s_by_load"][str(at_a_time)]
    return float(measured_there)


def _latency_p95_ms(v: dict[str, Any], at_a_time: int | None) -> float:
    found = v["performance"]["latency_ms"] if at_a_time in (None, 1) else v["performance"]["latency_ms_by_load"][str(at_a_time)]
    return float(found["p95"])


def _under_way(config: DecideConfig) -> str:
    return f" with {config.at_a_time} requests under way" if config.at_a_time and config.at_a_time > 1 else ""


def _excluded(v: dict[str, Any], reference: dict[str, Any], config: DecideConfig, on_gpu: bool = False) -> str:
    """Why a variant is not recommended, empty if nothing stands against it.

    Args:
        on_gpu: for a GPU, on which it may not have been measured: what it took on a CPU says nothing then.
    """
    if v["fidelity"] and v["fidelity"]["verdict"] in UNUSABLE:
        return str(v["fidelity"]["verdict"])
    lost = reference["quality"]["exact_match"]["value"] - v["quality"]["exact_match"]["value"]
    if lost > config.max_accuracy_loss + 1e-9:
        return f"loses {lost * 100:.1f} percentage points of exact match; at most {config.max_accuracy_loss * 100:g} are allowed"
    versus = v["quality"].get("vs_reference")
    if versus and versus["delta"] < 0 and versus["mcnemar_p"] < SIGNIFICANT:
        return f"is significantly less accurate (McNemar p {versus['mcnemar_p']:.3f})"
    limits: tuple[tuple[str, float | None, float | None, str], ...] = (
        ("size", v["size_mb"], config.max_size_mb, "MB"),
        ("GPU memory", v["performance"].get("vram_mb"), config.max_vram_mb, "MB")
        if v["device"] == "cuda"  # the memory of its host is mostly CUDA's own
        else ("memory", v["performance"]["peak_rss_mb"], config.max_rss_mb, "MB"),
        ("95th percentile of latency" + _under_way(config), _latency_p95_ms(v, config.at_a_time), config.max_latency_p95_ms, "ms"),
        ("price of 1,000 requests", v["performance"].get("usd_per_1k_requests"), config.max_usd_per_1k_requests, "USD"),
    )
    if on_gpu and v["device"] != "cuda":
        limits = (limits[0], ("file, which GPU memory has to hold,", v["size_mb"], config.max_vram_mb, "MB"))
    over = [
        f"its {what} is {'not known' if value is None else f'{value:.3g} {unit}'}; at most {limit:g} are allowed"
        for what, value, limit, unit in limits
        if limit is not None and (value is None or value > limit)
    ]
    return over[0] if over else ""


def _why_cpu(
    v: dict[str, Any] | None, second: dict[str, Any] | None, passed_over: list[str], reference: dict[str, Any], config: DecideConfig
) -> str:
    if not v:
        return "No quantized variant kept to the limits."
    exact, was = v["quality"]["exact_match"]["value"], reference["quality"]["exact_match"]["value"]
    after = f" Runner-up: {second['name']} with {requests_s(second, config.at_a_time):.1f} requests/s." if second else ""
    versus = ", with "
    if v["speedup_vs_fp16"] is not None:
        less = v["ram_reduction_vs_fp16"]
        quicker = requests_s(v, config.at_a_time) / requests_s(reference, config.at_a_time)
        versus = f", {quicker:.1f} times as many as 16-bit transformers, with {abs(less):.0%} {'less' if less >= 0 else 'more'} memory and "
    fastest = f"loses at most {config.max_accuracy_loss * 100:g} percentage points"
    if any(getattr(config, name) is not None for name in LIMITS[1:]):
        fastest += " and keeps to the other limits"
    if passed_over:
        fastest += f" and has the verdict ok ({', '.join(passed_over)} would be faster)"
    doubt = ""
    if not is_sound(v):
        doubt = f" No variant within the limits has the verdict ok; it is {v['fidelity']['verdict'] if v['fidelity'] else 'unchecked'}, and will not be promoted."
    return (
        f"{v['name']} answers {requests_s(v, config.at_a_time):.1f} requests/s{_under_way(config)}{versus}"
        f"exact match {exact:.1%} against {was:.1%}: the fastest that {fastest}.{doubt}{after}"
    )


def _why_gpu(fitting: list[dict[str, Any]], measured: bool, config: DecideConfig) -> str:
    if not fitting:
        return "No variant for a GPU kept to the limits."
    v = fitting[0]
    after = f" Runner-up: {fitting[1]['name']}." if len(fitting) > 1 else ""
    doubt = "" if is_sound(v) else f" Its verdict is {v['fidelity']['verdict']}." if v["fidelity"] else " Its fidelity is unchecked."
    if measured:
        return f"{v['name']} was the fastest on the GPU within the limits.{doubt}{after}"
    not_checked = [name for name in NEED_A_GPU if getattr(config, name) is not None]
    after += f" Not checked without one: {', '.join(not_checked)}." if not_checked else ""
    return f"{v['name']} is the smallest GPU format within the accuracy limit ({v['size_mb']:.0f} MB, exact match {v['quality']['exact_match']['value']:.1%}). There was no GPU here: its speed on one was not measured.{doubt}{after}"
