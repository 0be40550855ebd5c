"""Stage `evaluate`: exact match and its parts for one variant, in the runtime it will be deployed with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks import runtimes
from tasks.core import hardware, progress
from tasks.core.stage import StageConfig, stage
from tasks.domain import prompt
from tasks.domain.grammar import answer_grammar
from tasks.domain.scoring import score
from tasks.domain.spec import Spec, load_spec
from tasks.quantize_gguf import MODEL_FILE
from tasks.runtimes import Dtype, GptqKernel, LocalRuntime, RuntimeName
from tasks.synthesize import read_rows

if TYPE_CHECKING:
    from tasks.benchmark import BenchmarkConfig


class EvaluateConfig(StageConfig):
    """How a variant is asked."""

    runtime: RuntimeName = "llama_cpp"
    dtype: Dtype = Field(
        "auto", description="What transformers computes in (GGUF files decide for themselves); `auto`: what is quickest here"
    )
    zero_shot: bool = Field(False, description="Give the long instructions: for a model that was not fine-tuned")
    few_shot: int = Field(0, ge=0, le=64, description="Rows of `train` shown as examples with every request")
    splits: tuple[str, ...] = ("test", "hard")
    max_tokens: int = Field(64, ge=8, le=1024, description="Longer answers are cut, and so mostly unparseable")
    parallel: int = Field(16, ge=1, le=255, description="Conversations answered at a time")
    constrained: bool = Field(False, description="Keep every answer to the grammar of the domain; llama.cpp only")
    kernel: GptqKernel | None = Field(None, description="GPTQModel's kernel for GPTQ variants; null takes what it thinks best")


def load_variant(config: EvaluateConfig | BenchmarkConfig, folder: Path, spec: Spec, mmap: bool = False) -> LocalRuntime:
    """Load an artefact of `merge`, `base_model`, or one of the quantizing stages in its runtime."""
    if config.runtime == "litellm":
        raise ValueError("a model behind an API is not loaded")
    path = folder / MODEL_FILE if config.runtime == "llama_cpp" else folder
    grammar = answer_grammar(spec) if config.constrained else None
    return runtimes.load(config.runtime, path, hardware.cores(), config.dtype, grammar, mmap, config.kernel)


def conversations(config: EvaluateConfig | BenchmarkConfig, dataset: Path, spec: Spec, texts: list[str]) -> list[list[prompt.Message]]:
    """What a variant is asked for each text: the trained prompt, or the long instructions with or without examples."""
    examples = prompt.pick_examples(read_rows(dataset / "train.jsonl"), spec, config.few_shot) if config.few_shot else ()
    return [prompt.messages(spec, text, zero_shot=config.zero_shot, examples=examples) for text in texts]


def answer(model: LocalRuntime, asked: list[list[prompt.Message]], max_tokens: int, parallel: int, note: str) -> list[str]:
    """The raw answers to conversations, in their order."""
    answers = [""] * len(asked)
    for completion in progress.track(model.generate(asked, max_tokens, parallel), len(asked), note):
        answers[completion.index] = completion.text
    return answers


@stage("evaluate", version=9, libraries=("torch", "transformers", "gptqmodel", "llama-cpp-python"), preloaded=True)
def evaluate(config: EvaluateConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Score `inputs["model"]` on splits of `inputs["dataset"]`; writes every answer to `<split>.jsonl`."""
    spec = load_spec(str(inputs["dataset"]))
    model = load_variant(config, inputs["model"], spec)
    results: dict[str, Any] = {"dtype": getattr(model, "dtype", None)}
    for split in config.splits:
        rows = read_rows(inputs["dataset"] / f"{split}.jsonl")
        asked = conversations(config, inputs["dataset"], spec, [row["text"] for row in rows])
        answers = answer(model, asked, config.max_tokens, config.parallel, note=split)
        results[split] = score_and_keep(rows, answers, spec, out_dir / f"{split}.jsonl")
    return results


def score_and_keep(rows: list[dict[str, Any]], answers: list[str], spec: Spec, path: Path) -> dict[str, Any]:
    """The figures of `score`, without the single rows, which are written to `path` with what was answered."""
    result = score(rows, answers, spec)
    correct = result.pop("correct")
    with path.open("w", encoding="utf-8") as file:
        for row, text, right in zip(rows, answers, correct, strict=True):
            kept = {"id": row["id"], "text": row["text"], "gold": row["gold"], "output": text, "correct": right}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return result
