"""The report's files: complete, escaped, self-contained, and honest about what was not measured."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tasks.overhead import WORDS
from tasks.rendering import json_safe, render
from tasks.reproducibility import reproducibility

EVIL = "<script>alert(1)</script>"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLOTS = ("accuracy_memory", "accuracy_speed", "latency", "divergence", "size", "languages")
LANGUAGES = {"en": 0.012, "de": 0.004, "es": 0.002, "fr": -0.003, "it": 0.001, "hr": -0.021}
INTENTS = (
    "search_product", "add_to_cart", "remove_from_cart", "update_quantity", "view_cart", "checkout", "talk_to_agent",
    "out_of_scope", "track_order", "cancel_order", "return_item", "apply_coupon",
)  # fmt: skip
# name, format, bits, size MB, exact match, hard exact match, latency p50 ms, requests/s, RSS MB
MEASURED = [
    ("base-fp16", "hf", 16, 269.1, 0.031, 0.012, 912.0, 1.09, 741.0),
    ("tuned-fp16", "hf", 16, 269.1, 0.964, 0.871, 655.0, 1.52, 742.5),
    ("gptq-4bit-g64", "gptq", 4.25, 133.8, 0.932, 0.818, 421.0, 2.36, 688.2),
    ("gguf-F16", "gguf", 16, 270.9, 0.965, 0.873, 243.0, 4.08, 402.7),
    ("gguf-Q8_0", "gguf", 8.5, 144.8, 0.963, 0.870, 198.0, 5.01, 287.3),
    ("gguf-Q6_K", "gguf", 8.2, 138.4, 0.962, 0.866, 202.0, 4.93, 281.9),
    ("gguf-Q5_K_M", "gguf", 6.6, 112.1, 0.958, 0.861, 187.0, 5.31, 252.0),
    ("gguf-Q4_K_M", "gguf", 6.2, 105.5, 0.951, 0.843, 171.0, 5.78, 243.4),
    ("gguf-Q4_0", "gguf", 5.4, 91.7, 0.897, 0.762, 132.0, 7.51, 226.8),
]


TAUGHT = {"model": "openai/gpt-4.1-mini", "prompt_version": 1, "requests": 72, "requests_from_log": 12, "tokens": 91_204, "usd": None,
          "usd_reason": "LiteLLM does not know the price", "accepted": {"patterns": 120, "products": 80, "utterances": 431},
          "rejected": {"wrong_language": 9, EVIL: 1}, "stopped": "budget teacher.max_tokens = 90000"}  # fmt: skip


def interval(value: float, n: int) -> dict[str, float]:
    half = 1.96 * (max(value * (1 - value), 0.004) / n) ** 0.5
    return {"value": value, "low": max(value - half, 0.0), "high": min(value + half, 1.0), "n": n}


def percentiles(p50: float) -> dict[str, float]:
    return {"p50": p50, "p95": 1.31 * p50, "p99": 1.62 * p50}


def variant(name: str, kind: str, bits: float, size: float, exact: float, hard: float, p50: float, rate: float,
            rss: float) -> dict[str, Any]:  # fmt: skip
    role = {"base-fp16": "base", "tuned-fp16": "reference"}.get(name, "candidate")
    return {
        "name": name, "role": role, "format": kind, "bits": bits, "size_mb": size, "sha256": "ab" * 32,
        "runtime": {"hf": "transformers", "gptq": "gptqmodel"}.get(kind, "llama_cpp"), "device": "cpu", "threads": 2,
        "quality": {
            "exact_match": interval(exact, 900), "hard_exact_match": interval(hard, 450),
            "intent_accuracy": min(exact + 0.02, 1.0), "json_valid": 0.999 if exact > 0.5 else 0.412,
            "slot_f1": {"product": exact - 0.01, "quantity": min(exact + 0.02, 1.0), "order_id": exact},
            "by_language": {k: min(max(exact + shift, 0.0), 1.0) for k, shift in LANGUAGES.items()},
            "by_intent": {k: min(exact + 0.003 * i, 1.0) for i, k in enumerate(INTENTS)},
            "vs_reference": {"delta": exact - 0.964, "low": exact - 0.975, "high": exact - 0.953, "mcnemar_p": 0.0312},
        },
        "fidelity": None if role != "candidate" else {
            "mean_kld": 0.0041, "p99_kld": 0.083, "top1_agreement": 0.991, "weight_rel_error": None,
            "delta_retained": 0.93, "prompt_ids_match": True, "verdict": "degraded" if exact < 0.94 else "ok",
        },
        "fidelity_reason": None if role == "candidate" else "not made by quantizing the tuned model",
        "performance": {
            "load_s": size / 210, "ttft_ms": percentiles(p50 / 3), "latency_ms": percentiles(p50),
            "prefill_tok_s": 92_000 / p50, "decode_tok_s": 24_000 / p50, "requests_s": rate,
            "requests_s_batched": None if kind == "gptq" else 2.3 * rate,
            "requests_s_batched_reason": "the GPTQ kernel on this CPU has no batching" if kind == "gptq" else None,
            "rss_mb": rss, "pss_mb": rss - 12, "vram_mb": None, "vram_mb_reason": "no GPU",
            "energy_j_per_request": None, "energy_j_per_request_reason": "no energy counter on this machine",
            "energy_source": None, "usd_per_1k_requests": None,
        },
        "speedup_vs_fp16": rate / 1.52, "ram_reduction_vs_fp16": 1 - rss / 742.5,
        "notes": ["Most tensors fell back to Q5_0 (576 is no multiple of 256)."] if name == "gguf-Q4_K_M" else [],
    }  # fmt: skip


def sample_report() -> dict[str, Any]:
    """A whole report as a quick run would give it: nine measured variants and one that failed."""
    failed = {"name": "gguf-Q4_1", "role": "candidate", "format": "gguf", "bits": 4.5, "size_mb": 98.2,
              "error": "llama_decode returned -1: KV slot not found", "quality": None, "performance": None}  # fmt: skip
    stages = ("synthesize", "finetune", "merge", "quantize_gptq", "quantize_gguf", "evaluate", "benchmark", "decide")
    return {
        "run_id": "2026-11-23-quick-7f3a", "profile": "quick", "git": {"commit": "0a1b2c3d4e5f60718293", "dirty": True},
        "started": "2026-11-23T21:24:03Z", "finished": "2026-11-23T21:58:41Z", "wall_s": 2078.4,
        "environment": {"cpu": "AMD EPYC 9R14", "cores": 2, "ram_gb": 15.5, "gpu": None,
                        "gpu_reason": "no NVIDIA driver was found", "python": "3.11.7",
                        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "gptqmodel": "7.6.0",
                                     "llama-cpp-python": "0.3.36", "prefect": "3.8.8", "mlflow": "3.17.2"}},
        "stages": [{"name": name, "key": f"{i}f" * 32, "state": "cached" if i < 2 else "computed", "wall_s": 7.4 * i**3,
                    "pool": "local"} for i, name in enumerate(stages)],
        "dataset": {"sha256": "cd" * 32, "counts": {"train": 3000, "validation": 300, "test": 900, "hard": 450},
                    "languages": dict.fromkeys(LANGUAGES, 775), "intents": dict.fromkeys(INTENTS, 387),
                    "duplicates_removed": 118, "rejected": {"slot not in text": 7, EVIL: 1}, "teacher": TAUGHT},
        "training": {"base_model": "SmolLM2-135M-Instruct", "examples": 3000, "epochs": 2, "tokens": 412_880,
                     "tokens_per_s": 296.4, "wall_s": 1393.0, "peak_rss_mb": 2811.0, "trainable_params": 4_884_480,
                     "final_loss": 0.0437},
        "variants": [*(variant(*row) for row in MEASURED), failed],
        "pareto": ["gguf-F16", "gguf-Q8_0", "gguf-Q5_K_M", "gguf-Q4_K_M", "gguf-Q4_0"],
        "recommendation": {"cpu": "gguf-Q5_K_M", "gpu": None, "gpu_reason": "no variant was measured on a GPU",
                           "constraints": {"max_loss_points": 1.0, "max_rss_mb": 512, "max_size_mb": None},
                           "why": "It is the fastest variant that loses less than 1 point to the 16-bit reference."},
        "gate": {"verdict": "promote", "champion": "v3 (gguf-Q8_0)", "challenger": "gguf-Q5_K_M", "delta": 0.021,
                 "low": 0.008, "margin": 0.01, "checks": [{"name": "JSON valid at least 99%", "passed": True},
                                                          {"name": "no language loses over 3 points", "passed": None}]},
        "paper": [
            {"claim": "Exact match, fine-tuned 1B model", "paper": "99% (arXiv), 98.8% (journal)", "ours": "96.4%",
             "comparable": False, "note": "Other data, prompt and base model (135M)."},
            {"claim": "GPTQ 4-bit on a T4", "paper": "VRAM -41%, 82% slower", "ours": None,
             "ours_reason": "no NVIDIA T4 here", "comparable": False, "note": "Needs a GPU."},
            {"claim": "Best GGUF by accuracy / by speed", "paper": "Q5_K_M / Q4_K_M", "ours": "F16 / Q4_0",
             "comparable": True, "note": f"Product {EVIL} | column"},
        ],
        "a_key_of_the_future": {"x": [1, 2]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    render(sample_report(), folder)
    return folder


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


def squeezed(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


class Loads(HTMLParser):
    """Collects what a page makes the browser fetch by itself; links that a reader may follow are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data", "poster", "srcset", "action"} and tag != "a":
                self.found.append(value or "")


def test_writes_every_file(rendered: Path) -> None:
    expected = {"report.json", "report.html", "report.md", *(f"{name}.png" for name in PLOTS)}
    assert {path.name for path in rendered.iterdir()} == expected
    for name in PLOTS:
        assert (rendered / f"{name}.png").read_bytes().startswith(PNG_SIGNATURE)


def test_json_holds_the_whole_report(rendered: Path) -> None:
    text = read(rendered, "report.json")
    assert json.loads(text) == json_safe(sample_report())
    assert json.loads(text)["training"] == sample_report()["training"]


def test_nan_becomes_null_with_a_reason(tmp_path: Path) -> None:
    report = sample_report()
    report["variants"][2]["performance"]["rss_mb"] = float("nan")
    report["variants"][3]["quality"]["exact_match"]["value"] = float("inf")
    report["training"]["final_loss"] = float("nan")
    render(report, tmp_path)
    loaded = json.loads(read(tmp_path, "report.json"), parse_constant=pytest.fail)
    assert loaded["training"]["final_loss"] is None
    assert loaded["training"]["final_loss_reason"]
    for name in ("report.html", "report.md"):
        assert not re.search(r"\b(nan|inf)\b", squeezed(read(tmp_path, name)), re.IGNORECASE)


def test_labels_cannot_become_markup(tmp_path: Path) -> None:
    report = sample_report()
    report["variants"][0]["name"] = EVIL
    report["variants"][1]["name"] = "costs $5 or $_{x"
    report["variants"][6]["name"] = report["recommendation"]["cpu"] = f"{EVIL}|b"
    report["variants"][9]["error"] = EVIL
    report["variants"][4]["quality"]["by_language"][EVIL] = 0.5
    report["recommendation"]["why"] = EVIL
    render(report, tmp_path)
    html, markdown = read(tmp_path, "report.html"), read(tmp_path, "report.md")
    assert "<script>alert" not in html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>" not in markdown
    assert "&lt;/script&gt;\\|b" in markdown


def test_missing_figures_are_named_with_their_reason(rendered: Path) -> None:
    for name in ("report.html", "report.md"):
        text = read(rendered, name)
        assert "not measured" in text
        assert "the GPTQ kernel on this CPU has no batching" in text
        assert "no variant was measured on a GPU" in text
        assert "no energy counter on this machine" in text
    row = next(line for line in read(rendered, "report.md").splitlines() if line.startswith("| GPTQ 4-bit on a T4"))
    assert "not measured" in row


def test_energy_that_was_estimated_is_called_so_wherever_it_is_shown_and_measured_energy_is_not(tmp_path: Path) -> None:
    estimated, counted = "estimate (CodeCarbon 9: 8 W for all 2 CPUs of X, by CPU time)", "RAPL"
    report = sample_report()
    for variant, joules, source in zip(report["variants"], (1.2345, 56.789), (estimated, counted), strict=False):
        variant["performance"] |= {"energy_j_per_request": joules, "energy_source": source}
    render(report, tmp_path)
    html, markdown = read(tmp_path, "report.html"), read(tmp_path, "report.md")
    assert "1.23 (estimate)" in markdown and "56.8 |" in markdown and markdown.count("1.23 ") == 1
    assert (
        f'<span title="{estimated}">1.23</span> <small>estimate</small>' in html
        and '<span title="RAPL">56.8</span></td>' in html.replace("\n", "")
    )
    for page in (html, markdown.replace("\\", "")):
        assert f"Energy per request: {estimated}; {counted}." in page


def test_a_failed_variant_is_a_row_with_its_error(rendered: Path) -> None:
    assert "| gguf-Q4_1 | failed: llama_decode returned -1" in read(rendered, "report.md")
    assert "gguf-Q4_1 gguf Failed: llama_decode returned -1" in squeezed(read(rendered, "report.html"))


def test_what_is_recommended_for_a_cpu_comes_before_what_is_for_a_gpu_and_only_limits_that_are_set_are_named(tmp_path: Path) -> None:
    report = sample_report()
    report["recommendation"]["gpu"] = next(v["name"] for v in report["variants"] if v["format"] == "gptq")
    render(report, tmp_path)
    page = read(tmp_path, "report.md")
    assert page.index("gguf-Q5_K_M in four figures") < page.index(f"{report['recommendation']['gpu']} in four figures")
    assert "Constraints: max_loss_points: 1, max_rss_mb: 512\n" in page


def test_the_verdict_comes_first(rendered: Path) -> None:
    text = squeezed(read(rendered, "report.html").split("<body>")[1])
    parts = ["On a CPU gguf-Q5_K_M It is the fastest variant", "On a GPU No recommendation", "Release gate Promote",
             "95.8%", "All variants"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    markdown = read(rendered, "report.md")
    assert "On a CPU: **gguf-Q5_K_M**." in markdown
    assert "Why: It is the fastest variant" in markdown
    assert "base-fp16 (base model)" in markdown
    assert "tuned-fp16 (16-bit reference)" in markdown


@pytest.mark.parametrize("verdict", ["erased", "ok"])
def test_what_was_found_unusable_is_drawn_as_a_cross_and_is_on_no_front(verdict: str) -> None:
    from tasks.plots import _front, _points, _scatter

    report = sample_report()
    fastest = max((v for v in report["variants"] if v["performance"]), key=lambda v: v["performance"]["requests_s"])
    fastest["fidelity"]["verdict"] = verdict
    points = list(_points(report, "performance.requests_s"))
    assert (fastest["name"] in {point.label.removeprefix("★ ") for point in _front(points, 1)}) == (verdict == "ok")
    axes = _scatter("Exact match against speed", report, "performance.requests_s", "Requests per second", 1).axes[0]
    assert any(line.get_marker() == "x" for line in axes.lines) == (verdict == "erased")


def test_markdown_tables_are_whole(rendered: Path) -> None:
    """Within a table, every row has as many cells as its heading; only a failed variant's row may be shorter."""
    width = 0
    for line in read(rendered, "report.md").splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        if cells and width and "failed:" not in line:
            assert cells == width, line
        width = (width or cells) if cells else 0


def test_the_page_fetches_nothing(rendered: Path) -> None:
    html = read(rendered, "report.html")
    loads = Loads()
    loads.feed(html)
    assert [target for target in loads.found if not target.startswith("#")] == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttpRequest|<link|<iframe", html)
    assert set(re.findall(r'<a href="(http[^"]+)"', html)) == {"https://arxiv.org/abs/2510.21970"}


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_an_almost_empty_report_still_renders(tmp_path: Path, name: str) -> None:
    empty = dict.fromkeys(sample_report())
    empty["variants"] = [{"name": "only", "role": "candidate", "quality": None, "performance": None}]
    render(empty, tmp_path)
    assert "not measured" in read(tmp_path, name)
    render({}, tmp_path)
    assert "No recommendation" in read(tmp_path, name) or "no recommendation" in read(tmp_path, name)


def test_the_same_report_gives_the_same_page(tmp_path: Path, rendered: Path) -> None:
    render(sample_report(), tmp_path)
    for path in rendered.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.fast
@pytest.mark.slow
def test_what_a_teacher_gave_is_shown_and_without_one_nothing_is(tmp_path: Path) -> None:
    report = sample_report()
    render(report, tmp_path / "taught")
    for name in ("report.html", "report.md"):
        page = (tmp_path / "taught" / name).read_text(encoding="utf-8")
        for text in (
            "openai/gpt-4.1-mini",
            "91,204",
            "utterances: 431",
            "LiteLLM does not know the price",
            "budget teacher.max_tokens = 90000",
        ):
            assert text in page, (name, text)
        assert EVIL not in page
    report["dataset"]["teacher"] = None
    render(report, tmp_path / "alone")
    page = (tmp_path / "alone" / "report.md").read_text(encoding="utf-8")
    assert "### Teacher" not in page and "- Teacher: none" in page


@pytest.mark.fast
@pytest.mark.slow
def test_where_the_time_went_and_what_would_be_the_same_again_are_told(tmp_path: Path) -> None:
    report = sample_report()
    render(report, tmp_path / "plain")
    assert not [words for words in ("Where the time went", "the same again") if words in read(tmp_path / "plain", "report.md")]
    seconds = dict(zip((f"{account}_s" for account in WORDS), (900.0, 9.0, 30.0, 2.5, 4.0, 3.5, 0.5), strict=True))
    report["overhead"] = {**seconds, "wall_s": 949.5, "total_s": 49.5, "share": 49.5 / 949.5}
    stages = [{"kind": "synthesize", "varies": ""}, {"kind": "benchmark", "varies": f"it takes {EVIL} time"}, {"kind": None, "varies": ""}]
    measured = [{"name": f"v{i}", "performance": {"spread": {"requests_s": 0.03 * i}}} for i in (1, 2)] + [
        {"name": "failed", "performance": None}
    ]
    report["reproducibility"] = reproducibility(stages, measured)
    render(report, tmp_path / "told")
    for name in ("report.html", "report.md"):
        page = squeezed(read(tmp_path / "told", name))
        assert "Where the time went" in page and "15.0 min" in page and "94.8%" in page and "49.5 s" in page, name
        assert "never on a GPU): synthesize." in page and "benchmark is not: it takes" in page and EVIL not in page, name
    assert "up to 6.0% of the median apart (v2)" in squeezed(read(tmp_path / "told", "report.html"))
    assert reproducibility(stages, [{"name": "v1", "performance": {"spread": None}}])["spread"] is None


def test_what_was_measured_beside_the_usual_is_shown_and_otherwise_nothing_is(tmp_path: Path) -> None:
    report = sample_report()
    render(report, tmp_path / "plain")
    plain = read(tmp_path / "plain", "report.md")
    assert "Constrained decoding" not in plain and "llama-bench" not in plain and "Variant and kernel" not in plain
    gguf = next(v for v in report["variants"] if v["name"] == "gguf-Q5_K_M")
    gguf["tensor_types"] = {"Q5_1": 180, "F32": 61}
    gguf["constrained"] = {
        "exact_match": interval(0.971, 900), "hard_exact_match": None, "json_valid": 1.0, "requests_s": 7.31, "requests_s_batched": 15.2,
        "vs_free": {"delta": 0.002, "low": -0.001, "high": 0.006, "mcnemar_p": 0.5},
    }  # fmt: skip
    gguf["performance"] |= {
        "runs": 5, "spread": {"requests_s": 0.034, "decode_tok_s": 0.02}, "requests_s_by_load": {"1": 9.5, "4": 11.5, "32": 17.25},
        "latency_ms_by_load": {"1": {"p95": 120.0}, "32": {"p95": 1987.5}},
        "requests_s_prefix_not_shared": 14.44, "mapped": {"load_s": 0.31, "rss_mb": 333.0, "private_mb": 77.0, "requests_s": 9.0},
        "llama_bench": {"prefill_ratio": 0.985, "decode_ratio": 1.01},
    }  # fmt: skip
    gptq = next(v for v in report["variants"] if v["format"] == "gptq")
    gptq["performance"]["kernels"] = [
        {"name": "torch", "kernel": "TorchLinear", "requests_s": 1.25, "requests_s_batched": 2.5, "prefill_tok_s": 80.0, "decode_tok_s": 9.0},
        {"name": "marlin", "error": "Marlin needs CUDA"},
    ]  # fmt: skip
    report["measurement"] = {"quiet": False, "others_cores": 0.41, "stolen_cores": 0.02, "most_disturbed": "gguf-Q8_0"}
    render(report, tmp_path / "whole")
    markdown, html = read(tmp_path / "whole", "report.md"), squeezed(read(tmp_path / "whole", "report.html"))
    for text in ("97.1%", "7.31", "Q5\\_1: 180", "3.4%", "4 at a time", "32 at a time", "17.2", "Latency p95, 32 at a time", "1,988", "14.4", "0.98×", "1.01×", "failed: Marlin needs CUDA",
                 "was not quiet", "up to 0.41 of its cores busy", "Most disturbed: gguf"):  # fmt: skip
        assert text.replace("\\", "") in html or "failed:" in text, text
        assert text.replace("\\", "") in markdown.replace("\\", ""), text
    assert not re.search(r"\b1 at a time", markdown)  # it has columns of its own
    quiet = {"quiet": True, "others_cores": 0.02, "stolen_cores": 0.0, "most_disturbed": "x"}
    render(report | {"measurement": quiet}, tmp_path / "quiet")
    assert "The machine was quiet" in read(tmp_path / "quiet", "report.md")
    render(report | {"measurement": quiet | {"spread": 0.4, "least_steady": "gguf-F16"}}, tmp_path / "apart")
    page = read(tmp_path / "apart", "report.md")
    assert "The machine was quiet" not in page and "runs of gguf-F16 lay 40% apart" in page
