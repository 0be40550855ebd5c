"""Stage `benchmark`: speed and memory of one variant, alone in a fresh process. Repeats are artefacts of their own.

The measuring model: load time is from the call to the loaded model, file cache warm or not as found. A latency is that of one request
alone, from its text to its last token, after `warmup` requests. `requests_s` is one over the mean of these; `requests_s_by_load` is of
all requests at once, so many at a time, after as many to warm up. In all of them intents and languages take turns, so that few requests
are as long as many. Prefill and decode are at fixed lengths, as llama-bench does them. llama.cpp learns to guess while it answers, as it
would in deployment, and forgets it before each load, since a row that is asked twice is guessed better. Memory is that of the process and
its children, the most that was read after the requests alone and after those at `parallel`, the model and its cache being loaded; its
peak, from loading until then, is the kernel's figure. Energy is that of the requests one at a time, counted while they run; where nothing counts
it, it is estimated when all else is measured. Raw samples are kept in `samples.json`; `pooled` puts repeats together.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tasks import runtimes
from tasks.core import hardware, power, progress, settings
from tasks.core.stage import MEASURED, StageConfig, stage
from tasks.domain import prompt
from tasks.domain.spec import load_spec
from tasks.evaluate import conversations, load_variant
from tasks.runtimes import LONGEST_PROMPT, Dtype, GptqKernel, LocalRuntime, RuntimeName
from tasks.synthesize import in_turns, read_rows

SAMPLES = "samples.json"
AT_LOAD = "latency_s_at_"  # in samples: followed by a number of requests at a time
BUSY = ("others_cores", "stolen_cores")
SPREAD_OF = ("requests_s", "requests_s_batched", "prefill_tok_s", "decode_tok_s")


MOST_RUNS = 100


class BenchmarkConfig(StageConfig):
    """What is measured."""

    runtime: RuntimeName = "llama_cpp"
    dtype: Dtype = Field("float16", description="What transformers computes in; GGUF files decide for themselves")
    zero_shot: bool = False
    few_shot: int = Field(0, ge=0, le=64, description="Rows of `train` shown as examples with every request")
    requests: int = Field(
        36, ge=5, le=10_000, description="Requests answered one at a time; a multiple of the intents has all of them alike"
    )
    batched_requests: int = Field(72, ge=5, le=10_000, description="Requests answered `parallel` at a time")
    parallel: int = Field(16, ge=1, le=255)
    loads: tuple[int, ...] = Field((), description="Further numbers of requests at a time to measure")
    warmup: int = Field(3, ge=1, le=100)
    repeats: int = Field(3, ge=1, le=100, description="Of prefill and decode; the median counts")
    prefill_tokens: int = Field(512, ge=16, le=LONGEST_PROMPT)
    decode_tokens: int = Field(64, ge=8, le=8192)
    max_tokens: int = Field(64, ge=8, le=1024)
    unshared_too: bool = Field(False, description="Measure once more with what all prompts begin with read for every request")
    kernel: GptqKernel | None = Field(None, description="GPTQModel's kernel for GPTQ variants; null takes what it thinks best")
    kernels: tuple[GptqKernel, ...] = Field((), description="Kernels to measure GPTQ variants with beside that")
    constrained: bool = Field(False, description="Keep every answer to the grammar of the domain; llama.cpp only")
    mmap: bool = Field(False, description="Map the weights into memory instead of reading them; llama.cpp only")
    run: int = Field(0, ge=0, description="Which of the runs this is; filled in by the flow")
    runs: int = Field(1, ge=1, le=MOST_RUNS, description="Fresh processes for each variant, variants taking turns; medians count")
    session: int = Field(0, ge=0, le=10_000, description="Another number measures everything anew: does it come out the same?")
    mapped_too: bool = Field(False, description="Measure GGUF files once more with their weights mapped into memory")
    llama_bench: bool = Field(False, description="Compare prefill and decode of GGUF files with llama.cpp's own llama-bench")

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"runs", "session", "kernels", "mapped_too", "llama_bench"}
    )  # they say how often a stage is called

    @field_validator("loads")
    @classmethod
    def _loads_are_numbers_of_requests(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= load <= 255 for load in value):  # llama.cpp takes 256 sequences, and one is the shared prefix
            raise ValueError("a load is a number of requests from 1 to 255")
        return value


@stage(
    "benchmark",
    version=10,
    libraries=("torch", "transformers", "gptqmodel", "llama-cpp-python", "codecarbon"),
    measures=True,
    varies=MEASURED,
)
def benchmark(config: BenchmarkConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Measure `inputs["model"]` on rows of the `test` split of `inputs["dataset"]`."""
    spec = load_spec(str(inputs["dataset"]))
    rows = in_turns(read_rows(inputs["dataset"] / "test.jsonl"))
    texts = [rows[i % len(rows)]["text"] for i in range(max(config.requests, config.batched_requests) + config.warmup)]
    asked = conversations(config, inputs["dataset"], spec, texts)
    together = asked[: config.batched_requests]
    parallel, *loads = (min(load, len(together)) for load in (config.parallel, *config.loads))  # no more than there are run at a time
    loads = sorted({parallel, *loads} - {1}, key=lambda load: (load != parallel, load))  # the one that memory is read after comes first
    total = config.requests + len(loads) + 2 * config.repeats + 3
    others = hardware.Disturbance()
    runtimes.import_libraries(config.runtime, inputs["model"])
    started = time.perf_counter()
    model = load_variant(config, inputs["model"], spec, config.mmap)
    load_s = time.perf_counter() - started
    gpu = power.first_gpu(model.device, settings.visible_gpus() or "")

    for conversation in asked[len(asked) - config.warmup :]:  # not those measured next: llama.cpp guesses from answers it has given
        _one(model, conversation, config.max_tokens)
    energy = power.Energy(gpu)
    alone, joules, cpu_before = [], None, time.process_time()
    for i in progress.track(range(config.requests), total, "one at a time"):
        alone.append(_one(model, asked[i], config.max_tokens))
        joules = energy.joules()  # each time, since counters wrap
    cpu_s = time.process_time() - cpu_before
    busy, memory, peak_rss_mb = gpu and gpu.utilization(), [_memory_mb(model, gpu)], hardware.peak_rss_mb()
    by_load, waits = {}, {}
    for done, load in enumerate(loads, 1):
        by_load[load], waits[load] = _at_a_time(model, together, load, config.max_tokens)
        if load == parallel:
            memory.append(_memory_mb(model, gpu))
            peak_rss_mb = hardware.peak_rss_mb()
        progress.advance(config.requests + done, total, f"{load} at a time")
    unshared = None
    if config.unshared_too:
        model.share_prefix = False
        unshared, _ = _at_a_time(model, together, parallel, config.max_tokens)
    prefill, decode = [], []
    for repeat in range(config.repeats + 1):  # the first warms up
        prefill.append(model.prefill_tokens_per_s(config.prefill_tokens))
        decode.append(model.decode_tokens_per_s(config.decode_tokens))
        progress.advance(config.requests + len(loads) + 3 + 2 * repeat, total, "prefill and decode")
    samples = {
        "latency_s": [a["total_s"] for a in alone],
        "first_token_s": [a["first_token_s"] for a in alone],
        "tokens": [a["tokens"] for a in alone],
        "prefill_tok_s": prefill[1:],
        "decode_tok_s": decode[1:],
        **{f"{AT_LOAD}{load}": seconds for load, seconds in waits.items()},
    }
    (out_dir / SAMPLES).write_text(json.dumps(samples), encoding="utf-8")
    figures = {
        "device": model.device,
        "threads": model.threads,
        "kernel": getattr(model, "kernel", None),
        "dtype": getattr(model, "dtype", None),
        "machine": hardware.machine(),
        "load_s": load_s,
        **summary(samples),
        "requests_s_batched": by_load.get(parallel, len(alone) / sum(samples["latency_s"])),
        "requests_s_prefix_not_shared": unshared,
        "requests_s_by_load": {str(load): by_load[load] for load in sorted(by_load)},
        "parallel": parallel,
        "completion_tokens": statistics.mean(samples["tokens"]),
        "prompt_tokens": statistics.mean(a["prompt_tokens"] for a in alone),
        "vram_mb": None,
        "torch_peak_mb": None,
        **{name: max(read[name] for read in memory) for name in memory[0] if all(name in read for read in memory)},
        "peak_rss_mb": peak_rss_mb,
        "gpu_utilization": busy,
        **others.cores(),
    }
    return figures | power.per_request(energy, joules, cpu_s, model.device, len(alone))  # last: it may start a process


def summary(samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """The figures that follow from raw samples."""
    pairs = zip(samples["latency_s"], samples["first_token_s"], samples["tokens"], strict=True)
    later = [(total - first) / (tokens - 1) for total, first, tokens in pairs if tokens > 1]
    return {
        "ttft_ms": percentiles(samples["first_token_s"]),
        "tpot_ms": percentiles(later) if later else None,
        "latency_ms": percentiles(samples["latency_s"]),
        "prefill_tok_s": statistics.median(samples["prefill_tok_s"]),
        "decode_tok_s": statistics.median(samples["decode_tok_s"]),
        "requests_s": len(samples["latency_s"]) / sum(samples["latency_s"]),
    }


def pooled(runs: Sequence[tuple[Mapping[str, Any], Path]]) -> dict[str, Any]:
    """One variant's figures from several runs: latencies of all requests together, of everything else the median.

    Args:
        runs: metrics and folder of each.

    Returns:
        The figures of `benchmark`, with one at a time in `requests_s_by_load`; `latency_ms_by_load`, percentiles for each number of requests at a time; `runs`; and of `spread_of` (largest - smallest) / median over the runs; None for one run.
    """
    metrics = [found for found, _ in runs]
    samples: dict[str, list[float]] = {}
    for _, folder in runs:
        for name, values in json.loads((folder / SAMPLES).read_text(encoding="utf-8")).items():
            samples.setdefault(name, []).extend(values)
    shared = [name for name in metrics[0] if all(name in found for found in metrics)]  # an earlier version measured fewer
    by_load = {name.removeprefix(AT_LOAD): percentiles(values) for name, values in samples.items() if name.startswith(AT_LOAD)}
    median = {name: (max if name in BUSY else _median)([found[name] for found in metrics]) for name in shared}
    percentiles_of_all = {name: value for name, value in summary(samples).items() if name.endswith("_ms")}
    return {
        **median,
        **percentiles_of_all,
        "requests_s_by_load": {"1": median["requests_s"], **median["requests_s_by_load"]},
        "latency_ms_by_load": {"1": percentiles_of_all["latency_ms"], **{load: by_load[load] for load in sorted(by_load, key=int)}},
        "runs": len(runs),
        "spread": {name: _spread([found[name] for found in metrics]) for name in SPREAD_OF} if len(runs) > 1 else None,
    }


def _median(values: list[Any]) -> Any:
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {name: _median([value[name] for value in values]) for name in first}
    return first if isinstance(first, str) or len(set(values)) == 1 else statistics.median(values)


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


def _at_a_time(model: LocalRuntime, asked: list[list[prompt.Message]], load: int, max_tokens: int) -> tuple[float, list[float]]:
    """Requests/s when so many are answered at a time, and how long each took, in the order they ended in."""
    longest = sorted(asked, key=lambda conversation: len(conversation[-1]["content"]))[-load:]  # the room they need is enough for all
    list(model.generate(longest, max_tokens, load))
    model.forget()
    started = time.perf_counter()
    answered = list(model.generate(asked, max_tokens, load))
    return len(answered) / (time.perf_counter() - started), [completion.total_s for completion in answered]


def _one(model: LocalRuntime, conversation: list[prompt.Message], max_tokens: int) -> dict[str, float]:
    started = time.perf_counter()
    completion = next(iter(model.generate([conversation], max_tokens, 1)))
    if math.isnan(completion.total_s):
        raise ValueError(f"a prompt has {completion.prompt_tokens:,} tokens, at most {LONGEST_PROMPT:,} are read: show fewer examples")
    return {
        "total_s": time.perf_counter() - started,
        "first_token_s": completion.first_token_s,
        "tokens": completion.completion_tokens,
        "prompt_tokens": completion.prompt_tokens,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds: those that are compared, and the ends of boxes and whiskers."""
    import numpy as np

    return {
        name: float(np.percentile(seconds, q)) * 1000
        for name, q in (("p5", 5), ("p25", 25), ("p50", 50), ("p75", 75), ("p95", 95), ("p99", 99))
    }


def _memory_mb(model: LocalRuntime, gpu: power.Gpu | None) -> dict[str, float]:
    """What memory is taken now, of the host and, as far as it is known, of the GPU."""
    on_gpu = {"vram_mb": gpu.memory_mb() if gpu else None, "torch_peak_mb": _torch_peak_mb(model)}
    return {**hardware.memory_mb(), **{name: found for name, found in on_gpu.items() if found is not None}}


def _torch_peak_mb(model: LocalRuntime) -> float | None:
    if model.device != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved() / 1e6
