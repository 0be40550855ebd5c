"""Stage `benchmark`: speed and memory of one variant, alone in a fresh process.

The measuring model: load time is from the call to the loaded model, file cache warm or not as found. A latency is that
of one request alone, from its text to its last token, after `warmup` requests. `requests_s` is one over the mean of these;
`requests_s_batched` is of all requests at once, `parallel` at a time. Prefill and decode are at fixed lengths, as llama-bench
does them. llama.cpp learns to guess while it answers, as it would in deployment; a row that is asked twice is guessed better. Memory is read while the model and its cache are loaded. Raw samples are kept in `samples.json`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core import hardware, progress
from tasks.core.stage import StageConfig, stage
from tasks.domain import prompt
from tasks.domain.spec import load_spec
from tasks.evaluate import conversations, load_variant
from tasks.runtimes import Dtype, Runtime, RuntimeName
from tasks.synthesize import read_rows


class BenchmarkConfig(StageConfig):
    """What is measured."""

    runtime: RuntimeName = "llama_cpp"
    dtype: Dtype = Field("float16", description="What transformers computes in; GGUF files decide for themselves")
    zero_shot: bool = False
    few_shot: int = Field(0, ge=0, le=64, description="Rows of `train` shown as examples with every request")
    requests: int = Field(30, ge=5, le=10_000, description="Requests answered one at a time")
    batched_requests: int = Field(64, ge=5, le=10_000, description="Requests answered `parallel` at a time")
    parallel: int = Field(16, ge=1, le=256)
    warmup: int = Field(3, ge=1, le=100)
    repeats: int = Field(3, ge=1, le=100, description="Of prefill and decode; the median counts")
    prefill_tokens: int = Field(512, ge=16, le=8192)
    decode_tokens: int = Field(64, ge=8, le=8192)
    max_tokens: int = Field(64, ge=8, le=1024)


@stage("benchmark", version=3, libraries=("torch", "transformers", "gptqmodel", "llama-cpp-python"), measures=True)
def benchmark(config: BenchmarkConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Measure `inputs["model"]` on rows of the `test` split of `inputs["dataset"]`."""
    spec = load_spec(str(inputs["dataset"]))
    rows = read_rows(inputs["dataset"] / "test.jsonl")
    texts = [rows[i % len(rows)]["text"] for i in range(config.batched_requests)]
    asked = conversations(config, inputs["dataset"], spec, texts)
    total = config.requests + 2 * config.repeats + 2
    started = time.perf_counter()
    model = load_variant(config.runtime, inputs["model"], config.dtype)
    load_s = time.perf_counter() - started

    for conversation in asked[-config.warmup :]:  # not those measured next: llama.cpp guesses from answers it has given
        _one(model, conversation, config.max_tokens)
    alone = [_one(model, asked[i % len(asked)], config.max_tokens) for i in progress.track(range(config.requests), total, "one at a time")]
    memory = hardware.memory_mb()
    started = time.perf_counter()
    batched = list(model.generate(asked, config.max_tokens, config.parallel))
    batched_s = time.perf_counter() - started
    progress.advance(config.requests + 1, total, "batched")
    prefill, decode = [], []
    for repeat in range(config.repeats + 1):  # the first warms up
        prefill.append(model.prefill_tokens_per_s(config.prefill_tokens))
        decode.append(model.decode_tokens_per_s(config.decode_tokens))
        progress.advance(config.requests + 2 + 2 * repeat, total, "prefill and decode")
    samples = {
        "latency_s": [a["total_s"] for a in alone],
        "first_token_s": [a["first_token_s"] for a in alone],
        "tokens": [a["tokens"] for a in alone],
        "prefill_tok_s": prefill[1:],
        "decode_tok_s": decode[1:],
    }
    (out_dir / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return {
        "device": model.device,
        "threads": model.threads,
        "kernel": getattr(model, "kernel", None),
        "load_s": load_s,
        "ttft_ms": percentiles(samples["first_token_s"]),
        "latency_ms": percentiles(samples["latency_s"]),
        "prefill_tok_s": statistics.median(prefill[1:]),
        "decode_tok_s": statistics.median(decode[1:]),
        "requests_s": len(alone) / sum(samples["latency_s"]),
        "requests_s_batched": len(batched) / batched_s,
        "parallel": config.parallel,
        "completion_tokens": statistics.mean(samples["tokens"]),
        "prompt_tokens": statistics.mean(a["prompt_tokens"] for a in alone),
        **memory,
        "peak_rss_mb": hardware.peak_rss_mb(),
        "vram_mb": _vram_mb(model),
    }


def _one(model: Runtime, conversation: list[prompt.Message], max_tokens: int) -> dict[str, float]:
    started = time.perf_counter()
    completion = next(iter(model.generate([conversation], max_tokens, 1)))
    return {
        "total_s": time.perf_counter() - started,
        "first_token_s": completion.first_token_s,
        "tokens": completion.completion_tokens,
        "prompt_tokens": completion.prompt_tokens,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    import numpy as np

    return {name: float(np.percentile(seconds, q)) * 1000 for name, q in (("p50", 50), ("p95", 95), ("p99", 99))}


def _vram_mb(model: Runtime) -> float | None:
    if model.device != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_allocated() / 1e6
