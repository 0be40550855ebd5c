"""Measuring: what several runs of a variant say together, and whether others disturbed them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.session import Run
from flows.stages import measurements
from tasks.benchmark import SAMPLES, BenchmarkConfig, benchmark, pooled
from tasks.config import load_config
from tasks.core import hardware
from tasks.core.child import StageError
from tasks.core.stage import Stage
from tasks.decide import QUIET, measurement
from tasks.domain.errors import UserError
from tasks.llama_bench import LlamaBenchConfig, llama_bench
from tasks.report import measured_on
from tasks.runtimes.llama_cpp import LlamaCppRuntime
from tasks.synthesize import read_rows, synthesize
from tasks.variants import Variant

pytestmark = pytest.mark.fast


def run_of(folder: Path, requests_s: float, latencies: list[float], others: float = 0.0) -> tuple[dict[str, Any], Path]:
    folder.mkdir()
    count = len(latencies)
    samples = {
        "latency_s": latencies,
        "first_token_s": [0.01] * count,
        "tokens": [5] * count,
        "prefill_tok_s": [100.0],
        "decode_tok_s": [50.0],
        **{f"latency_s_at_{load}": [load * seconds for seconds in latencies] for load in (16, 4)},
    }
    (folder / SAMPLES).write_text(json.dumps(samples))
    metrics = {
        "device": "cpu", "threads": 2, "kernel": None, "load_s": requests_s, "ttft_ms": {"p50": 1.0}, "tpot_ms": None, "latency_ms": {"p50": 1.0},
        "requests_s": requests_s, "requests_s_batched": 2 * requests_s, "requests_s_by_load": {"4": requests_s}, "prefill_tok_s": 100.0,
        "decode_tok_s": 50.0, "requests_s_prefix_not_shared": None, "others_cores": others, "stolen_cores": 0.0,
    }  # fmt: skip
    return metrics, folder


def test_runs_together_give_medians_percentiles_of_all_requests_and_how_far_they_lie_apart(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / "0", 10.0, [0.1, 0.1]),
        run_of(tmp_path / "1", 12.0, [0.1, 0.3], 0.5),
        run_of(tmp_path / "2", 8.0, [0.1, 0.1]),
    ]
    found = pooled(runs)
    assert (
        found["requests_s"] == 10.0
        and found["requests_s_by_load"] == {"1": 10.0, "4": 10.0}
        and found["threads"] == 2
        and found["device"] == "cpu"
    )
    assert found["latency_ms"]["p50"] == pytest.approx(100) and found["latency_ms"]["p99"] > 250  # of all six
    assert list(found["latency_ms_by_load"]) == ["1", "4", "16"] and found["latency_ms_by_load"]["1"] == found["latency_ms"]
    assert found["latency_ms_by_load"]["16"]["p50"] == pytest.approx(1600)
    assert found["tpot_ms"]["p50"] == pytest.approx(22.5) and found["ttft_ms"]["p95"] == pytest.approx(10)
    assert found["runs"] == 3 and found["spread"]["requests_s"] == pytest.approx(0.4) and found["spread"]["decode_tok_s"] == 0
    assert found["others_cores"] == 0.5  # the worst, not the median
    assert found["requests_s_prefix_not_shared"] is None and pooled(runs[:1])["spread"] is None
    runs[0][0]["new"] = 1.0  # the first run was made again by a version that measures more
    assert "new" not in pooled(runs) and pooled(runs)["requests_s"] == 10.0


@pytest.mark.slow
def test_another_program_that_is_busy_is_noticed() -> None:
    # A session of its own: children of this process would count as its own work.
    code = "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nend = time.time() + 4\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    others = hardware.Disturbance()
    time.sleep(0.5)
    assert others.cores()["others_cores"] > 0.3


@pytest.mark.slow
def test_what_this_process_and_its_children_do_themselves_is_their_own() -> None:
    others = hardware.Disturbance()
    before, end = others._read()[3], time.monotonic() + 0.4
    while time.monotonic() < end:
        pass
    mine = others._read()[3]
    assert mine > before
    with subprocess.Popen([sys.executable, "-c", "import time\nend = time.time() + 1\nwhile time.time() < end: pass"]) as child:
        time.sleep(1)
    assert child.returncode == 0 and others._read()[3] > mine  # of a child that has ended, too


def test_a_machine_that_was_not_quiet_is_called_so() -> None:
    def variant(name: str, others: float, stolen: float = 0.01, apart: float | None = None) -> dict[str, Any]:
        spread = None if apart is None else {"requests_s": apart}
        return {"name": name, "role": "candidate", "performance": {"others_cores": others, "stolen_cores": stolen, "spread": spread}}

    quiet = measurement([variant("a", 0.0), variant("b", QUIET / 2)])
    busy = measurement([variant("a", 0.7), variant("b", 0.0)])
    assert quiet and quiet["quiet"] and busy and not busy["quiet"] and busy["most_disturbed"] == "a"
    stolen = measurement([variant("a", 0.0), variant("b", 0.0, stolen=0.5)])
    assert stolen and not stolen["quiet"] and stolen["most_disturbed"] == "b"
    repeated = measurement([variant("a", 0.0, apart=0.1), variant("b", 0.0, apart=0.4), variant("c", 0.0, apart=0.2)])
    assert repeated and (repeated["spread"], repeated["least_steady"]) == (0.4, "b") and quiet["spread"] is None
    assert measurement([]) is None


VARIANTS = [
    Variant(name="base-bf16", format="hf", bits=16, runtime="transformers", dtype="auto", role="base"),
    Variant(name="tuned-fp16", format="hf", bits=16, runtime="transformers", role="reference"),
    Variant(name="gguf-Q4_0", format="gguf", bits=4, runtime="llama_cpp", role="candidate"),
]


def test_variants_take_turns_in_every_run_and_the_base_model_is_measured_once() -> None:
    config = load_config("smoke", {"benchmark.runs": 2})
    names = [name for name, *_ in measurements(config, VARIANTS)]
    assert names == [f"benchmark:{name}" for name in ("base-bf16:0", "tuned-fp16:0", "gguf-Q4_0:0", "tuned-fp16:1", "gguf-Q4_0:1")]


def test_what_is_asked_for_beside_speed_is_measured_once_and_llama_bench_in_every_run() -> None:
    config = load_config("smoke", {"benchmark.runs": 2, "benchmark.mapped_too": True, "benchmark.llama_bench": True, "constrained": True})
    names = [name for name, *_ in measurements(config, VARIANTS[2:])]
    assert names == ["benchmark:gguf-Q4_0:0", "llama-bench:gguf-Q4_0:0", "constrained-benchmark:gguf-Q4_0", "mapped:gguf-Q4_0",
                     "benchmark:gguf-Q4_0:1", "llama-bench:gguf-Q4_0:1"]  # fmt: skip


def test_how_often_is_measured_is_not_part_of_what_is_measured() -> None:
    """So that a second `make bench`, or one with more runs, keeps the runs that are there."""
    anew = load_config("smoke", {"benchmark.runs": 2, "benchmark.session": 3})
    assert [(name, settings.run) for name, _, settings, *_ in measurements(anew, VARIANTS[-1:])] == [
        ("benchmark:gguf-Q4_0:0", 300), ("benchmark:gguf-Q4_0:1", 301)
    ]  # fmt: skip
    assert benchmark.key(BenchmarkConfig(runs=1), {}) == benchmark.key(BenchmarkConfig(runs=5, llama_bench=True, mapped_too=True), {})
    assert benchmark.key(BenchmarkConfig(run=1), {}) != benchmark.key(BenchmarkConfig(run=0), {})


def test_a_kernel_is_for_gptq_variants() -> None:
    gptq = Variant(name="gptq-4bit", format="gptq", bits=4, runtime="transformers", role="candidate")
    config = load_config("smoke", {"benchmark.kernel": "torch"})
    assert [settings.kernel for _, _, settings, *_ in measurements(config, [*VARIANTS, gptq])] == [None, None, None, "torch"]


def test_a_load_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"benchmark\.loads.*from 1 to 255"):
        load_config("smoke", {"benchmark.loads": [0]})


def test_llama_bench_that_is_not_built_is_an_error_with_its_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match="make llama-bench"):
        llama_bench.function(LlamaBenchConfig(), {"model": tmp_path}, tmp_path)


def test_figures_of_llama_bench_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is its own; what stands for it here writes what it writes."""
    program = tmp_path / "llama-bench"
    program.write_text(
        "#!/bin/sh\n"
        """echo '[{"n_prompt":512,"n_gen":0,"avg_ts":900.0,"stddev_ts":1.0,"build_commit":"abc","n_threads":2},"""
        """{"n_prompt":0,"n_gen":128,"avg_ts":90.0,"stddev_ts":2.0,"build_commit":"abc","n_threads":2}]'"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", str(tmp_path))
    found = llama_bench.function(LlamaBenchConfig(), {"model": tmp_path}, tmp_path)
    assert (found["prefill_tok_s"], found["decode_tok_s"], found["build_commit"]) == (900.0, 90.0, "abc")


def test_a_repeat_that_fails_leaves_the_variant_the_runs_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import stages

    manifest: Any = object()

    def call(stage: Stage, config: Any, label: str, **inputs: Any) -> Any:
        if label == "benchmark gguf-Q4_0, run 2":
            raise StageError("killed by signal 9")
        return manifest

    monkeypatch.setattr(stages, "runner", lambda run: call)
    run: Any = Run(run_id="x", mlflow_run="m", config=load_config("smoke", {"benchmark.runs": 3}), started="", resumed=False)
    found, failed, unmeasured = stages.measure.fn(run, VARIANTS, {v.name: manifest for v in VARIANTS}, manifest, {})
    assert failed == {} and unmeasured == {"benchmark:gguf-Q4_0:1": "killed by signal 9"}
    assert {"benchmark:gguf-Q4_0:0", "benchmark:gguf-Q4_0:2"} < set(found)


@pytest.mark.parametrize("broken", ["llama_bench", "benchmark"])
def test_a_further_measurement_that_fails_is_noted_and_an_essential_one_fails_its_variant_alone(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The flow's own branching; what a stage gives is not looked at by it."""
    from flows import stages

    manifest: Any = object()

    def call(stage: Stage, config: Any, label: str, **inputs: Any) -> Any:
        if stage.name == broken and "Q4_0" in label:
            raise StageError(f"{broken}: no memory left")
        return manifest

    monkeypatch.setattr(stages, "runner", lambda run: call)
    run: Any = Run(run_id="x", mlflow_run="m", config=load_config("smoke", {"benchmark.llama_bench": True}), started="", resumed=False)
    variants = [*VARIANTS, VARIANTS[2].model_copy(update={"name": "gguf-Q8_0"})]
    found, failed, unmeasured = stages.measure.fn(run, variants, {v.name: manifest for v in variants}, manifest, {})
    assert "llama-bench:gguf-Q8_0:0" in found and "benchmark:tuned-fp16:0" in found
    if broken == "llama_bench":
        assert (
            failed == {} and unmeasured == {"llama-bench:gguf-Q4_0:0": "llama_bench: no memory left"} and "benchmark:gguf-Q4_0:0" in found
        )
    else:
        assert failed == {"gguf-Q4_0": "benchmark: no memory left"} and not [name for name in found if name.split(":")[1] == "gguf-Q4_0"]


@pytest.mark.parametrize("broken", ["convert_gguf", "importance", "search_gguf"])
def test_gguf_variants_fail_alone_when_what_they_are_made_from_fails(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    from flows import stages

    manifest: Any = object()

    def call(stage: Stage, *_: Any, **__: Any) -> Any:
        if stage.name == broken:
            raise StageError(f"{broken} cannot")
        return manifest

    monkeypatch.setattr(stages, "runner", lambda run: call)
    wanted = {"gguf": ["F16", "Q4_0"], "gguf_importance": "both", "gguf_search": {}}
    run: Any = Run(run_id="x", mlflow_run="m", config=load_config("smoke", wanted), started="", resumed=False)
    variants, models, failed, converted = stages.make_gguf.fn(run, manifest, manifest, manifest)
    names = {variant.name for variant in variants}
    assert names == {"gguf-F16", "gguf-Q4_0", "gguf-Q4_0-imatrix", "gguf-mixed"} and set(models) | set(failed) == names
    lost = {"convert_gguf": names, "importance": {"gguf-Q4_0-imatrix", "gguf-mixed"}, "search_gguf": {"gguf-mixed"}}[broken]
    assert set(failed) == lost and set(failed.values()) == {f"{broken} cannot"} and (converted is None) == (broken == "convert_gguf")


def test_a_report_says_which_machines_measured() -> None:
    measured = [{"performance": {"machine": name}} for name in ("b, 2 cores", "a, 4 cores", "b, 2 cores")]
    assert measured_on([*measured, {"performance": {}}, {"error": "x"}]) == "a, 4 cores; b, 2 cores"


@pytest.mark.slow
def test_a_load_is_called_by_what_ran_and_no_row_is_asked_twice(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int]] = []
    usual = LlamaCppRuntime.generate

    def generate(model: LlamaCppRuntime, conversations: Any, max_tokens: int, parallel: int) -> Any:
        asked.append(([conversation[-1]["content"] for conversation in conversations], parallel))
        return usual(model, conversations, max_tokens, parallel)

    monkeypatch.setattr(LlamaCppRuntime, "generate", generate)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir(), out.mkdir()
    synthesize.function(load_config("smoke").data.model_copy(update={"test_rows": 36}), {}, data)
    config = BenchmarkConfig(
        runtime="llama_cpp",
        requests=12,
        batched_requests=6,
        loads=(4, 32),
        parallel=16,
        repeats=1,
        warmup=2,
        max_tokens=8,
        prefill_tokens=16,
    )
    figures = benchmark.function(config, {"model": tiny_gguf.parent, "dataset": data}, out)
    assert list(figures["requests_s_by_load"]) == ["4", "6"] and figures["parallel"] == 6
    assert figures["machine"] == hardware.machine() and f"{hardware.cores()} cores" in figures["machine"]
    alone = [texts[0] for texts, parallel in asked if parallel == 1]
    assert len(alone) == len(set(alone)) == 14
    assert [(len(texts), parallel) for texts, parallel in asked if parallel > 1] == [(6, 6), (6, 6), (4, 4), (6, 4)]  # each warmed up
    intents = {row["text"]: row["gold"]["intent"] for row in read_rows(data / "test.jsonl")}
    assert {intents[text.strip()] for text in alone[2:8]} == set(intents.values())  # and not six rows of two
    assert asked[-1][0] == alone[2:8] and set(asked[-2][0]) < set(asked[-1][0])
    samples = json.loads((out / SAMPLES).read_text())
    assert [len(samples[f"latency_s_at_{load}"]) for load in (4, 6)] == [6, 6] and figures["peak_rss_mb"] >= figures["rss_mb"] * 0.9


def test_a_gptq_variant_is_asked_checked_and_timed_with_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import stages

    kernels: list[tuple[str, Any]] = []

    def call(stage: Stage, config: Any, label: str, **_: Any) -> Any:
        kernels.append((label, getattr(config, "kernel", None)))
        return object()

    monkeypatch.setattr(stages, "runner", lambda run: call)
    names = {"gptq-4bit": ("gptq", "transformers"), "gguf-F16": ("gguf", "llama_cpp")}
    variants = [Variant(name=n, format=f, bits=4, runtime=r, role="candidate") for n, (f, r) in names.items()]  # type: ignore[arg-type]
    config = load_config("smoke", {"benchmark.kernel": "torch"})
    run: Any = Run(run_id="x", mlflow_run="m", config=config, started="", resumed=False)
    models: Any = dict.fromkeys(names, object())
    stages.measure.fn(run, variants, models, models["gptq-4bit"], {})
    stages.check.fn(run, variants, models, *[models["gptq-4bit"]] * 5, {})
    told = dict(kernels)
    assert [told[f"{what} gptq-4bit"] for what in ("evaluate", "benchmark", "check")] == ["torch"] * 3
    assert {told[f"{what} gguf-F16"] for what in ("evaluate", "benchmark", "check")} == {None}


@pytest.mark.slow
def test_gpu_memory_is_that_of_the_usual_load_not_of_larger_ones(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import benchmark as measuring

    most = [1]
    usual = LlamaCppRuntime.generate

    def generate(model: LlamaCppRuntime, conversations: Any, max_tokens: int, parallel: int) -> Any:
        most.append(max(most[-1], parallel))
        return usual(model, conversations, max_tokens, parallel)

    gpu = SimpleNamespace(memory_mb=lambda: 100.0 * most[-1], utilization=lambda: 0.5, joules=lambda: None)
    monkeypatch.setattr(LlamaCppRuntime, "generate", generate)
    monkeypatch.setattr(measuring.power, "first_gpu", lambda device, visible: gpu)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir(), out.mkdir()
    synthesize.function(load_config("smoke").data, {}, data)
    sizes = {"requests": 5, "batched_requests": 8, "repeats": 1, "warmup": 1, "max_tokens": 8, "prefill_tokens": 16, "decode_tokens": 8}
    config = BenchmarkConfig.model_validate({"runtime": "llama_cpp", "parallel": 4, "loads": (2, 8), **sizes})
    figures = benchmark.function(config, {"model": tiny_gguf.parent, "dataset": data}, out)
    assert figures["vram_mb"] == 400.0 and figures["torch_peak_mb"] is None and most[-1] == 8
