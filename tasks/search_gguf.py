"""Stage `search_gguf`: a GGUF file of mixed precision, in which each part of the model has as many bits as it needs.

How much a part matters is measured: everything at 8 bits, that part alone at 4, and the divergence from the 16-bit model. Divergences of
parts about add up, so the parts that cost least for what they save are given 4 bits, as many as the divergence of a ready-made
format allows; and what comes out is measured again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tasks.core import hardware, progress
from tasks.core.stage import StageConfig, stage
from tasks.fidelity import Asked, ask, divergence, read_reference
from tasks.importance import as_parameter
from tasks.quantize_gguf import MODEL_FILE, GgufFormat, describe, quantize
from tasks.weights import open_gguf

FINE, COARSE = "Q8_0", "Q4_0"  # the two that llama.cpp multiplies fastest on a CPU; both fit every model whose dimensions 32 divides
_PART = re.compile(r"blk\.(\d+)\.(attn|ffn)_")
BACK_OFF = 0.85  # of the allowed divergence, each time what was predicted turns out too low


class SearchGgufConfig(StageConfig):
    """What a mixture is to beat, and how long to look for it."""

    beat: GgufFormat = Field("Q4_0", description="The ready-made format to be smaller than, at no more divergence from the 16-bit model")
    seconds: float = Field(300, gt=0, le=86_400, description="After this long, parts not yet measured keep 8 bits")


@dataclass(frozen=True)
class Part:
    """Tensors that get the same type: the attention or the feed-forward matrices of a layer, or the token embeddings."""

    name: str
    tensors: tuple[str, ...]
    weights: int

    @property
    def saving(self) -> float:
        """Bytes that 4 bits save against 8: 4.5 and 8.5 bits per weight with their scales."""
        return self.weights * 4 / 8


@dataclass(frozen=True)
class Mixture:
    """A file that was made and measured: which parts have 4 bits, its mean divergence in nats, its size."""

    coarse: list[str]
    mean_kld: float
    size_mb: float


@stage("search_gguf", version=1, libraries=("llama-cpp-python",), reuse_memory=True)
def search_gguf(config: SearchGgufConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Look for a mixture of 8 and 4 bits that is smaller than the format to beat and diverges no more.

    `inputs` has `gguf`, the F16 file; `importance`, its importance matrix; `reference`, what the 16-bit model foretells. Writes
    `model.gguf`, the best that was found, and `search.json`, what was measured. Without a find the file is the format to beat.
    """
    deadline = time.monotonic() + config.seconds
    asked, reference = read_reference(inputs["reference"])
    source = inputs["gguf"] / MODEL_FILE
    trial = out_dir / "trial.gguf"
    matrix, _kept = as_parameter(inputs["importance"])

    def measure(kind: str, types: dict[str, str], weighted: bool) -> tuple[float, float]:
        """Mean divergence and size in MB of the file with these types by tensor, all others of `kind`."""
        quantize(source, trial, kind, matrix if weighted else None, types)
        return mean_divergence(trial, asked, reference), trial.stat().st_size / 1e6

    allowed, size_to_beat = measure(config.beat, {}, weighted=False)
    everything_fine = {name: FINE for part in parts(source) for name in part.tensors}
    least, _ = measure(FINE, everything_fine, weighted=True)
    costs: dict[str, float] = {}
    largest_first = sorted(parts(source), key=lambda part: -part.weights)
    for part in progress.track(largest_first, len(largest_first), "parts measured"):
        if time.monotonic() > deadline:
            continue
        found, _ = measure(FINE, everything_fine | dict.fromkeys(part.tensors, COARSE), weighted=True)
        costs[part.name] = max(found - least, 0.0)

    tried: list[Mixture] = []
    budget = allowed - least
    while not (tried and tried[-1].mean_kld <= allowed) and budget > (allowed - least) / 10:
        coarse = cheapest(largest_first, costs, budget)
        found, size = measure(FINE, everything_fine | {name: COARSE for part in coarse for name in part.tensors}, weighted=True)
        tried.append(Mixture([part.name for part in coarse], found, size))
        budget *= BACK_OFF
    best = tried[-1] if tried and tried[-1].mean_kld <= allowed and tried[-1].size_mb < size_to_beat else None
    if not best:
        quantize(source, trial, config.beat)
    trial.rename(out_dir / MODEL_FILE)
    (out_dir / "search.json").write_text(
        json.dumps({"costs": costs, "tried": [asdict(mixture) for mixture in tried]}, indent=1), encoding="utf-8"
    )
    return {
        "format": "mixed" if best else config.beat,
        "found": best is not None,
        "beat": config.beat,
        "beat_size_mb": round(size_to_beat, 3),
        "beat_mean_kld": allowed,
        "mean_kld": best.mean_kld if best else allowed,
        "coarse_parts": len(best.coarse) if best else None,
        "parts": len(largest_first),
        "parts_measured": len(costs),
        **describe(out_dir / MODEL_FILE),
    }


def mean_divergence(file: Path, asked: Sequence[Asked], reference: Sequence[np.ndarray]) -> float:
    """Mean Kullback-Leibler divergence of a GGUF file's next-token probabilities from the 16-bit model's, nats."""
    from tasks.runtimes.llama_cpp import LlamaCppRuntime

    model = LlamaCppRuntime(file, hardware.cores())
    try:
        return divergence(list(ask(model, asked)), reference, asked).mean_kld
    finally:
        model.close()


def parts(path: Path) -> list[Part]:
    """The parts of a GGUF file whose types are chosen."""
    tensors: dict[str, list[str]] = {}
    weights: dict[str, int] = {}
    for tensor in open_gguf(path).tensors:
        if sum(int(n) > 1 for n in tensor.shape) < 2:
            continue
        found = _PART.match(tensor.name)
        name = f"blk.{found[1]}.{found[2]}" if found else tensor.name.removesuffix(".weight")
        tensors.setdefault(name, []).append(tensor.name)
        weights[name] = weights.get(name, 0) + int(tensor.n_elements)
    return [Part(name, tuple(names), weights[name]) for name, names in tensors.items()]


def cheapest(known: Sequence[Part], costs: Mapping[str, float], budget: float) -> list[Part]:
    """Parts to make coarse: those that cost least for what they save, while their costs together keep within the budget."""
    chosen, spent = [], 0.0
    for part in sorted((part for part in known if part.name in costs), key=lambda part: costs[part.name] / part.saving):
        if spent + costs[part.name] <= budget:
            chosen.append(part)
            spent += costs[part.name]
    return chosen
