"""Pareto front, recommendation and paired comparison."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.decide import DecideConfig, _compare, beside_ready_made, best_ready_made
from tasks.paired import paired_difference
from tasks.paper import compare_with_paper
from tasks.recommend import pareto_front, recommend
from tasks.report import not_run
from tasks.variant_figures import _price, beside_llama_bench, calibrated_on_little, searched
from tasks.variants import MIXED, Variant

pytestmark = pytest.mark.fast


def at_loads(found: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The figures of speed that a choice looks at: requests/s, and the 95th percentile of latency, for each number of requests under way."""
    return {
        "requests_s": found["1"][0],
        "requests_s_by_load": {load: speed for load, (speed, _) in found.items()},
        "latency_ms_by_load": {load: {"p95": p95} for load, (_, p95) in found.items()},
    }


def variant(
    name: str, exact: float, speed: float, rss: float, role: str = "candidate", runtime: str = "llama_cpp", size: float = 100.0
) -> dict[str, Any]:
    return {
        "name": name, "role": role, "format": name.split("-")[0], "runtime": runtime, "device": "cpu", "bits": 4.5, "size_mb": size, "kernel": "Linear",
        "fidelity": {"verdict": "ok"},
        "quality": {"exact_match": {"value": exact}},
        "performance": {"rss_mb": rss, "peak_rss_mb": rss, **at_loads({"1": (speed, 1000 / speed)})},
        "speedup_vs_fp16": speed, "speedup_vs_fp16_batched": speed, "batched_vs_fp16_alone": 2 * speed,
        "ram_reduction_vs_fp16": 1 - rss / 700, "private_reduction_vs_fp16": 1 - rss / 600,
    }  # fmt: skip


VARIANTS = [
    variant("base-bf16", 0.0, 99.0, 1.0, role="base", runtime="transformers"),
    variant("tuned-fp16", 0.96, 1.0, 700, role="reference", runtime="transformers", size=270),
    variant("gptq-4bit", 0.955, 1.5, 600, runtime="transformers", size=120),
    variant("gguf-Q8_0", 0.96, 4.0, 300, size=145),
    variant("gguf-Q4_K_M", 0.952, 5.0, 220, size=105),
    variant("gguf-Q4_0", 0.90, 6.0, 200, size=92),
    {**variant("gguf-Q2_K", 0.9, 9.0, 100), "quality": None, "performance": None, "error": "failed"},
]


def test_pareto_front_leaves_out_what_is_beaten_in_everything() -> None:
    assert pareto_front(VARIANTS) == ["gguf-Q8_0", "gguf-Q4_K_M", "gguf-Q4_0"]


def test_recommendation_is_the_fastest_within_the_accuracy_limit() -> None:
    choice = recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01))
    assert (choice["cpu"], choice["gpu"]) == ("gguf-Q4_K_M", "gptq-4bit")
    assert "not measured" in choice["why"]
    assert (choice["runner_up"], choice["gpu_runner_up"]) == ("gguf-Q8_0", "tuned-fp16") and "Runner-up: gguf-Q8_0" in choice["why"]
    assert choice["excluded"] == {"gguf-Q4_0": "loses 6.0 percentage points of exact match; at most 1 are allowed"}
    by_itself = recommend(VARIANTS, DecideConfig())  # allows half a point, which 0.96 - 0.955 is, and a little more in floats
    assert (by_itself["cpu"], by_itself["gpu"]) == ("gguf-Q8_0", "gptq-4bit")


@pytest.mark.parametrize("fidelity", [{"verdict": "degraded"}, None])
def test_what_could_not_be_promoted_is_recommended_only_where_nothing_else_is_within_the_limits(fidelity: dict[str, str] | None) -> None:
    doubtful = [v | {"fidelity": fidelity} if v["name"] == "gguf-Q4_K_M" else v for v in VARIANTS]
    limits = DecideConfig(max_accuracy_loss=0.01)
    choice = recommend(doubtful, limits)
    assert choice["cpu"] == "gguf-Q8_0" and "has the verdict ok (gguf-Q4_K_M would be faster)" in choice["why"]
    alone = recommend([v for v in doubtful if v["name"] != "gguf-Q8_0" and v["format"] != "gptq"], limits)
    assert (
        alone["cpu"] == "gguf-Q4_K_M"
        and f"it is {fidelity['verdict'] if fidelity else 'unchecked'}, and will not be promoted" in alone["why"]
    )


@pytest.mark.parametrize("fidelity", [{"verdict": "degraded"}, None])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_for_a_gpu_too_a_sound_variant_comes_before_one_that_is_smaller_or_faster(fidelity: dict[str, str] | None, device: str) -> None:
    doubtful = variant("gptq-3bit", 0.955, 2.0, 600, runtime="transformers", size=101) | {"fidelity": fidelity}
    choice = recommend([v | {"device": device} for v in (*VARIANTS, doubtful)], DecideConfig(max_accuracy_loss=0.01))
    assert (choice["gpu"], choice["gpu_runner_up"]) == ("gptq-4bit", "tuned-fp16")


def test_a_gpu_format_that_was_measured_on_the_cpu_need_not_keep_to_limits_there() -> None:
    choice = recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01, max_rss_mb=250, max_latency_p95_ms=500))
    assert (choice["cpu"], choice["gpu"]) == ("gguf-Q4_K_M", "gptq-4bit") and "and keeps to the other limits" in choice["why"]
    assert "MB; at most 250" in choice["excluded"]["gptq-4bit"]  # for a CPU
    assert recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01, max_size_mb=110))["gpu"] is None


def test_on_a_gpu_its_memory_is_limited_and_not_its_hosts() -> None:
    on_gpu = [
        v | {"device": "cuda", "performance": v["performance"] | {"rss_mb": 2900.0, "vram_mb": memory}}
        for v, memory in ((VARIANTS[1], 900.0), (VARIANTS[2], 400.0))
    ]
    limits = {"max_accuracy_loss": 0.01, "max_rss_mb": 350}
    assert recommend([*on_gpu, VARIANTS[3]], DecideConfig(**limits))["gpu"] == "gptq-4bit"
    less = recommend([*on_gpu, VARIANTS[3]], DecideConfig(**limits, max_vram_mb=300))
    assert less["gpu"] is None and less["cpu"] == "gguf-Q8_0"
    assert less["excluded"]["gptq-4bit"] == "its GPU memory is 400 MB; at most 300 are allowed"
    unknown = [v | {"performance": v["performance"] | {"vram_mb": None}} for v in on_gpu]
    assert "GPU memory is not known" in recommend([*unknown, VARIANTS[3]], DecideConfig(**limits, max_vram_mb=300))["excluded"]["gptq-4bit"]


def test_on_a_gpu_the_front_is_of_its_own_memory() -> None:
    """Equal memory of the host, and less accuracy and speed: the quantized model is on the front for what it takes of the GPU."""
    host = {"device": "cuda"}
    whole, less = (
        v | host | {"performance": v["performance"] | {"rss_mb": 2900.0, "vram_mb": memory, **at_loads({"1": (9.0, 111.0)})}}
        for v, memory in ((VARIANTS[1], 900.0), (VARIANTS[2], 400.0))
    )
    assert pareto_front([whole, less]) == ["tuned-fp16", "gptq-4bit"]
    assert pareto_front([whole, less | {"device": "cpu"}, whole | {"name": "again", "performance": whole["performance"] | {"vram_mb": 950.0}}]) == [
        "tuned-fp16", "gptq-4bit"]  # fmt: skip


def test_what_ran_elsewhere_than_the_16_bit_model_is_not_compared_with_its_speed() -> None:
    on_gpu = VARIANTS[1] | {
        "device": "cuda",
        "performance": VARIANTS[1]["performance"] | {"rss_mb": 2900.0, **at_loads({"1": (40.0, 25.0)})},
    }
    apart = [on_gpu, *(v | dict.fromkeys(("speedup_vs_fp16", "ram_reduction_vs_fp16")) for v in VARIANTS[3:] if v["quality"])]
    choice = recommend(apart, DecideConfig(max_accuracy_loss=0.01))
    assert choice["cpu"] == "gguf-Q4_K_M" and "times as many" not in choice["why"] and choice["gpu"] == "tuned-fp16"
    assert {"tuned-fp16", "gguf-Q4_K_M"} <= set(pareto_front(apart))  # neither says anything of the other
    claims = {claim["claim"]: claim["ours"] for claim in compare_with_paper(apart, [])}
    assert claims["GGUF on a CPU against FP16: speed"] is None and claims["Best GGUF by speed"] == "Q4_0"


def test_more_memory_is_called_more() -> None:
    assert "with 14% more memory" in recommend([VARIANTS[1], variant("gguf-Q8_0", 0.96, 4.0, 800)], DecideConfig())["why"]


def test_the_paper_is_compared_with_the_gptq_format_and_the_size_of_model_that_it_names() -> None:
    ours = [
        variant("tuned-fp16", 0.96, 1.0, 700, role="reference", size=2470),
        variant("gptq-8bit", 0.96, 2.0, 600),
        variant("gptq-4bit-g64", 0.95, 1.5, 600),
    ]
    claims = {claim["claim"]: claim for claim in compare_with_paper(ours, [])}
    assert claims["GPTQ 4-bit against FP16: speed"]["ours"] == "1.50x (on the CPU)"
    exact = claims["Exact match, fine-tuned model"]
    assert exact["ours"] == "96.0% (1235M parameters)" and "smaller" not in exact["note"]


def test_what_is_significantly_less_accurate_is_not_recommended_however_little_it_loses() -> None:
    def compared(name: str, p: float) -> dict[str, Any]:
        found = next(v for v in VARIANTS if v["name"] == name)
        return {**found, "quality": {**found["quality"], "vs_reference": {"delta": -0.004, "mcnemar_p": p}}}

    def choice(p: float) -> dict[str, Any]:
        return recommend([*VARIANTS[:2], compared("gguf-Q4_K_M", p), compared("gguf-Q8_0", 0.5)], DecideConfig(max_accuracy_loss=0.01))

    assert choice(0.2)["cpu"] == "gguf-Q4_K_M" and choice(0.01)["cpu"] == "gguf-Q8_0"
    assert choice(0.01)["excluded"]["gguf-Q4_K_M"] == "is significantly less accurate (McNemar p 0.010)"


def test_a_limit_of_cost_needs_the_price_of_the_machine() -> None:
    with pytest.raises(ValueError, match="needs machine_usd_per_hour"):
        DecideConfig(max_usd_per_1k_requests=1)
    priced = [
        {**v, "performance": v["performance"] and {**v["performance"], "usd_per_1k_requests": 0.1 / v["performance"]["requests_s"]}}
        for v in VARIANTS
    ]
    limits = DecideConfig(max_accuracy_loss=0.01, max_usd_per_1k_requests=0.021, machine_usd_per_hour=0.36)
    assert recommend(priced, limits)["cpu"] == "gguf-Q4_K_M"
    assert recommend(priced, limits)["excluded"]["gguf-Q8_0"] == "its price of 1,000 requests is 0.025 USD; at most 0.021 are allowed"


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"max_accuracy_loss": 0.1}, "gguf-Q4_0"),
        ({"max_accuracy_loss": 0.0}, "gguf-Q8_0"),
        ({"max_rss_mb": 150}, None),
        ({"max_size_mb": 110}, "gguf-Q4_K_M"),
        ({"max_latency_p95_ms": 1}, None),
    ],
)
def test_limits_decide(limits: dict[str, float], wanted: str | None) -> None:
    assert recommend(VARIANTS, DecideConfig.model_validate({"max_accuracy_loss": 0.01} | limits))["cpu"] == wanted


def test_memory_is_limited_at_its_peak() -> None:
    high = VARIANTS[4] | {"performance": VARIANTS[4]["performance"] | {"peak_rss_mb": 400.0}}
    assert recommend([*VARIANTS[:4], high], DecideConfig(max_accuracy_loss=0.01, max_rss_mb=350))["cpu"] == "gguf-Q8_0"


def at_16(name: str, requests_s: float, p95: float) -> dict[str, Any]:
    """One of VARIANTS, measured with 16 requests under way too."""
    found = next(v for v in VARIANTS if v["name"] == name)
    alone = found["performance"]["requests_s"]
    return found | {"performance": found["performance"] | at_loads({"1": (alone, 1000 / alone), "16": (requests_s, p95)})}


def test_the_number_of_requests_under_way_decides_whose_speed_and_latency_count() -> None:
    loaded = [at_16("tuned-fp16", 4.0, 4000.0), at_16("gguf-Q8_0", 24.0, 700.0), at_16("gguf-Q4_K_M", 20.0, 600.0)]
    limits = DecideConfig(max_accuracy_loss=0.01, at_a_time=16)
    choice = recommend(loaded, limits)
    assert pareto_front(loaded, 16) == ["gguf-Q8_0", "gguf-Q4_K_M"]
    assert choice["cpu"] == "gguf-Q8_0" and recommend(loaded, DecideConfig(max_accuracy_loss=0.01))["cpu"] == "gguf-Q4_K_M"
    assert "answers 24.0 requests/s with 16 requests under way, 6.0 times as many" in choice["why"]
    assert "Runner-up: gguf-Q4_K_M with 20.0 requests/s" in choice["why"]
    choice = recommend(loaded, limits.model_copy(update={"max_latency_p95_ms": 650}))
    assert choice["cpu"] == "gguf-Q4_K_M"
    assert choice["excluded"]["gguf-Q8_0"] == "its 95th percentile of latency with 16 requests under way is 700 ms; at most 650 are allowed"


@pytest.mark.parametrize(("at_a_time", "wanted"), [(None, 0.005), (1, 0.01), (4, 0.0025)])
def test_a_price_is_that_of_as_many_requests_under_way(at_a_time: int | None, wanted: float) -> None:
    performance = {"parallel": 16, "requests_s_by_load": {"1": 10.0, "4": 40.0, "16": 20.0}}
    config = DecideConfig(machine_usd_per_hour=0.36, at_a_time=at_a_time)
    assert _price(performance, config)["usd_per_1k_requests"] == pytest.approx(wanted)
    fewer = _price(performance | {"requests_s_by_load": {"12": 2.0}}, config.model_copy(update={"at_a_time": 16}))
    assert fewer == {"usd_per_1k_requests": None, "usd_per_1k_requests_reason": "not measured with 16 requests at a time"}


def test_without_a_reference_nothing_is_recommended() -> None:
    choice = recommend([v for v in VARIANTS if v["role"] != "reference"], DecideConfig())
    assert choice["cpu"] is None and "reference" in choice["why"]
    assert choice["cpu_reason"] == choice["gpu_reason"] == "the 16-bit model could not be measured"


def test_why_nothing_is_recommended_is_told_apart() -> None:
    none_fits = recommend(VARIANTS, DecideConfig(max_size_mb=1))
    assert none_fits["cpu_reason"] == none_fits["gpu_reason"] == "none kept to the limits"
    alone = recommend([VARIANTS[1]], DecideConfig())
    assert alone["cpu_reason"] == "none was measured" and alone["gpu"] == "tuned-fp16" and alone["gpu_reason"] is None


def test_paper_claims_that_were_not_measured_are_null() -> None:
    claims = {claim["claim"]: claim for claim in compare_with_paper([v for v in VARIANTS[1:] if v["quality"]], [])}
    unmeasured = claims["GPTQ 4-bit against FP16: GPU memory"]
    assert unmeasured["ours"] is None and unmeasured["ours_reason"] == "no such variants were measured here"
    assert claims["Exact match, GPT-4.1"]["ours"] is None and "was not asked" in claims["Exact match, GPT-4.1"]["ours_reason"]
    assert claims["Best GGUF by speed"]["ours"] == "Q4_0"


def test_beside_the_paper_stands_the_speed_of_what_is_recommended_not_of_what_is_only_fast() -> None:
    ours = [v for v in VARIANTS[1:] if v["quality"]]
    claims = {claim["claim"]: claim["ours"] for claim in compare_with_paper(ours, [], "gguf-Q4_K_M")}
    assert claims["GGUF on a CPU against FP16: speed"] == (
        "5.0x one at a time, 5.0x both batched, 10.0x batched against FP16 one at a time (gguf-Q4_K_M)"
    )
    assert claims["GGUF on a CPU against FP16: memory"] == "69% less resident memory, 63% less private (gguf-Q4_K_M)"


def test_without_a_reference_no_claim_of_the_paper_is_compared_with_a_speed_up() -> None:
    alone = [v | dict.fromkeys(("speedup_vs_fp16", "ram_reduction_vs_fp16")) for v in VARIANTS[2:] if v["quality"]]
    claims = {claim["claim"]: claim["ours"] for claim in compare_with_paper(alone, [])}
    assert claims["GGUF on a CPU against FP16: speed"] is None and claims["GGUF on a CPU against FP16: memory"] is None
    assert claims["GPTQ 4-bit against FP16: speed"] is None and claims["Best GGUF by speed"] == "Q4_0"


def test_a_model_behind_an_api_is_neither_recommended_nor_on_the_front_but_beside_the_paper() -> None:
    best = {**variant("api-gpt-4.1", 1.0, 99.0, 1.0, role="api", runtime="litellm", size=1.0), "model": "azure/gpt-4.1", "few_shot": 0}
    shown = {**best, "name": "api-gpt-4.1-12-shot", "few_shot": 12}
    other = {**best, "name": "api-else", "model": "openai/gpt-4.1-mini"}
    variants = [*VARIANTS, best, shown, other]
    assert recommend(variants, DecideConfig()) == recommend(VARIANTS, DecideConfig())
    assert pareto_front(variants) == pareto_front(VARIANTS)
    claim = compare_with_paper([], variants[-3:])[1]
    assert (claim["paper"], claim["ours"]) == ("99%", "100.0% with no examples, 100.0% with 12 examples")


def test_speeds_that_llama_bench_does_not_confirm_are_noted() -> None:
    (note,) = beside_llama_bench({"prefill_ratio": 0.937, "decode_ratio": 1.049})
    assert note.startswith("tokens/s of prefill are 6.3% below llama-bench's")
    assert beside_llama_bench(None) == []


def test_calibration_on_fewer_tokens_than_a_layer_has_inputs_is_noted() -> None:
    model = {"metrics": {"calibration_tokens": 430, "widest_layer": 1536, "calibration_rows": 16}, "config": {"calibration_rows": 16}}
    (note,) = calibrated_on_little(model)
    assert note.startswith("calibrated on 430 tokens, fewer than the 1,536 inputs") and note.endswith("raise calibration_rows")
    (few,) = calibrated_on_little(model | {"config": {"calibration_rows": 64}})
    assert few.endswith("raise data.train_rows")
    awq = {"metrics": {"calibration_rows": 24}, "config": {"calibration_rows": 256}}
    assert calibrated_on_little(awq) == ["calibrated on 24 rows, all there are, where 256 were wanted: raise data.train_rows"]
    assert (
        calibrated_on_little({"metrics": {"calibration_tokens": 1536, "widest_layer": 1536}}) == calibrated_on_little({"metrics": {}}) == []
    )


def test_the_search_for_mixed_precision_says_what_it_could_not_do_and_what_it_brought() -> None:
    mixed = Variant(name=MIXED, format="gguf", bits=None, runtime="llama_cpp", role="candidate")
    found = {
        "trials": 60,
        "trials_measured": 60,
        "fine_mean_kld": 0.0003,
        "mixtures_tried": 3,
        "mixture_kept_to_limit": True,
        "max_kld": 0.004,
    }
    (none,) = searched(mixed, {"metrics": found | {"mixture_kept_to_limit": False}})
    assert none.startswith("none of 3 mixtures diverged less than gguf_search.max_kld = 0.004")
    assert searched(mixed, {"metrics": found}) == []
    smallest = {"trials": 0, "trials_measured": 0, "mixtures_tried": 1, "mixture_kept_to_limit": True, "max_kld": 0.012}
    assert searched(mixed, {"metrics": smallest}) == []
    (short,) = searched(mixed, {"metrics": found | {"trials_measured": 7}})
    (coarse,) = searched(mixed, {"metrics": found | {"trials_measured": 0, "fine_mean_kld": 0.003, "max_kld": 0.001}})
    assert "time for 7 of 60 trials" in short and "raise gguf_search.seconds" in short
    assert "0.0030 nats, all that gguf_search.max_kld = 0.001 allows" in coarse


def test_what_was_searched_is_compared_with_the_file_that_would_be_chosen_without_it() -> None:
    config = DecideConfig(max_accuracy_loss=0.01)
    mixed = variant(MIXED, 0.96, 5.2, 190, size=84)
    doubtful = {**variant("gguf-Q2_K", 0.96, 9.0, 100, size=60), "fidelity": {"verdict": "degraded"}}
    best = best_ready_made([*VARIANTS, doubtful, mixed], config)
    assert (
        best and best[0]["name"] == best[1]["name"] == "gguf-Q4_K_M"
    )  # neither the faster one that loses too much nor the one that is not sound
    assert best_ready_made(VARIANTS[:3], config) is None
    equal = {"delta": -0.001, "mcnemar_p": 0.8}
    points = "-0.1 points of its exact match (McNemar p 0.80)"
    said = (
        f"20% smaller than gguf-Q4_K_M, the smallest ready-made file within the limits, with {points}; "
        f"1.04 times the requests/s of gguf-Q4_K_M, the one to recommend among them, with {points}"
    )
    assert beside_ready_made(mixed, best, (equal, equal), "") == f"{said}: 10% smaller or faster at equal accuracy"
    assert (
        beside_ready_made(mixed, best, (equal, equal), "loses 1.2 percentage points")
        == f"{said}, but it may not be recommended: loses 1.2 percentage points"
    )
    worse = {"delta": -0.02, "mcnemar_p": 0.01}
    assert ": not 10%" in beside_ready_made(mixed, best, (equal, worse), "")  # smaller than one that is more often right
    assert ": not 10%" in beside_ready_made({**mixed, "size_mb": 100}, best, (equal, equal), "")
    small = {**variant("gguf-IQ4_NL", 0.96, 4.9, 190), "size_mb": 86}  # slower, and nearly as small as the mixture
    again = best_ready_made([*VARIANTS, small, mixed], config)
    assert again and [v["name"] for v in again] == ["gguf-Q4_K_M", "gguf-IQ4_NL"]
    assert "2% smaller than gguf-IQ4_NL" in (told := beside_ready_made(mixed, again, (equal, equal), "")) and ": not 10%" in told


def test_paired_difference_against_counted_values() -> None:
    # 10 rows won, 2 lost of 100: McNemar's exact p is twice the binomial tail P(X <= 2; 12, 1/2) = 2 * 79 / 4096
    mine = [True] * 10 + [False] * 2 + [True] * 88
    theirs = [False] * 10 + [True] * 2 + [True] * 88
    result = paired_difference(mine, theirs)
    assert result["delta"] == pytest.approx(0.08)
    assert result["mcnemar_p"] == pytest.approx(2 * 79 / 4096)
    assert 0.0 < result["low"] < 0.08 < result["high"] < 0.16
    assert paired_difference([True], [True])["mcnemar_p"] == 1.0
    alike = paired_difference([True] * 300, [True] * 300)  # that no row differs says little of the rows that were not asked
    assert (alike["low"], alike["high"]) == pytest.approx((-0.0065, 0.0065), abs=1e-4)


def test_gpu_memory_holds_at_least_the_file_and_what_was_not_checked_is_said() -> None:
    choice = recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01, max_vram_mb=110))
    assert choice["gpu"] is None  # the smallest GPU format has 120 MB
    choice = recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01, max_vram_mb=130, max_latency_p95_ms=5))
    assert choice["gpu"] == "gptq-4bit" and "Not checked without one: max_vram_mb, max_latency_p95_ms." in choice["why"]
    assert "Not checked" not in recommend(VARIANTS, DecideConfig(max_accuracy_loss=0.01))["why"]


def test_speeds_of_two_machines_make_no_ratio() -> None:
    here, there = ({**v, "performance": {**v["performance"], "machine": name}} for v, name in zip(VARIANTS[1:3], ("a", "b"), strict=True))
    with pytest.raises(KeyError, match="evaluate"):  # what is right is compared behind that, and there is nothing of it here
        _compare(there, here, {})
    assert there["speedup_vs_fp16"] is None and there["speedup_vs_fp16_reason"] == (
        "the 16-bit model was measured on cpu (a), this variant on cpu (b)"
    )


def test_a_report_says_which_formats_for_gpus_were_made() -> None:
    assert not_run([{**VARIANTS[3]}]) == ["There was no GPU: neither GPU memory nor GPU speed was measured."]
    assert not_run(VARIANTS[2:4])[0].startswith("There was no GPU: GPTQ was made and evaluated on the CPU")
    assert not_run([VARIANTS[2] | {"device": "cuda"}]) == []
