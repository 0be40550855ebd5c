"""What was found out about each variant, gathered from the manifests of its model and of its measurements."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.benchmark import pooled
from tasks.core.manifests import MANIFEST
from tasks.paired import correct_rows, paired_difference
from tasks.variants import MIXED, REFERENCE, Variant

if TYPE_CHECKING:
    from tasks.decide import DecideConfig

OF_OUR_MACHINE = ("load_s", "ttft_ms", "prefill_tok_s", "decode_tok_s", "rss_mb", "pss_mb", "vram_mb", "energy_j_per_request")
AGAINST_REFERENCE = ("speedup_vs_fp16", "speedup_vs_fp16_batched", "batched_vs_fp16_alone",
                     "ram_reduction_vs_fp16", "private_reduction_vs_fp16", "vram_reduction_vs_fp16")  # fmt: skip
ELSEWHERE = "the model runs on its provider's machines"
GPU_FORMATS = ("gptq", "awq")
AGREES = 0.05  # how far our speeds may be from llama-bench's on the same file
REPEATABLE = 0.1  # spread of a figure over runs from which a note says so


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def describe(variant: Variant, config: DecideConfig, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """A variant of the report, from the manifests that `decide` has as inputs; without what comparing it with others adds."""
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
    runs = [(_manifest(folder), folder) for folder in _runs("benchmark", variant, inputs)]
    performance = pooled([(run["metrics"], folder) for run, folder in runs])
    weights = [entry["size"] for name, entry in model["files"].items() if name.endswith((".gguf", ".safetensors"))]
    hard = quality.get("hard", {})
    notes = []
    if variant.role == "base":
        examples = f" and {variant.few_shot} examples" if variant.few_shot else ", without examples"
        notes.append(f"asked with long instructions{examples}, since it was not fine-tuned")
        if (dtype := performance["dtype"]) != "bfloat16":
            notes.append(f"computed in {dtype}, which is quickest here")
    elif (dtype := quality.get("dtype")) != performance["dtype"]:
        notes.append(f"its accuracy is that of {dtype}, which is quicker here, its speed that of {performance['dtype']}")
    if performance["device"] == "cpu" and variant.format in GPU_FORMATS:
        notes.append(f"{variant.format.upper()} is made for GPUs; here it ran on the CPU, so its speed says nothing about a GPU")
    if performance["spread"] and (spread := max(performance["spread"].values())) > REPEATABLE:
        notes.append(
            f"its {performance['runs']} runs differ by up to {spread:.0%}: the machine was not quiet, or the variant is not steady"
        )
    if len(days := sorted({run["created"][:10] for run, _ in runs})) > 1:
        notes.append(f"its {len(runs)} runs are of {days[0]} to {days[-1]}; with another benchmark.session all are measured anew")
    notes += [
        f"{name.split(':')[0]} failed: {why}"
        for name, why in config.unmeasured.items()
        if name.split(":")[1] == variant.name and not name.startswith("kernel:")
    ]
    notes += calibrated_on_little(model) + searched(variant, model)
    notes += beside_llama_bench(bench := _llama_bench(variant, performance, inputs))
    return {
        **row,
        "device": performance["device"],
        "threads": performance["threads"],
        "kernel": performance["kernel"],
        "kernel_reason": "llama.cpp has no such classes" if variant.runtime == "llama_cpp" else None,
        "size_mb": sum(weights) / 1e6,
        "sha256": model["digest"],
        "key": model["key"],
        "tensor_types": model["metrics"].get("tensor_types"),
        "bits": _bits(variant, model, sum(weights), inputs),
        "quality": {**quality["test"], "hard_exact_match": hard.get("exact_match"), "hard": hard},
        **_fidelity(variant, config, inputs),
        "constrained": _constrained(variant, inputs),
        "performance": {name: value for name, value in performance.items() if name not in ("device", "threads", "kernel", "dtype")}
        | {"mapped": _mapped(variant, inputs), "llama_bench": bench}
        | ({} if variant.format == "gguf" else dict.fromkeys(("mapped_reason", "llama_bench_reason"), "of GGUF files only"))
        | {"kernels": _kernels(variant, config, inputs)}
        | _missing(performance)
        | _price(performance, config),
        "notes": notes,
    }


def _bits(variant: Variant, model: dict[str, Any], size: int, inputs: Mapping[str, Path]) -> float | None:
    """True bits per weight: what GPTQ and AWQ keep in 16 bits, and their scales, count too."""
    if variant.format not in GPU_FORMATS or f"model:{REFERENCE}" not in inputs:
        return model["metrics"].get("bits_per_weight", variant.bits)
    whole = sum(entry["size"] for name, entry in _manifest(inputs[f"model:{REFERENCE}"])["files"].items() if name.endswith(".safetensors"))
    return 16 * size / whole


def calibrated_on_little(model: Mapping[str, Any]) -> list[str]:
    """GPTQ inverts products of a layer's inputs: with fewer tokens than inputs, only its damping makes that possible. AWQ does not."""
    made = model["metrics"]
    if (rows := made.get("calibration_rows")) and rows < (wanted := model["config"]["calibration_rows"]):
        few = [f"calibrated on {rows:,} rows, all there are, where {wanted:,} were wanted: raise data.train_rows"]
    else:
        few = []
    tokens, inputs = made.get("calibration_tokens"), made.get("widest_layer")
    if tokens is None or inputs is None or tokens >= inputs:
        return few
    more = "data.train_rows" if few else "calibration_rows"
    return [
        f"calibrated on {tokens:,} tokens, fewer than the {inputs:,} inputs of its widest layer, which leaves its rounding to chance: raise {more}"
    ]


def searched(variant: Variant, model: dict[str, Any]) -> list[str]:
    """What the search for mixed precision could not do."""
    if variant.name != MIXED:
        return []
    found, notes = model["metrics"], []
    limit = found["max_kld"]
    if not found["trials"]:  # everything in the fewest bits keeps to the limit
        return []
    if found["fine_mean_kld"] >= limit:
        notes.append(
            f"8 bits alone diverge by {found['fine_mean_kld']:.4f} nats, all that gguf_search.max_kld = {limit:g} allows: raise it"
        )
    elif found["trials_measured"] < found["trials"]:
        notes.append(
            f"the search had time for {found['trials_measured']} of {found['trials']} trials, and parts not tried keep 8 bits: raise gguf_search.seconds"
        )
    if found["mixtures_tried"] and not found["mixture_kept_to_limit"]:
        notes.append(
            f"none of {found['mixtures_tried']} mixtures diverged less than gguf_search.max_kld = {limit:g}; at most one part has fewer bits: raise it, or gguf_search.seconds"
        )
    return notes


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


def beside_llama_bench(found: Mapping[str, Any] | None) -> list[str]:
    """Where our figures and llama-bench's are further apart than two measurements of one thing should be."""
    ratios = {what: found[f"{what}_ratio"] for what in ("prefill", "decode")} if found else {}
    return [
        f"tokens/s of {what} are {abs(ratio - 1):.1%} {'above' if ratio > 1 else 'below'} llama-bench's on the same file; up to {AGREES:.0%} would be expected"
        for what, ratio in ratios.items()
        if abs(ratio - 1) > AGREES
    ]


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
    at_a_time = f"{asked['parallel']} requests at a time" if asked["parallel"] else asked["parallel_reason"]
    notes = [f"asked with long instructions and {examples}, {at_a_time}; a latency includes the network."]
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
        **{f"{name}_reason": ELSEWHERE for name in ("size_mb", "bits", "threads", "sha256", *AGAINST_REFERENCE)},
        "key": evaluation["key"],
        "quality": {**metrics["test"], "hard_exact_match": metrics.get("hard", {}).get("exact_match"), "hard": metrics.get("hard", {})},
        "fidelity": None,
        "fidelity_reason": "another model: nothing of ours was quantized into it",
        "performance": {name: value for name, value in asked.items() if name != "device"} | hidden | priced,
        "notes": notes,
    }


def _price(performance: Mapping[str, Any], config: DecideConfig) -> dict[str, Any]:
    """What 1,000 requests cost on a machine that is busy with them all the time, so many at once as `decide` is to choose for."""
    if config.machine_usd_per_hour is None:
        return {
            "usd_per_1k_requests": None,
            "usd_per_1k_requests_reason": "decide.machine_usd_per_hour, what the machine costs, is not set",
        }
    load = config.at_a_time or performance["parallel"]
    if (each_second := performance["requests_s_by_load"].get(str(load))) is None:  # the base model is asked fewer
        return {"usd_per_1k_requests": None, "usd_per_1k_requests_reason": f"not measured with {load} requests at a time"}
    return {"usd_per_1k_requests": config.machine_usd_per_hour / 3600 * 1000 / each_second}
