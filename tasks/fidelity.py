"""Stages `reference_logits` and `fidelity`: whether a variant still is the fine-tuned model, and if not, what broke it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tasks import runtimes
from tasks.core import hardware, progress
from tasks.core.manifests import MANIFEST, Manifest, damage_of
from tasks.core.stage import StageConfig, stage
from tasks.domain import prompt
from tasks.domain.scoring import answer_text
from tasks.domain.spec import load_spec
from tasks.quantize_gguf import MODEL_FILE
from tasks.runtimes import GptqKernel, LocalRuntime
from tasks.synthesize import in_turns, read_rows
from tasks.tokenization import encode_example
from tasks.weights import BrokenFileError, Comparison, compare, folder_weights, gguf_weights, gptq_weights

Verdict = Literal["ok", "degraded", "erased", "runtime-broken", "file-broken"]
UNUSABLE: frozenset[Verdict] = frozenset({"erased", "runtime-broken", "file-broken"})  # never recommended, never promoted
ERASED = 0.5  # of the fine-tuning, below which nothing reliable is left
SAME_TOKEN = 0.95  # below it one token in twenty is another: an answer has about ten
RUNTIME_SHARE = 1 / 3  # of the divergence; if the same weights elsewhere have less, the runtime made the rest
BROKEN_TENSOR = 0.9  # a tensor's error as a share of its norm: with 1 bit a weight it is about 0.6, of zeros 1, of another tensor more
MADE_ANEW = "Delete its folder and run again: it is made anew."
SAME_AGAIN = "Made anew it would be the same: leave the format out, or take another version of what makes or reads it."
FOLDED = "the format moves scales from layers into their neighbours, so that single matrices cannot be compared"
LOGITS, ASKED = "logits.npz", "asked.json"


class ReferenceLogitsConfig(StageConfig):
    """On what variants are compared with the 16-bit model."""

    rows: int = Field(
        48, ge=4, le=2000, description="Validation rows, in which intents and languages take turns; each takes about a megabyte"
    )
    skip: int = Field(0, ge=0, description="Validation rows left out before them")


class FidelityConfig(StageConfig):
    """How a variant is run."""

    runtime: Literal["transformers", "llama_cpp"] = "llama_cpp"
    folded: bool = Field(
        False, description="The format moves scales from layers into their neighbours, so that single matrices cannot be compared"
    )
    kernel: GptqKernel | None = Field(None, description="GPTQModel's kernel for GPTQ variants; null takes what it thinks best")


@dataclass(frozen=True)
class Asked:
    """A validation row as token ids: the prompt, and the completion that would be right."""

    conversation: list[prompt.Message]
    prompt: list[int]
    completion: list[int]


class NoNumbersError(BrokenFileError):
    """Logits that are no numbers: of a broken file, or, where its weights are sound, of a broken runtime."""


@dataclass
class Divergence:
    """How far a variant's next-token probabilities are from the 16-bit model's, over the tokens of the right completions.

    Attributes:
        mean_kld, p99_kld: Kullback-Leibler divergence, nats.
        top1_agreement: share of tokens that are the likeliest for both.
        perplexity, reference_perplexity: of the right completions.
    """

    mean_kld: float
    p99_kld: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float


@stage("reference_logits", version=2, libraries=("torch", "transformers"), preloaded=True)
def reference_logits(config: ReferenceLogitsConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """What `inputs["model"]`, computed in float32, foretells for the right completions of rows of `inputs["dataset"]`."""
    from transformers import AutoTokenizer

    spec = load_spec(str(inputs["dataset"]))
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"], trust_remote_code=False)
    model = runtimes.load("transformers", inputs["model"], hardware.cores(), "float32")
    asked = []
    for row in in_turns(read_rows(inputs["dataset"] / "validation.jsonl"))[config.skip : config.skip + config.rows]:
        conversation = prompt.messages(spec, row["text"])
        asked.append(Asked(conversation, *encode_example(tokenizer, conversation, answer_text(row["gold"], spec))))
    logits = {str(i): logits.astype(np.float16) for i, logits in enumerate(ask(model, asked))}
    np.savez(out_dir / LOGITS, **logits)  # type: ignore[arg-type]
    (out_dir / ASKED).write_text(json.dumps([asdict(row) for row in asked], ensure_ascii=False), encoding="utf-8")
    return {"rows": len(asked), "completion_tokens": sum(len(row.completion) for row in asked)}


@stage("fidelity", version=6, libraries=("torch", "transformers", "gptqmodel", "llama-cpp-python"), measures=True, preloaded=True)
def fidelity(config: FidelityConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Compare `inputs["model"]` with the 16-bit model: its weights, its prompts, and what it foretells.

    `inputs` also has `reference`, of `reference_logits`; and `tuned` and `base`, the 16-bit models before quantization and before
    fine-tuning, in the variant's own kind of file: GGUF of 16 bits for a GGUF file, else Hugging Face folders.
    """
    manifest = Manifest.model_validate_json((inputs["model"] / MANIFEST).read_bytes())
    asked, reference = read_reference(inputs["reference"])
    try:
        if damage := damage_of(inputs["model"], manifest):
            found = _broken(damage, MADE_ANEW)
        else:
            found = judge(*_opened(config, inputs), asked, reference)
    except BrokenFileError as error:
        found = _broken(str(error), SAME_AGAIN)
    # What is decided from it depends on what was found: an artefact without files would always be the same.
    (out_dir / "fidelity.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def read_reference(folder: Path) -> tuple[list[Asked], list[np.ndarray]]:
    """The rows of `reference_logits`, and the 16-bit model's logits for each: float32, (tokens of the completion, vocabulary)."""
    asked = [Asked(**row) for row in json.loads((folder / ASKED).read_text(encoding="utf-8"))]
    with np.load(folder / LOGITS) as kept:
        return asked, [kept[str(i)].astype(np.float32) for i in range(len(asked))]


def _opened(
    config: FidelityConfig, inputs: Mapping[str, Path]
) -> tuple[LocalRuntime, Comparison | None, Callable[[], LocalRuntime] | None]:
    """The variant in its runtime, what became of its weights, and how to load the same weights into transformers, unpacked, if we can."""
    if config.runtime == "llama_cpp":
        file, *others = (inputs[name] / MODEL_FILE for name in ("model", "tuned", "base"))
        comparison = compare(gguf_weights(file), *map(gguf_weights, others))
        return runtimes.load("llama_cpp", file, hardware.cores()), comparison, lambda: _in_transformers(file)
    model: Any = runtimes.load("transformers", inputs["model"], hardware.cores(), kernel=config.kernel)
    if config.folded:
        return model, None, None
    with gptq_weights(inputs["model"]) as mine, folder_weights(inputs["tuned"]) as tuned, folder_weights(inputs["base"]) as base:
        comparison = compare(mine, tuned, base)
    return model, comparison, lambda: _unquantized(inputs)


def _in_transformers(file: Path) -> LocalRuntime:
    from tasks.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(file.parent, hardware.cores(), "float32", gguf_file=file.name)


def _unquantized(inputs: Mapping[str, Path]) -> LocalRuntime:
    """The fine-tuned model with the weights of a GPTQ variant, as plain numbers."""
    import torch

    from tasks.runtimes.transformers import TransformersRuntime

    plain = TransformersRuntime(inputs["tuned"], hardware.cores(), "float32")
    with gptq_weights(inputs["model"]) as held, torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if name in held:
                parameter.copy_(torch.from_numpy(held[name]()))
    return plain


def judge(
    model: LocalRuntime,
    weights: Comparison | None,
    elsewhere: Callable[[], LocalRuntime] | None,
    asked: Sequence[Asked],
    reference: Sequence[np.ndarray],
) -> dict[str, Any]:
    """The verdict on a variant, with the figures it rests on.

    Args:
        weights: what became of them; None where they cannot be compared.
        elsewhere: loads the variant's weights into transformers; called only if its answers are off and its weights are not; None where that cannot be done.
        reference: logits of the 16-bit model for each row of `asked`.
    """
    same_prompts = sum(model.encode(row.conversation) == row.prompt for row in asked)
    try:
        found = divergence(list(ask(model, asked)), reference, asked)
    except NoNumbersError as error:
        if not weights:
            raise
        verdict, why = (
            _not_made_by_rounding(weights) or _erased(weights) or ("runtime-broken", f"The matrices are what they should be, and {error}.")
        )
        return {**_broken(str(error), ""), **_weight_figures(weights), "verdict": verdict, "why": why}
    figures = {
        **asdict(found),
        **_weight_figures(weights),
        "prompt_ids_match": same_prompts == len(asked),
    }
    again = (lambda: divergence(list(ask(elsewhere(), asked)), reference, asked)) if elsewhere else None
    verdict, why = _verdict(found, weights, same_prompts, len(asked), again)
    return {**figures, "verdict": verdict, "why": why}


def _weight_figures(weights: Comparison | None) -> dict[str, Any]:
    if not weights:
        names = ("weight_rel_error", "delta_retained", "delta_retained_by_layer", "worst_tensor")
        return dict.fromkeys(names) | dict.fromkeys((f"{name}_reason" for name in names), FOLDED)
    return {
        "weight_rel_error": weights.weight_rel_error,
        "delta_retained": weights.delta_retained,
        "delta_retained_by_layer": weights.by_layer,
        "worst_tensor": {"name": weights.worst_tensor[0], "rel_error": weights.worst_tensor[1]},
    }


def _not_made_by_rounding(weights: Comparison) -> tuple[Verdict, str] | None:
    name, error = weights.worst_tensor
    if error <= BROKEN_TENSOR:
        return None
    return "file-broken", f"The tensor {name} is off by {error:.0%}, more than rounding makes: it holds something else. {SAME_AGAIN}"


def _erased(weights: Comparison) -> tuple[Verdict, str] | None:
    if weights.delta_retained >= ERASED:
        return None
    return "erased", (
        f"Only {max(weights.delta_retained, 0):.0%} of what fine-tuning changed is left in the weights: this format's steps are coarser than the "
        "change, and the base model lies on them, so that rounding leads back to it."
    )


def _verdict(
    found: Divergence, weights: Comparison | None, same_prompts: int, rows: int, elsewhere: Callable[[], Divergence] | None
) -> tuple[Verdict, str]:
    if weights and (verdict := _not_made_by_rounding(weights) or _erased(weights)):
        return verdict
    if same_prompts < rows:
        return "runtime-broken", (
            f"The runtime reads other tokens than the model was trained with in {rows - same_prompts} of {rows} prompts: its chat template or its tokenizer is not the model's."
        )
    if found.top1_agreement >= SAME_TOKEN:
        return "ok", f"{found.top1_agreement:.1%} of the next tokens are those of the 16-bit model."
    off = f"; its weights are off by {weights.weight_rel_error:.1%}" if weights else ""
    degraded = f"{1 - found.top1_agreement:.1%} of the next tokens are others than the 16-bit model's{off}."
    if not elsewhere:
        return "degraded", f"{degraded} Whether the format or its kernel costs that was not checked."
    try:
        same_weights = elsewhere()
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:  # it does not know the architecture, and never will
        return (
            "degraded",
            f"{degraded} Whether that is the runtime's fault could not be checked in transformers: {type(error).__name__}: {error}",
        )
    if same_weights.mean_kld < found.mean_kld * RUNTIME_SHARE:
        return "runtime-broken", (
            f"The weights are right and the answers are not: run in transformers, the same weights agree with the 16-bit model in {same_weights.top1_agreement:.1%} "
            f"of the next tokens, in this runtime in {found.top1_agreement:.1%}."
        )
    return "degraded", degraded


def _broken(problem: str, mend: str) -> dict[str, Any]:
    names = (
        "mean_kld",
        "p99_kld",
        "top1_agreement",
        "perplexity",
        "reference_perplexity",
        "weight_rel_error",
        "delta_retained",
        "prompt_ids_match",
    )
    return {**dict.fromkeys(names), "verdict": "file-broken", "why": f"{problem}. {mend}"}


def divergence(logits: Sequence[np.ndarray], reference: Sequence[np.ndarray], asked: Sequence[Asked]) -> Divergence:
    """Compare logits of the same completions, row by row.

    Raises:
        BrokenFileError: logits that are no numbers, or for another vocabulary.
    """
    klds, same, mine_nll, theirs_nll = [], [], [], []
    for mine, theirs, row in zip(logits, reference, asked, strict=True):
        if mine.shape != theirs.shape:
            raise BrokenFileError(f"it foretells {mine.shape[-1]} tokens, and the 16-bit model {theirs.shape[-1]}")
        if not np.isfinite(mine).all():
            raise NoNumbersError("what it foretells are no numbers")
        p, q = _log_softmax(theirs), _log_softmax(mine)
        klds.append((np.exp(p) * (p - q)).sum(-1))
        same.append(mine.argmax(-1) == theirs.argmax(-1))
        at = np.arange(len(row.completion)), np.asarray(row.completion)
        mine_nll.append(-q[at])
        theirs_nll.append(-p[at])
    kld = np.concatenate(klds)
    return Divergence(
        mean_kld=float(kld.mean()),
        p99_kld=float(np.quantile(kld, 0.99)),
        top1_agreement=float(np.concatenate(same).mean()),
        perplexity=math.exp(float(np.concatenate(mine_nll).mean())),
        reference_perplexity=math.exp(float(np.concatenate(theirs_nll).mean())),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def ask(model: LocalRuntime, asked: Sequence[Asked]) -> Iterator[np.ndarray]:
    """Logits by which a model foretells the right completion of each row."""
    for row in progress.track(asked, len(asked), "rows"):
        yield model.completion_logits(row.prompt, row.completion)
