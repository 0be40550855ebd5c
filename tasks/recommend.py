"""What may be recommended, and which of it is: the limits, the Pareto front, and one variant for each kind of hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.fidelity import UNUSABLE

if TYPE_CHECKING:
    from tasks.decide import DecideConfig

SIGNIFICANT = 0.05  # largest p with which a loss of accuracy is taken for one
NONE_MEASURED = "No quantized variant that can be trusted was made and measured on a CPU."
NEED_A_GPU = ("max_vram_mb", "max_latency_p95_ms", "max_usd_per_1k_requests")  # limits that a GPU variant measured on a CPU is not held to
LIMITS = ("max_accuracy_loss", "max_size_mb", "max_rss_mb", "max_vram_mb", "max_latency_p95_ms", "max_usd_per_1k_requests")


def measured(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that could be deployed and have figures: neither the model before fine-tuning nor somebody else's."""
    return [v for v in variants if v["quality"] and v["role"] not in ("base", "baseline", "api")]


def usable(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured ones whose file, weights and runtime are what they should be."""
    return [v for v in measured(variants) if not (v["fidelity"] and v["fidelity"]["verdict"] in UNUSABLE)]


def is_sound(v: dict[str, Any]) -> bool:
    """Whether its fidelity was measured and found to be `ok`, as promotion wants it; the 16-bit model is what others are measured by."""
    return v["role"] != "candidate" or bool(v["fidelity"] and v["fidelity"]["verdict"] == "ok")


def pareto_front(variants: list[dict[str, Any]], at_a_time: int | None = None) -> list[str]:
    """Variants that no other on the same device beats in accuracy, speed and memory (a GPU's own) at once, and in one of them strictly.

    With so many requests under way.
    """

    def figures(v: dict[str, Any]) -> tuple[float, float, float]:
        memory = v["performance"].get("vram_mb") if v["device"] == "cuda" else None  # the memory of its host is mostly CUDA's own
        return v["quality"]["exact_match"]["value"], requests_s(v, at_a_time), -(memory or v["performance"]["rss_mb"])

    found = usable(variants)
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
            "cpu_reason": "the 16-bit model could not be measured",
            "gpu_reason": "the 16-bit model could not be measured",
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
        "cpu_reason": None if best else "none kept to the limits" if candidates else "none was measured",
        "gpu_reason": None if gpu else "none kept to the limits",
        "runner_up": second["name"] if second else None,
        "gpu_runner_up": gpu[1]["name"] if len(gpu) > 1 else None,
        "excluded": {v["name"]: why for v in measured(variants) if v["role"] == "candidate" and (why := _excluded(v, reference, config))},
        "constraints": limits,
        "why": f"{_why_cpu(best, second, passed_over, reference, config) if candidates else NONE_MEASURED} {_why_gpu(gpu, bool(on_gpu), config)}",
    }


def requests_s(v: dict[str, Any], at_a_time: int | None) -> float:
    """How many a variant answers when so many are under way; None is one."""
    return float(v["performance"]["requests_s_by_load"][str(at_a_time or 1)])


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
    p95 = v["performance"]["latency_ms_by_load"][str(config.at_a_time or 1)]["p95"]
    limits: tuple[tuple[str, float | None, float | None, str], ...] = (
        ("size", v["size_mb"], config.max_size_mb, "MB"),
        ("GPU memory", v["performance"].get("vram_mb"), config.max_vram_mb, "MB")
        if v["device"] == "cuda"  # the memory of its host is mostly CUDA's own
        else ("memory", v["performance"]["peak_rss_mb"], config.max_rss_mb, "MB"),
        ("95th percentile of latency" + _under_way(config), p95, config.max_latency_p95_ms, "ms"),
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
