"""Stage `decide`: every variant's figures side by side, the Pareto front, and one recommendation per kind of hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.stage import StageConfig, stage
from tasks.paired import correct_rows, paired_difference
from tasks.paper import compare_with_paper
from tasks.recommend import SIGNIFICANT, is_sound, measured, pareto_front, recommend, requests_s, usable
from tasks.variant_figures import AGAINST_REFERENCE, describe
from tasks.variants import MIXED, Variant

QUIET = 0.1  # cores that others may keep busy while a variant is measured; with more the machine was not quiet
WORTH_SEARCHING = 0.1  # how much smaller or faster than a ready-made file a searched mixture is to be


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


@stage("decide", version=10, libraries=("scipy", "numpy"), isolated=False, varies="it holds what was measured")
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


def decided(store: Store, decision: Manifest) -> dict[str, Any]:
    """What the stage wrote."""
    found: dict[str, Any] = json.loads((store.fetch(decision) / "decision.json").read_text(encoding="utf-8"))
    return found


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
