"""Stage `search_gguf`: a GGUF file of mixed precision, in which each part of the model has as many bits as it needs.

The smallest mixture has the fewest bits everywhere; if it diverges no more than is allowed, it is taken. Otherwise how much a part matters
is measured: everything at 8 bits, that part alone at fewer. Divergences of parts about add up, so each part is given the type whose
divergence and size cost least together, at the exchange rate at which the whole keeps within the divergence that is allowed; and what
comes out is measured again.
"""

from __future__ import annotations

import json
import math
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
from tasks.fidelity import Asked, NoNumbersError, divergence, read_reference
from tasks.importance import as_parameter
from tasks.quantize_gguf import MODEL_FILE, describe, quantize
from tasks.weights import open_gguf

FINE = "Q8_0"
# Bits per weight, with scales, of types that fit every model whose dimensions 32 divides. Q4_1 (5.0) and Q4_0 (4.5) are left out: with
# an importance matrix they diverge as much as IQ4_NL and twice as much.
BITS = {FINE: 8.5, "Q5_0": 5.5, "IQ4_NL": 4.5}
COARSE = tuple(kind for kind in BITS if kind != FINE)
COARSEST = min(BITS, key=lambda kind: BITS[kind])
_PART = re.compile(r"blk\.(\d+)\.(attn|ffn)_")
BACK_OFF = 0.85  # of the allowed divergence, each time what was predicted turns out too low
TRIALS = 8


class SearchGgufConfig(StageConfig):
    """What a mixture must keep to, and how long to look for it."""

    max_kld: float | None = Field(
        None,
        gt=0,
        description="Largest mean divergence from the 16-bit model, nats; none: the smallest mixture is taken, and what it costs is left to the decision",
    )
    seconds: float = Field(
        600, gt=0, le=86_400, description="After this long, parts not yet measured keep 8 bits; one mixture is measured all the same"
    )


@dataclass(frozen=True)
class Part:
    """Tensors that get the same type: the attention or the feed-forward matrices of a layer, or the token embeddings."""

    name: str
    tensors: tuple[str, ...]
    weights: int

    def size(self, kind: str) -> float:
        """Bytes."""
        return self.weights * BITS[kind] / 8


@dataclass(frozen=True)
class Mixture:
    """A file that was made and measured: the parts that have fewer than 8 bits, its mean divergence in nats, its size."""

    types: dict[str, str]
    mean_kld: float
    size_mb: float


@stage(
    "search_gguf",
    version=6,
    libraries=("llama-cpp-python",),
    measures=True,
    preloaded=True,
    varies="within a limit it tries as many mixtures as it has time for",
)
def search_gguf(config: SearchGgufConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Make the smallest mixture of 8, 5 and 4 bits a weight that diverges no more than is allowed.

    `inputs` has `gguf`, the F16 file; `importance`, its importance matrix; `reference`, what the 16-bit model foretells. Writes
    `model.gguf`, the best that was found (with 8 bits everywhere, if nothing smaller will do), and `search.json`, what was measured.
    """
    deadline = time.monotonic() + config.seconds
    asked, reference = read_reference(inputs["reference"])
    source = inputs["gguf"] / MODEL_FILE
    matrix, _kept = as_parameter(inputs["importance"])
    known = sorted(parts(source), key=lambda part: -part.weights)

    def measure(types: Mapping[str, str]) -> Mixture:
        """The file with these types by part, and 8 bits in all others."""
        by_tensor = {name: types.get(part.name, FINE) for part in known for name in part.tensors}
        quantize(source, out_dir / MODEL_FILE, FINE, matrix, by_tensor)
        size_mb = (out_dir / MODEL_FILE).stat().st_size / 1e6
        return Mixture(dict(types), mean_divergence(out_dir / MODEL_FILE, asked, reference), size_mb)

    try:
        coarse = measure({part.name: COARSEST for part in known})
    except NoNumbersError:
        if config.max_kld is None:
            raise
        coarse = Mixture({}, math.inf, 0.0)
    limit = coarse.mean_kld if config.max_kld is None else config.max_kld
    if coarse.mean_kld <= limit:
        return _found(coarse, limit, out_dir, known, tried=[coarse], costs={})
    fine = measure({})
    budget = limit - fine.mean_kld
    costs: dict[str, dict[str, float]] = {part.name: {FINE: 0.0} for part in known}
    trials = [(part, kind) for kind in COARSE for part in known]
    within = [fine]  # what was measured and diverges no more than is allowed
    for part, kind in progress.track(trials, len(trials), "trials"):
        if budget > 0 and time.monotonic() < deadline:
            alone = measure({part.name: kind})
            costs[part.name][kind] = max(alone.mean_kld - fine.mean_kld, 0.0)
            within += [alone] if alone.mean_kld <= limit else []

    tried: list[Mixture] = []
    for back_off in range(TRIALS):
        if tried and time.monotonic() > deadline:
            break
        types = cheapest(known, costs, budget * BACK_OFF**back_off)
        if types and types not in [mixture.types for mixture in tried]:
            tried.append(measure(types))
            if tried[-1].mean_kld <= limit:
                break
    kept = bool(tried and tried[-1].mean_kld <= limit)
    best = tried[-1] if kept else measure(min(within, key=lambda mixture: mixture.size_mb).types)
    return _found(best, limit, out_dir, known, tried, costs) | {
        "fine_mean_kld": fine.mean_kld,
        "fine_size_mb": round(fine.size_mb, 3),
        "trials": len(trials),
    }


def _found(
    best: Mixture, limit: float, out_dir: Path, known: Sequence[Part], tried: Sequence[Mixture], costs: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Figures of the mixture whose file was written last; what was measured on the way is written beside it."""
    (out_dir / "search.json").write_text(json.dumps({"costs": costs, "tried": [asdict(mixture) for mixture in tried]}, indent=1))
    return {
        "format": "mixed",
        "max_kld": limit,
        "mean_kld": best.mean_kld,
        "parts": len(known),
        "coarse_parts": len(best.types),
        "mixtures_tried": len(tried),
        "mixture_kept_to_limit": best in tried,
        "trials": 0,
        "trials_measured": sum(len(found) - 1 for found in costs.values()),
        **describe(out_dir / MODEL_FILE),
    }


def mean_divergence(file: Path, asked: Sequence[Asked], reference: Sequence[np.ndarray]) -> float:
    """Mean Kullback-Leibler divergence of a GGUF file's next-token probabilities from the 16-bit model's, nats."""
    from tasks.runtimes.llama_cpp import LlamaCppRuntime

    model = LlamaCppRuntime(file, hardware.cores())
    try:
        logits = [model.completion_logits(row.prompt, row.completion) for row in asked]  # without a bar of its own in that of the trials
        return divergence(logits, reference, asked).mean_kld
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


def cheapest(known: Sequence[Part], costs: Mapping[str, Mapping[str, float]], budget: float) -> dict[str, str]:
    """Types of the parts that are to have fewer than 8 bits: the smallest choice found whose costs together keep within the budget.

    Every part takes the type with the least cost + rate * size; the highest rate that keeps within the budget is looked for by
    bisection (Lagrangian relaxation). What is left of the budget then goes to single parts.
    """

    def choice(rate: float) -> dict[str, str]:
        return {part.name: min(costs[part.name], key=lambda kind: costs[part.name][kind] + rate * part.size(kind)) for part in known}

    low, high = 0.0, 1.0  # nats per byte: at 1 every part takes its smallest type
    if budget < 0:
        return {}
    if cost_of(choice(high), costs) <= budget:
        low = high
    for _ in range(100):
        rate = (low + high) / 2
        low, high = (rate, high) if cost_of(choice(rate), costs) <= budget else (low, rate)
    types = choice(low)
    for part in known:  # a large part may have been too dear for the budget, and left some of it
        for kind in sorted(costs[part.name], key=part.size):
            smaller = {**types, part.name: kind}
            if part.size(kind) < part.size(types[part.name]) and cost_of(smaller, costs) <= budget:
                types = smaller
                break
    return {name: kind for name, kind in types.items() if kind != FINE}


def cost_of(types: Mapping[str, str], costs: Mapping[str, Mapping[str, float]]) -> float:
    """Divergence these types add, as far as that of parts adds up."""
    return sum(costs[name][kind] for name, kind in types.items())
