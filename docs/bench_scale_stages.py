"""What bench_scale.py measures of the pipeline's stages, each run through the seam as a pipeline run runs it: in a process of its own.

Seconds are those of the stage's manifest: process, work, and the digests of what was written. The process from which stages are forked is
begun before. Every function returns samples by the name of the figure: seconds (`_s`), megabytes (`_mb`) or milliseconds (`_ms`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.base_model import TINY, BaseModelConfig, base_model, random_llama
from tasks.benchmark import benchmark
from tasks.config import RunConfig, load_config, resolve
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.progress import Event
from tasks.core.settings import Settings
from tasks.core.stage import Stage, StageConfig, run, stage
from tasks.evaluate import evaluate
from tasks.fidelity import FidelityConfig, fidelity, reference_logits
from tasks.finetune import finetune
from tasks.merge import merge
from tasks.quantize_gguf import ConvertGgufConfig, GgufFormat, QuantizeGgufConfig, convert_gguf, quantize_gguf
from tasks.synthesize import synthesize

Samples = dict[str, list[float]]
FORMATS: tuple[GgufFormat, ...] = ("F16", "Q8_0", "Q4_0", "Q5_0", "Q4_1", "IQ4_NL")  # those that fit every model here; the first n are made
VOCABULARY = 49_152  # of the offline model's tokenizer
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Scope:
    """How much is done for one measurement.

    Attributes:
        profile: whose data, with its evaluation rows, is made in sizes.
        per_language: rows of each split for each language.
        steps: of the training that models of all sizes get, in batches of 16.
        window_s: how long workers poll.
        children: runs written to MLflow for one measurement.
    """

    profile: str = "standard"
    per_language: tuple[int, int, int, int] = (5000, 72, 168, 48)
    steps: int = 8
    window_s: float = 40.0
    children: int = 30


QUICK = Scope("smoke", (60, 12, 12, 12), steps=4, window_s=5.0, children=5)


class Shape(StageConfig):
    """A Llama by its dimensions; the heads have 64 numbers each unless `head_size` says otherwise."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 64
    vocabulary: int = VOCABULARY
    tied: bool = True

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices, with which every token is multiplied."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        """Weights of the token embeddings, and as many again of the output head where it is not the same matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear + (2 * self.layers + 1) * self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def read_mb(self) -> float:
        """MB that a Q4_0 file has for layers and head, which are read for each token that is written. llama.cpp keeps the head, and embeddings
        that are the same matrix, in Q6_K, or where 256 does not divide the rows, in Q8_0."""
        head_bits = 8.5 if self.hidden % 256 else 6.5625
        return (self.linear * 4.5 + self.embedding * head_bits) / 8e6

    @property
    def file_mb(self) -> float:
        """MB of a Q4_0 file, but for its vocabulary."""
        return self.read_mb + (0 if self.tied else self.embedding * 4.5 / 8e6)

    def x(self) -> dict[str, float]:
        """What costs grow with: all weights, those of the layers, MB of the Q4_0 file, and those that are read for each written token."""
        return {"size": self.parameters, "layers": self.linear, "file": round(self.file_mb, 3), "read": round(self.read_mb, 3)}


SMALLEST = Shape(hidden=64, intermediate=128, layers=2, heads=1, kv_heads=1)
SHAPES = {
    shape.parameters: shape
    for shape in (
        Shape(hidden=128, intermediate=352, layers=6, heads=2, kv_heads=1),
        Shape(hidden=320, intermediate=864, layers=14, heads=5, kv_heads=1),
        Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3),  # SmolLM2-135M
    )
}


@stage("random_model", version=1, libraries=("transformers", "torch"), preloaded=True)
def random_model(config: Shape, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """A random Llama as the stage `base_model` would leave it."""
    model, tokenizer = random_llama(config.hidden, config.intermediate, config.layers, config.heads, config.kv_heads)
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return {"parameters": sum(weights.numel() for weights in model.parameters())}


class Bench:
    """Stages of a home of their own. What is not measured is made once and kept."""

    def __init__(self, places: Settings, scope: Scope) -> None:
        self.places, self.scope = places, scope
        self.store = Store(places.store_uri, places.home)
        self.tiny: RunConfig = resolve(load_config("smoke"))

    def make(
        self, stage_: Stage, config: StageConfig, on_event: Callable[[Event], None] = lambda event: None, **inputs: Manifest
    ) -> Manifest:
        """The artefact of a stage."""
        return run(stage_, config, inputs, self.store, self.places.home / "logs", on_event)[0]

    def time(
        self, stage_: Stage, config: StageConfig, on_event: Callable[[Event], None] = lambda event: None, **inputs: Manifest
    ) -> Manifest:
        """The artefact of a stage, made anew even where it is there."""
        self.store.remove(stage_.name, stage_.key(config, inputs))
        return self.make(stage_, config, on_event, **inputs)

    def tiny_model(self) -> Manifest:
        """The random model of `smoke`, made anew: the process from which stages are forked has then done its imports."""
        return self.time(base_model, BaseModelConfig(source=TINY, revision=self.tiny.base_model.revision))


def rows(bench: Bench, size: int, repeat: int) -> Samples:
    """Training rows; those of the evaluation splits are in the cost and not in the number."""
    data = resolve(load_config(bench.scope.profile)).data
    made = bench.time(synthesize, data.model_copy(update={"train_rows": size, "seed": data.seed + repeat}))
    return {"synthesize_s": [made.wall_s], "synthesize_mb": [made.peak_rss_mb or 0.0], "file_mb": [made.files["train.jsonl"].size / 1e6]}


def training(bench: Bench, size: int, repeat: int) -> Samples:
    """Rows that the tiny model learns from."""
    base = bench.tiny_model()
    data = bench.make(synthesize, bench.tiny.data.model_copy(update={"train_rows": size, "patterns_per_intent": None}))
    config = bench.tiny.train.model_copy(update={"checkpoints": 1})
    trained = bench.time(finetune, config, base_model=base, dataset=data)
    return {"finetune_s": [trained.wall_s], "finetune_mb": [trained.peak_rss_mb or 0.0]}


def languages(bench: Bench, size: int, repeat: int) -> Samples:
    """Languages, each with as many rows."""
    model = bench.make(convert_gguf, ConvertGgufConfig(), model=bench.tiny_model())
    split_rows = zip(("train_rows", "validation_rows", "test_rows", "hard_rows"), bench.scope.per_language, strict=True)
    data = resolve(load_config("standard")).data
    changes = {"languages": data.languages[:size], "seed": data.seed + repeat, **{name: size * number for name, number in split_rows}}
    made = bench.time(synthesize, data.model_copy(update=changes))
    asked = bench.time(evaluate, bench.tiny.evaluate, model=model, dataset=made)
    return {"synthesize_s": [made.wall_s], "synthesize_mb": [made.peak_rss_mb or 0.0], "evaluate_s": [asked.wall_s]}


def variants(bench: Bench, size: int, repeat: int) -> Samples:
    """GGUF formats of the tiny model, with all that a run does for each, in the order of a run."""
    tiny, base = bench.tiny, bench.tiny_model()
    data = bench.make(synthesize, tiny.data)
    adapter = bench.make(finetune, tiny.train, base_model=base, dataset=data)
    tuned = bench.make(merge, tiny.merge, base_model=base, adapter=adapter, dataset=data)
    reference = bench.make(reference_logits, tiny.fidelity, model=tuned, dataset=data)
    tuned_gguf, base_gguf = (bench.make(convert_gguf, ConvertGgufConfig(), model=made) for made in (tuned, base))
    formats = FORMATS[:size]
    files = [bench.time(quantize_gguf, QuantizeGgufConfig(format=name), gguf=tuned_gguf) for name in formats]
    checked = [bench.time(fidelity, FidelityConfig(), model=file, reference=reference, tuned=tuned_gguf, base=base_gguf) for file in files]
    asked = [bench.time(evaluate, tiny.evaluate, model=file, dataset=data) for file in files]
    measured = [bench.time(benchmark, tiny.benchmark, model=file, dataset=data) for file in files]
    parts = {"quantize_s": files, "check_s": checked, "evaluate_s": asked, "benchmark_s": measured}
    seconds = {name: [made.wall_s for made in part] for name, part in parts.items()}
    return {**seconds, "all_s": [sum(map(sum, seconds.values()))], "disk_mb": [sum(file.size_mb for file in files)]}


def model(bench: Bench, size: int, repeat: int, shapes: Mapping[int, Shape] = SHAPES) -> Samples:
    """A random model of so many weights: trained a few steps, merged, converted, quantized to Q4_0 and asked."""
    tiny, base = bench.tiny, bench.time(random_model, shapes[size])
    if base.metrics["parameters"] != size:
        raise ValueError(f"The model has {base.metrics['parameters']:,} weights, and its shape says {size:,}")
    data = bench.make(synthesize, tiny.data.model_copy(update={"train_rows": 16 * bench.scope.steps}))
    step_ends: list[float] = []

    def step(event: Event) -> None:
        if "done" in event:
            step_ends.append(time.perf_counter())

    # To read the 16-bit weights in the middle of it would be timed as a step.
    config = tiny.train.model_copy(update={"rank": 16, "alpha": 32, "checkpoints": 1, "finish_in_16bit": 0.0})
    trained = bench.time(finetune, config, step, base_model=base, dataset=data)
    tokens = trained.metrics["tokens"] / trained.metrics["steps"]
    # Batches differ in length, in the same order for every model. The first event is of the beginning.
    steps_s = [end - start for start, end in zip(step_ends[WARMUP_STEPS:-1], step_ends[WARMUP_STEPS + 1 :], strict=True)]
    merged = bench.time(merge, tiny.merge, base_model=base, adapter=trained, dataset=data)
    converted = bench.time(convert_gguf, ConvertGgufConfig(), model=merged)
    quantized = bench.time(quantize_gguf, QuantizeGgufConfig(format="Q4_0"), gguf=converted)
    asked = {"requests": 10, "batched_requests": 16, "prefill_tokens": 128, "decode_tokens": 32, "max_tokens": 12}
    served = bench.time(benchmark, tiny.benchmark.model_copy(update=asked), model=quantized, dataset=data).metrics
    for made in (trained, merged, converted, quantized):  # gigabytes, of which nothing is needed again
        bench.store.remove(made.kind, made.key)
    return {
        "train_ms": [1e3 * step_s / tokens for step_s in steps_s],
        "train_mb": [trained.peak_rss_mb or 0.0],
        "merge_s": [merged.wall_s],
        "merge_mb": [merged.peak_rss_mb or 0.0],
        "convert_s": [converted.wall_s],
        "quantize_s": [quantized.wall_s],
        "gguf_mb": [quantized.size_mb],
        "request_ms": [1e3 / served["requests_s"]],
        "decode_ms": [1e3 / served["decode_tok_s"]],
        "serve_mb": [served["rss_mb"]],
    }
